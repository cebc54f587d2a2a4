"""What is left open is resolved from the machine before a run gets its id."""

from dataclasses import replace

from qlora_lab.config.hardware import Hardware
from qlora_lab.config.resolve import resolve
from qlora_lab.runs.identity import group_id, run_id
from tests.helpers import composed

LAPTOP = Hardware("a laptop", frozenset({"avx2"}), cores=2, gpus=())
SERVER = Hardware("a server", frozenset({"avx512f", "avx512_bf16"}), cores=64, gpus=())
GPU_NODE = replace(SERVER, gpus=("NVIDIA A100",))


def no_file(_: object) -> None:
    return None


def test_compute_dtype_is_what_the_machine_does_well() -> None:
    config = composed()
    assert resolve(config, LAPTOP, no_file).trainer.compute_dtype == "float32"
    assert resolve(config, SERVER, no_file).trainer.compute_dtype == "bfloat16"
    on_gpu = resolve(config, GPU_NODE, no_file).trainer
    assert (on_gpu.device, on_gpu.compute_dtype) == ("cuda", "bfloat16")


def test_a_slurm_run_is_resolved_for_a_gpu_node() -> None:
    assert resolve(composed("launcher=slurm"), LAPTOP, no_file).trainer.device == "cuda"
    assert resolve(composed("launcher=slurm", "launcher.slurm.gpus_per_run=0"), LAPTOP, no_file).trainer.device == "cpu"


def test_what_is_given_is_kept() -> None:
    config = composed("trainer.compute_dtype=float16", "trainer.device=cuda", "trainer.micro_batch_size=2")
    trainer = resolve(config, LAPTOP, no_file).trainer
    assert (trainer.compute_dtype, trainer.device, trainer.micro_batch_size) == ("float16", "cuda", 2)


def test_micro_batch_shrinks_for_long_rows() -> None:
    long_rows = composed("data.max_source_tokens=1000", "data.max_target_tokens=1000", "trainer.batch_size=8")
    assert resolve(composed(), LAPTOP, no_file).trainer.micro_batch_size == 8
    assert resolve(long_rows, LAPTOP, no_file).trainer.micro_batch_size == 2  # 4096 // 2016


def test_the_id_is_a_hash_of_what_can_change_the_result() -> None:
    base = resolve(composed(), LAPTOP, no_file)
    for same in (
        "tracking=none",
        "launcher=in_process",
        "paths.runs_dir=/elsewhere",
        "trainer.checkpoint_every_steps=7",
        "study.question=why",
        "trainer.threads=1",
    ):
        assert run_id(resolve(composed(same), LAPTOP, no_file)) == run_id(base), same
    for other in (
        "seed=1",
        "adapter.rank=4",
        "quant=none",
        "data.rows=64",
        "optim.learning_rate=1e-4",
        "evaluation.rows=64",
        "trainer.micro_batch_size=4",
    ):
        assert run_id(resolve(composed(other), LAPTOP, no_file)) != run_id(base), other
    assert run_id(resolve(composed(), SERVER, no_file)) != run_id(base), "another dtype is another run"


def test_a_group_is_a_run_without_its_seed() -> None:
    first, second = (resolve(composed(f"seed={seed}"), LAPTOP, no_file) for seed in (0, 1))
    assert group_id(first) == group_id(second)
    assert run_id(first) != run_id(second)


def test_changed_data_is_a_new_run_and_moved_data_is_not() -> None:
    def with_file(path: str, sha256: str) -> str:
        config = composed("data.source.kind=file", f"data.source.path={path}", "data.source.template=input_output")
        return run_id(resolve(config, LAPTOP, lambda source: sha256))

    assert with_file("/a/rows.jsonl", "1" * 64) == with_file("/b/rows.jsonl", "1" * 64)
    assert with_file("/a/rows.jsonl", "1" * 64) != with_file("/a/rows.jsonl", "2" * 64)
