"""What a partition's nodes do not have is told in one sentence, from what `scontrol show node` prints."""

from typing import Any

import pytest

from qlora_lab.config.schema import SlurmConfig
from qlora_lab.errors import ConfigError
from qlora_lab.sweep.slurm.inventory import (
    check_nodes,
    gpus_in,
    in_shares,
    most_memory_gb,
    nodes_in,
    shares_in,
    wanted_by,
)

# Abridged from SLURM 22.05 and 23.11; `big` has more memory and fewer cards, `cpu` none, `plain` cards without a type.
NODES = nodes_in("""\
NodeName=gpu01 Arch=x86_64 CPUAlloc=0 CPUTot=64 CPULoad=0.10 Gres=gpu:a100:4(S:0-1) NodeAddr=gpu01 NodeHostName=gpu01 \
RealMemory=512000 AllocMem=0 FreeMem=1 State=IDLE Partitions=gpu,long Comment=two words of=it
NodeName=big01 CPUTot=128 CPUEfctv=126 Gres=gpu:h100:1(S:0,1),gpu:v100:1,shard:8 NodeAddr=big01 NodeHostName=big01 \
RealMemory=2048000 MemSpecLimit=48000 State=DOWN*+DRAIN Partitions=gpu
NodeName=cpu01 CPUTot=32 Gres=(null) NodeAddr=cpu01 NodeHostName=cpu01 RealMemory=64000 State=MIXED Partitions=cpu
NodeName=old01 CPUTot=16 Gres=gpu:2 NodeAddr=old01 NodeHostName=old01 RealMemory=32768 State=IDLE Partitions=plain
""")


def test_nodes_are_read() -> None:
    assert [node.name for node in NODES] == ["gpu01", "big01", "cpu01", "old01"]
    big = NODES[1]
    assert (big.cpus, big.memory_mib, big.gpus) == (126, 2_000_000, {"h100": 1, "v100": 1})
    assert NODES[0].partitions == {"gpu", "long"} and NODES[2].gpus == {} and NODES[3].gpus == {"": 2}
    assert nodes_in("No nodes in the system\n") == [] and gpus_in("") == {}


@pytest.mark.parametrize(
    ("partition", "given", "sentence"),
    [
        ("gpu", {"memory_gb": 3000}, "launcher.slurm.memory_gb must be at most 1953 in partition gpu, where no node"),
        (
            "cpu",
            {"gpus_per_run": 0, "cpus_per_run": 33},
            "cpus_per_run must be at most 32 in partition cpu, .*; got 33",
        ),
        ("long", {"gpus_per_run": 5}, "gpus_per_run must be at most 4 in partition long"),
        ("cpu", {}, "gpus_per_run must be 0 in partition cpu, which has no GPUs; got 1; .* are gpu, long, plain$"),
        ("gpu", {"extra": {"gres": "gpu:b200:1"}}, "type 'b200', and partition gpu has none; it has a100, h100, v100$"),
        ("plain", {"memory_gb": 8, "extra": {"gpus_per_node": "a100:1"}}, "it has GPUs without a type$"),
        ("gpu", {"extra": {"gpus-per-node": "h100:2"}}, "must be at most 1 of type h100 in partition gpu.*; got 2"),
        ("gpu", {"gpus_per_run": 4, "memory_gb": 1000}, "no node of partition gpu has 4 GPUs, 8 CPUs and 1000 GB at"),
        ("cpu,plain", {"memory_gb": 60}, "no node of partition cpu,plain has 1 GPUs, 8 CPUs and 60 GB at once"),
        ("long", {"extra": {"mem": "600G"}}, "memory_gb must be at most 500 in partition long.*; got 600"),
    ],
)
def test_what_no_node_has_is_refused(partition: str, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as refused:
        check_nodes(NODES, partition.split(","), SlurmConfig(**given))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("partition", "given"),
    [
        ("gpu", {}),
        ("gpu", {"gpus_per_run": 1, "memory_gb": 1900, "cpus_per_run": 126}),
        ("gpu", {"extra": {"gres": "gpu:A100:4"}}),
        ("plain", {"gpus_per_run": 2, "memory_gb": 32}),
        ("cpu,plain", {"memory_gb": 30}),
        ("long", {"memory_gb": 9999, "extra": {"mem": 0}}),  # all of a node's
        ("long", {"memory_gb": 9999, "extra": {"mem_per_cpu": "4G"}}),
        ("long", {"gpus_per_run": 8, "extra": {"nodes": 2}}),  # SLURM's to divide
        ("secret", {"gpus_per_run": 99}),  # of whose nodes nothing is known
    ],
)
def test_what_fits_or_is_not_known_is_left_to_slurm(partition: str, given: dict[str, Any]) -> None:
    check_nodes(NODES, partition.split(","), SlurmConfig(**given))


def test_a_memory_that_sbatch_reads_otherwise_is_left_to_it() -> None:
    wanted = wanted_by(SlurmConfig(extra={"mem": "lots"}))
    assert wanted is not None and wanted.memory_mib is None


SHARES = shares_in("""\
PartitionName=gpu AllowGroups=ALL Default=YES MaxCPUsPerNode=UNLIMITED MaxTime=UNLIMITED MaxMemPerNode=UNLIMITED
PartitionName=long MaxNodes=UNLIMITED MaxCPUsPerNode=16 MaxTime=UNLIMITED MaxMemPerNode=128000
PartitionName=cpu MaxCPUsPerNode=99 MaxMemPerNode=0
""")
SHARED = [each for node in NODES for each in in_shares(node, SHARES)]


@pytest.mark.parametrize(
    ("partition", "given", "sentence"),
    [
        ("long", {"memory_gb": 126}, "memory_gb must be at most 125 in partition long, where no node gives a run more"),
        ("long", {"cpus_per_run": 17}, "cpus_per_run must be at most 16 in partition long"),
        ("cpu", {"gpus_per_run": 0, "cpus_per_run": 33}, "cpus_per_run must be at most 32 in partition cpu"),
        ("cpu,long", {"cpus_per_run": 32}, "no node of partition cpu,long has 1 GPUs, 32 CPUs and 64 GB at once"),
    ],
)
def test_what_a_partition_gives_no_job_is_refused(partition: str, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_nodes(SHARED, partition.split(","), SlurmConfig(**given))


def test_what_one_partition_gives_another_need_not() -> None:
    """`gpu01` is in two partitions; a run that outgrew its memory gets no more than its partition gives."""
    check_nodes(SHARED, ["gpu"], SlurmConfig(cpus_per_run=64, memory_gb=400))
    check_nodes(SHARED, ["gpu", "long"], SlurmConfig(cpus_per_run=64, memory_gb=400))
    check_nodes(SHARED, ["long"], SlurmConfig(cpus_per_run=16, memory_gb=125))
    assert [most_memory_gb(SHARED, SlurmConfig(partition=name)) for name in ("long", "gpu")] == [125, 1953]
