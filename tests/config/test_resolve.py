"""What is left open is resolved from the machine before a run gets its id."""

from dataclasses import asdict, replace

import pytest

from qlora_lab.config.hardware import Hardware
from qlora_lab.config.load import from_plain
from qlora_lab.config.resolve import resolve
from qlora_lab.config.schema import ModelConfig, RunConfig
from qlora_lab.errors import ConfigError
from qlora_lab.runs.identity import run_id
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
    left_to_the_planner = resolve(composed("trainer.micro_batch_size=auto"), LAPTOP, no_file)
    assert left_to_the_planner.trainer.micro_batch_size == "auto"


def test_the_id_is_a_hash_of_what_can_change_the_result() -> None:
    base = resolve(composed(), LAPTOP, no_file)
    for same in (
        "tracking=none",
        "launcher=in_process",
        "paths.runs_dir=/elsewhere",
        "trainer.checkpoint_every_steps=7",
        "study.question=why",
        "trainer.threads=1",
        "trainer.micro_batch_size=4",
        "launcher.gpu_memory_gb=24",
        "data.name=mine",
        "model.name=mine",
    ):
        assert run_id(resolve(composed(same), LAPTOP, no_file)) == run_id(base), same
    for other in (
        "seed=1",
        "adapter.rank=4",
        "quant=none",
        "data.rows=64",
        "optim.learning_rate=1e-4",
        "evaluation.rows=64",
    ):
        assert run_id(resolve(composed(other), LAPTOP, no_file)) != run_id(base), other
    assert run_id(resolve(composed(), SERVER, no_file)) != run_id(base), "another dtype is another run"


@pytest.mark.parametrize(
    ("group", "without_effect"),
    [
        (["quant=none"], ["quant.block_size=128", "quant.double_quant_block_size=64"]),
        (["quant.double_quant=false"], ["quant.double_quant_block_size=64"]),
        (["quant=none", "adapter=none"], ["adapter.rank=3", "adapter.alpha=2", "adapter.last_k_layers=1"]),
    ],
)
def test_what_has_no_effect_changes_no_id(group: list[str], without_effect: list[str]) -> None:
    base = run_id(resolve(composed(*group), LAPTOP, no_file))
    assert base != run_id(resolve(composed(), LAPTOP, no_file))
    for override in without_effect:
        assert run_id(resolve(composed(*group, override), LAPTOP, no_file)) == base, override
    assert run_id(resolve(composed(without_effect[0]), LAPTOP, no_file)) != run_id(resolve(composed(), LAPTOP, no_file))


def test_changed_data_is_a_new_run_and_moved_data_is_not() -> None:
    def with_file(path: str, sha256: str) -> str:
        config = composed("data.source.kind=file", f"data.source.path={path}", "data.source.template=input_output")
        return run_id(resolve(config, LAPTOP, lambda source: sha256))

    assert with_file("/a/rows.jsonl", "1" * 64) == with_file("/b/rows.jsonl", "1" * 64)
    assert with_file("/a/rows.jsonl", "1" * 64) != with_file("/a/rows.jsonl", "2" * 64)


def test_what_describes_a_set_changes_no_id() -> None:
    base = run_id(resolve(composed("data=dolly"), LAPTOP, no_file))
    described = ("data.source.licence=other", "data.source.published_rows=1")
    assert run_id(resolve(composed("data=dolly", *described), LAPTOP, no_file)) == base
    assert run_id(resolve(composed("data=dolly", "data.source.hub_files=one.json"), LAPTOP, no_file)) != base


def test_changed_weights_are_a_new_run_and_a_moved_model_is_not() -> None:
    def with_model(path: str, sha256: str) -> str:
        config = composed("model=folder", f"model.path={path}", "model.name=mine")
        return run_id(resolve(config, LAPTOP, lambda source: sha256 if isinstance(source, ModelConfig) else None))

    assert with_model("/a/model", "1" * 64) == with_model("/b/model", "1" * 64)
    assert with_model("/a/model", "1" * 64) != with_model("/a/model", "2" * 64)


def test_a_branch_that_can_move_is_warned_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        resolve(composed("model=hub", "model.hub_id=some/moving-model", "data=alpaca"), LAPTOP, no_file)
    said = capsys.readouterr().err
    assert said.count("'some/moving-model' has no revision") == 1
    assert said.count("has no revision") == 2  # that of the data set too
    resolve(composed("data=hub", "data.source.hub_id=a/copied-set", "data.source.path=a.csv"), LAPTOP, no_file)
    assert "copied-set" not in capsys.readouterr().err
    resolve(composed("model=hub", "model.hub_id=a/fixed-model", "model.revision=abc123"), LAPTOP, no_file)
    not_read = ("model=llama_7b", "model.source=random", "model.tokenizer=byte_level")
    resolve(composed(*not_read), LAPTOP, no_file)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.max_length_tokens=513", r"must be at most model\.architecture\.max_position \(512\); got 513"),
        (
            "evaluation.max_source_tokens=400",
            r"evaluation\.max_target_tokens must fit model\.max_length_tokens \(512\)",
        ),
        ("evaluation.max_new_tokens=300", r"evaluation\.max_new_tokens must fit .* got 256 \+ 300"),
        ("evaluation.max_target_tokens=1", r"evaluation\.max_target_tokens must be 2 or more"),
    ],
)
def test_what_cannot_be_is_refused(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        composed("model=tiny_random", override)


def with_set(name: str, **values: object) -> RunConfig:
    """Return a configuration with an evaluation set, as a study file would give it."""
    plain = asdict(composed("model=tiny_random"))
    plain["evaluation"]["sets"] = {name: {"kind": "procedural", "template": "procedural", **values}}
    return from_plain(plain)


def test_a_set_says_whether_its_targets_are_exact() -> None:
    for exact in (True, False):
        assert (
            resolve(with_set("sums", exact_match=exact), LAPTOP, no_file).evaluation.sets["sums"].exact_match is exact
        )
    assert with_set("sums").evaluation.sets["sums"].exact_match is False


def test_the_name_of_rows_held_out_of_the_runs_own_data_is_reserved() -> None:
    with pytest.raises(ConfigError, match="must not name a set 'held_out'"):
        with_set("held_out")


def test_instruction_sets_are_scored_at_96_tokens_in_their_study() -> None:
    evaluation = composed("+experiment=instruction_data", "data=alpaca_slice").evaluation
    assert (evaluation.max_source_tokens, evaluation.max_target_tokens) == (96, 96)
    assert set(evaluation.sets) == {"chat", "tasks", "instructions"}
