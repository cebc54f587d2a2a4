"""What the nodes of a site have for a job, as `scontrol` tells it, and whether any of them has what a job asks for."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qlora_lab.config.schema import SlurmConfig
from qlora_lab.errors import ConfigError, LaunchError
from qlora_lab.sweep.listing import listed
from qlora_lab.sweep.slurm.commands import UnreachableError, run

ANY_TYPE = ""  # of GPUs, where the site tells no types
GPU_OPTIONS = ("gpus-per-node", "gpus", "gpus-per-task")  # of sbatch, besides gres
SHAPES = ("nodes", "ntasks", "ntasks-per-node", "hint", "exclusive")  # options with which a job is not one plain task
MIB_OF = {"": 1.0, "K": 2**-10, "M": 1.0, "G": 2.0**10, "T": 2.0**20}  # as sbatch reads --mem


@dataclass(frozen=True)
class Node:
    """One node, whatever state it is in, and what a job may have of it in some of its partitions.

    Attributes:
        host, address: of the machine that it is.
        gpus: by their type, ANY_TYPE where the site names none.
    """

    name: str
    host: str
    address: str
    partitions: frozenset[str]
    cpus: int
    memory_mib: int
    gpus: Mapping[str, int] = field(default_factory=dict)

    def number_of_gpus(self, kind: str | None) -> int:
        """Return how many GPUs of a type it has; None: of any."""
        return sum(count for name, count in self.gpus.items() if kind is None or name.lower() == kind.lower())


@dataclass(frozen=True)
class Share:
    """The most that a job may have of any one node in a partition; None where the node is the limit."""

    cpus: int | None = None
    memory_mib: int | None = None

    def of(self, node: Node, partition: str) -> Node:
        """Return what is left of a node for a job of the partition."""
        cpus = node.cpus if self.cpus is None else min(self.cpus, node.cpus)
        memory_mib = node.memory_mib if self.memory_mib is None else min(self.memory_mib, node.memory_mib)
        return replace(node, partitions=frozenset({partition}), cpus=cpus, memory_mib=memory_mib)


@dataclass(frozen=True)
class Wanted:
    """What one task asks of its node; None where options of sbatch leave it open."""

    cpus: int
    memory_mib: float | None
    gpus: int
    gpu_type: str | None


def site_nodes() -> list[Node]:
    """Return the nodes that SLURM tells of; a site may keep them to itself.

    A node appears again for each partition that does not let a job have all of it.

    Raises:
        UnreachableError: the controller does not answer.
    """
    nodes, shares = nodes_in(_told_of("node")), shares_in(_told_of("partition"))
    return [each for node in nodes for each in in_shares(node, shares)]


def _told_of(what: str) -> str:
    try:
        return run("scontrol", "--oneliner", "show", what)
    except UnreachableError:
        raise
    except LaunchError:
        return ""


def in_shares(node: Node, shares: Mapping[str, Share]) -> list[Node]:
    """Return a node as it is in partitions without a share, and its share in each of the others."""
    whole = node.partitions - set(shares)
    limited = [shares[name].of(node, name) for name in sorted(node.partitions & set(shares))]
    return [*([replace(node, partitions=whole)] if whole or not limited else []), *limited]


def shares_in(text: str) -> dict[str, Share]:
    """Read the partitions that have limits from what `scontrol --oneliner show partition` prints."""
    found = {}
    for words in _words_of_lines(text):
        cpus, memory_mib = (_limit(words.get(key, "")) for key in ("MaxCPUsPerNode", "MaxMemPerNode"))
        if "PartitionName" in words and (cpus or memory_mib):
            found[words["PartitionName"]] = Share(cpus, memory_mib)
    return found


def _limit(text: str) -> int | None:
    """Return a limit; None for UNLIMITED, and 0, which means the same."""
    return int(text) or None if text.isdigit() else None


def _words_of_lines(text: str) -> list[dict[str, str]]:
    return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines()]


def nodes_in(text: str) -> list[Node]:
    """Read what `scontrol --oneliner show node` prints."""
    return [
        Node(
            name=words["NodeName"],
            host=words.get("NodeHostName", ""),
            address=words.get("NodeAddr", ""),
            partitions=frozenset(words.get("Partitions", "").split(",")) - {""},
            cpus=int(words.get("CPUEfctv") or words.get("CPUTot") or 0),
            memory_mib=int(words.get("RealMemory") or 0) - int(words.get("MemSpecLimit") or 0),
            gpus=gpus_in(words.get("Gres", "")),
        )
        for words in _words_of_lines(text)
        if "NodeName" in words
    ]


def gpus_in(gres: str) -> dict[str, int]:
    """Return the GPUs among generic resources, by type.

    Example:
        >>> gpus_in("gpu:a100:4(S:0,1),gpu:2,shard:8")
        {'a100': 4, '': 2}
    """
    found: dict[str, int] = {}
    for each in re.sub(r"\([^)]*\)", "", gres).split(","):
        name, *rest = each.split(":")
        if name == "gpu":
            kind, count = _type_and_count(rest)
            found[kind or ANY_TYPE] = found.get(kind or ANY_TYPE, 0) + count
    return found


def wanted_by(slurm: SlurmConfig) -> Wanted | None:
    """Return what a task asks for, launcher.slurm.extra included; None where it asks for more than one plain task."""
    extra: dict[str, Any] = {key.replace("_", "-"): value for key, value in slurm.extra.items()}
    if any(option in extra for option in SHAPES):
        return None
    memory: float | None = slurm.memory_gb * 1024.0
    if "mem" in extra:
        match = re.fullmatch(r"([\d.]+)([KMGT]?)B?", str(extra["mem"]).upper())
        memory = float(match[1]) * MIB_OF[match[2]] if match else None
    elif "mem-per-cpu" in extra or "mem-per-gpu" in extra:
        memory = None
    asked = [_type_and_count(str(extra[option]).split(":")) for option in GPU_OPTIONS if option in extra]
    asked += [
        (None if kind == ANY_TYPE else kind, count) for kind, count in gpus_in(str(extra.get("gres", ""))).items()
    ]
    return Wanted(
        cpus=int(extra.get("cpus-per-task", slurm.cpus_per_run)),
        memory_mib=memory,
        gpus=max([slurm.gpus_per_run, *(count for _, count in asked)]),
        gpu_type=next((kind for kind, _ in asked if kind), None),
    )


def check_nodes(nodes: Sequence[Node], partitions: Sequence[str], slurm: SlurmConfig) -> None:
    """Refuse what no node of these partitions has, which would wait for ever or be refused by sbatch.

    Raises:
        ConfigError: with what there is.
    """
    wanted, there = wanted_by(slurm), [node for node in nodes if node.partitions & set(partitions)]
    if wanted is None or not there:
        return
    place = f"partition {','.join(partitions)}"
    if wanted.gpus:
        _check_gpus(there, nodes, place, wanted)
    _check_most("cpus_per_run", wanted.cpus, max(node.cpus for node in there), place)
    if wanted.memory_mib is not None:
        most = max(node.memory_mib for node in there)
        _check_most("memory_gb", wanted.memory_mib / 1024, most / 1024, place)
    if not any(_fits(node, wanted) for node in there):
        memory = f" and {wanted.memory_mib / 1024:g} GB" if wanted.memory_mib is not None else ""
        raise ConfigError(
            f"no node of {place} has {wanted.gpus} GPUs, {wanted.cpus} CPUs{memory} at once, as launcher.slurm asks "
            f"for each run; it has {', '.join(listed(_kinds(there), 4, 'kinds of nodes'))}"
        )


def most_memory_gb(nodes: Sequence[Node], slurm: SlurmConfig) -> int | None:
    """Return the memory of the largest node that has what else a task asks for, in GB; None where none is known.

    Without a partition all nodes count: which one sbatch takes by itself is not in what nodes tell.
    """
    wanted = wanted_by(slurm)
    if wanted is None:
        return None
    names = set(slurm.partition.split(",")) if slurm.partition is not None else None
    there = [node for node in nodes if names is None or node.partitions & names]
    fitting = [node for node in there if _fits(node, replace(wanted, memory_mib=None))]
    return max((node.memory_mib // 1024 for node in fitting), default=None)


def _check_gpus(there: Sequence[Node], everywhere: Sequence[Node], place: str, wanted: Wanted) -> None:
    kinds = dict.fromkeys(kind for node in there for kind in node.gpus)
    if not kinds:
        others = sorted({name for node in everywhere if node.gpus for name in node.partitions})
        elsewhere = f"the partitions with some are {', '.join(others)}" if others else "no partition of this site has"
        raise ConfigError(
            f"launcher.slurm.gpus_per_run must be 0 in {place}, which has no GPUs; got {wanted.gpus}; {elsewhere}"
        )
    if wanted.gpu_type is not None and not any(node.number_of_gpus(wanted.gpu_type) for node in there):
        named = ", ".join(filter(None, kinds)) or "GPUs without a type"
        raise ConfigError(
            f"launcher.slurm.extra asks for GPUs of type '{wanted.gpu_type}', and {place} has none; it has {named}"
        )
    most = max(node.number_of_gpus(wanted.gpu_type) for node in there)
    _check_most("gpus_per_run", wanted.gpus, most, place, f" of type {wanted.gpu_type}" if wanted.gpu_type else "")


def _check_most(key: str, asked: float, most: float, place: str, what: str = "") -> None:
    if asked > most:
        raise ConfigError(
            f"launcher.slurm.{key} must be at most {int(most)}{what} in {place}, where no node gives a run more; got "
            f"{asked:g}"
        )


def _fits(node: Node, wanted: Wanted) -> bool:
    return (
        node.cpus >= wanted.cpus
        and node.memory_mib >= (wanted.memory_mib or 0)
        and node.number_of_gpus(wanted.gpu_type) >= wanted.gpus
    )


def _kinds(nodes: Iterable[Node]) -> list[str]:
    """Return each kind of node in words."""
    words = []
    for node in nodes:
        gpus = " + ".join(f"{count} GPUs{f' {kind}' if kind else ''}" for kind, count in node.gpus.items()) or "no GPUs"
        words.append(f"{gpus}, {node.cpus} CPUs and {node.memory_mib / 1024:.0f} GB")
    return [f"nodes of {kind}" for kind in dict.fromkeys(words)]


def _type_and_count(words: Sequence[str]) -> tuple[str | None, int]:
    """Read `[TYPE:]COUNT` or a type alone, which is one."""
    *kind, last = words or ["1"]
    if last.isdigit():
        return (kind[0] if kind else None), int(last)
    return last, 1
