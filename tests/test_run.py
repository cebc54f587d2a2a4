"""One run in this process: what is recorded, in which order, and what ends it."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose
from safetensors.torch import load_file

from qlora_lab import run, workbench
from qlora_lab.config.hardware import Hardware
from qlora_lab.config.resolve import resolve
from qlora_lab.errors import ModelError
from qlora_lab.ops.registry import KERNELS
from qlora_lab.runs.folder import FAILED, FINISHED, INTERRUPTED, RUNNING, RunFolder
from qlora_lab.runs.identity import run_id
from qlora_lab.tracking import session as sessions
from qlora_lab.train.__main__ import train
from tests.helpers import TINY, hydra_on_conf, tiny

LAPTOP = Hardware("some CPU", frozenset(), 2, ())
Plan = Callable[..., RunFolder]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Create the folder of a run of three steps over 32 rows."""

    def create(*overrides: str, threads: int | None = 1) -> RunFolder:
        config = tiny(tmp_path, "data.rows=32", "trainer.device=cpu", "evaluation.max_new_tokens=24", *overrides)
        resolved = resolve(config, LAPTOP, lambda source: None)
        resolved = replace(resolved, trainer=replace(resolved.trainer, threads=threads))
        return RunFolder.create(tmp_path, run_id(resolved), resolved)

    return create


def failure(folder: RunFolder) -> str:
    assert run.execute(folder.path) == FAILED
    status = folder.status()
    assert status is not None
    assert not (folder.path / "result.json").exists()
    return str(status["error"]["message"])


def history(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]


def test_a_result_says_what_was_trained_on_and_how_much_is_quantized(plan: Plan) -> None:
    folder = plan("trainer.max_steps=6")  # of 8 rows: one and a half times the 32
    assert run.execute(folder.path) == FINISHED
    result = folder.result()
    assert (result["metrics"]["train/rows_seen"], result["metrics"]["train/epochs"]) == (32, 1.5)
    # q and o, k and v, gate and up and down, in each of two layers
    assert result["quantized_parameters"] == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert result["quantized_share"] == 1.0
    peaks = {name: value for name, value in result["metrics"].items() if name.endswith("peak_rss_bytes")}
    assert set(peaks) == {"train/peak_rss_bytes", "memory/peak_rss_bytes"}
    assert 10**7 < peaks["train/peak_rss_bytes"] <= peaks["memory/peak_rss_bytes"]


def test_bfloat16_adapters_train_and_are_saved_as_such(plan: Plan) -> None:
    folder = plan("adapter.dtype=bfloat16", "optim.learning_rate=1e-2", "trainer.max_steps=12")
    assert run.execute(folder.path) == FINISHED
    losses = [row["train/loss"] for row in history(folder) if "train/loss" in row]
    assert losses[-1] < losses[0]
    saved = load_file(folder.path / "adapter" / "adapter_model.safetensors")
    assert {values.dtype for values in saved.values()} == {torch.bfloat16}


def test_rows_seen_are_distinct(plan: Plan) -> None:
    folder = plan("trainer.max_steps=3")
    assert run.execute(folder.path) == FINISHED
    metrics = folder.result()["metrics"]
    assert (metrics["train/rows_seen"], metrics["train/epochs"]) == (24, 0.75)


class Mirror:
    """A tracking session that fails where it is told to, and sees the run folder as it then is."""

    def __init__(self, folder: RunFolder, fails: str) -> None:
        self.folder = folder
        self.fails = fails
        self.seen: dict[str, tuple[bool, str]] = {}

    def _note(self, name: str) -> None:
        self.seen[name] = (self.folder.path / "result.json").exists(), str((self.folder.status() or {})["state"])
        if name == self.fails:
            raise RuntimeError("the mirror broke")

    def begin(self, summary: dict[str, Any]) -> None:
        assert summary["run"]["status"]["state"] == RUNNING
        self._note("begin")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._note("log")

    def adapter(self, folder: Path) -> None:
        assert (folder / "adapter_config.json").exists()
        self._note("adapter")

    def finish(self, state: str, summary: dict[str, Any]) -> None:
        self._note(f"finish {state}")


@pytest.mark.parametrize("fails", ["nothing", "open", "begin", "log", "adapter", "finish finished"])
def test_tracking_fails_no_run_and_comes_after_the_result(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: str
) -> None:
    folder = plan("tracking=wandb_offline")
    mirror = Mirror(folder, fails)

    def opened(*_: Any) -> Mirror:
        if fails == "open":
            raise RuntimeError("the mirror broke")
        return mirror

    monkeypatch.setattr(sessions, "_open_wandb", opened)
    assert run.execute(folder.path) == FINISHED
    assert folder.state() == FINISHED and folder.result()["metrics"]["eval/loss"] > 0
    assert len(history(folder)) == 4  # three steps and the evaluation
    assert ("tracking stopped (the mirror broke)" in capsys.readouterr().out) == (fails != "nothing")
    if fails == "nothing":
        assert mirror.seen["adapter"] == mirror.seen["finish finished"] == (True, FINISHED)


def test_a_failed_run_ends_its_tracking_as_failed(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = plan("tracking=wandb_offline", threads=None)
    mirror = Mirror(folder, "nothing")
    monkeypatch.setattr(sessions, "_open_wandb", lambda *_: mirror)
    assert "trainer.threads must be resolved" in failure(folder)
    assert mirror.seen == {"finish failed": (False, FAILED)}


def test_weights_spoilt_by_the_last_step_are_no_result(plan: Plan) -> None:
    """The gradients of the only step are finite; its update is not."""
    folder = plan("trainer.max_steps=1", "optim.learning_rate=1e39", "optim.warmup_share=0", "optim.schedule=constant")
    message = failure(folder)
    assert message.startswith("training stopped after step 1: ") and "lora_" in message and "is not finite" in message
    assert not list(folder.checkpoints.glob("step_*"))


def test_a_loss_that_is_not_finite_is_no_result(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    save = run._save_weights

    def save_and_spoil(bench: run.Workbench, *others: Any) -> str:
        checksum = save(bench, *others)
        bench.model.model.norm.weight.data.fill_(float("nan"))
        return checksum

    monkeypatch.setattr(run, "_save_weights", save_and_spoil)
    assert "eval/loss is not finite: 16 of 16 held-out rows" in failure(plan())


def test_a_failure_is_recorded_with_its_traceback(plan: Plan) -> None:
    folder = plan("optim.learning_rate=1e30", "optim.max_grad_norm=1e30", "trainer.max_steps=20")
    assert "is not finite" in failure(folder)
    status = folder.status()
    assert status is not None and (status["cause"], status["error"]["type"]) == ("nan", "TrainingError")
    assert "Traceback" in status["error"]["traceback"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"input": "a", "output": "b"}\n{"input": "c", "outp', "line 2"),
        ("", "empty"),
        ('{"input": "a", "output": ""}\n' * 3, "target"),
    ],
    ids=["broken row", "empty file", "no target left"],
)
def test_bad_data_is_named(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, sentence: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    source = ("data=file", f"data.source.path={file}", "data.source.template=input_output", "evaluation.rows=1")
    message = failure(plan(*source))
    assert sentence in message and file.name in message
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("state", "status"), [(FAILED, 1), (INTERRUPTED, 143)])
def test_the_command_exits_with_the_state_of_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, status: int
) -> None:
    monkeypatch.setattr(run, "execute", lambda *_: state)
    with hydra_on_conf():
        node = compose("train", [*TINY, f"paths.runs_dir={tmp_path}"])
    with pytest.raises(SystemExit) as end:
        train(node)
    assert end.value.code == status


def interrupted_in_its_last_evaluation(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Execute a run with before_training until training is done, and press Ctrl-C."""
    evaluate, calls = run._evaluate, []

    def second_time_interrupted(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*given)

    with monkeypatch.context() as patched:
        patched.setattr(run, "_evaluate", second_time_interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.execute(folder.path)
    assert folder.state() == INTERRUPTED


def test_evaluation_before_training_is_done_once(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = plan("evaluation.before_training=true")
    interrupted_in_its_last_evaluation(folder, monkeypatch)
    assert run.execute(folder.path) == FINISHED
    evaluated = [line["step"] for line in history(folder) if "eval/loss" in line]
    assert evaluated == [0, 3]
    assert "train/peak_rss_bytes" not in folder.result()["metrics"]  # this attempt trained nothing


def test_time_is_that_of_all_attempts(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = plan("evaluation.before_training=true")
    interrupted_in_its_last_evaluation(folder, monkeypatch)
    status = folder.status()
    assert status is not None and status["elapsed_s"] >= history(folder)[-1]["time_s"] > 0
    (folder.path / "status.json").write_text(json.dumps({**status, "elapsed_s": 1000.0}))
    assert run.execute(folder.path) == FINISHED
    metrics = folder.result()["metrics"]
    assert 1000 < metrics["run/time_s"] < 1100 and metrics["train/time_s"] < 100
    assert history(folder)[-1]["time_s"] > 1000


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
def test_full_fine_tuning_computes_in_the_dtype_it_records(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, compute_dtype: str
) -> None:
    folder = plan("adapter=none", "quant=none", f"trainer.compute_dtype={compute_dtype}")
    build, seen = run.build, set()
    stages: list[run.Workbench] = []

    def hooked(config: Any, *given: Any) -> run.Workbench:
        bench = build(config, *given)
        down_proj = bench.model.model.layers[0].mlp.down_proj
        down_proj.register_forward_hook(lambda module, _, output: seen.add((module.training, output.dtype)))
        stages.append(bench)
        return bench

    monkeypatch.setattr(run, "build", hooked)
    assert run.execute(folder.path) == FINISHED
    dtype = run.DTYPES[compute_dtype]
    assert seen == {(True, dtype), (False, dtype)}
    assert {parameter.dtype for parameter in stages[0].model.parameters()} == {torch.float32}
    environment = folder.environment()
    assert environment is not None and environment["compute_dtype"] == compute_dtype
    assert environment["attention_and_head_dtype"] in ("float32", compute_dtype)


def test_the_output_head_is_checked_also_where_nothing_is_trained(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ModelError("this head does more")

    monkeypatch.setattr(workbench, "check_output_head", refuse)
    assert failure(plan("trainer.max_steps=0")) == "this head does more"


def test_a_package_that_a_benchmark_lacks_is_told_before_training(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    folder = plan("evaluation=super_ni")
    assert "needs the package rouge-score" in failure(folder)
    assert not folder.adapter.exists()


def test_a_model_that_changed_since_the_plan_is_refused(plan: Plan, tmp_path: Path) -> None:
    folder = plan(f"model.tokenizer={tmp_path / 'tokenizer'}", f"model.content_sha256={'1' * 64}")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    assert "the model tiny_random has changed since this run was planned" in failure(folder)


def test_kernels_and_little_quantization_are_said(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    """A mixture of experts: transformers fuses the experts into one tensor, which no linear layer holds."""
    folder = plan()
    share = workbench.QuantizedShare(quantized=100, matrices=1000)
    bench = replace(run.build(folder.config()), quantized=share)
    capsys.readouterr()
    workbench.say_what_was_built(bench, folder.config(), folder.run_id)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3
    assert said[0] == f"run {folder.run_id}: kernels: {KERNELS}"
    assert "only 10% of the 1,000 matrix weights outside embeddings and head are quantized" in said[2]


def test_kernels_that_were_asked_for_and_are_not_there_are_refused(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = replace(run.KERNELS, reason="no libqlk_cpu.so in /kernels", asked="QLORA_LAB_KERNELS=/kernels")
    monkeypatch.setattr(run, "KERNELS", missing)
    assert "QLORA_LAB_KERNELS=/kernels: no libqlk_cpu.so in /kernels; unset it" in failure(plan())


def test_a_run_that_the_process_is_told_to_leave_is_interrupted(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """As submitit does when SLURM preempts a job, after it has put the job into the queue again."""
    folder = plan()

    def leave(*_: Any) -> Any:
        raise SystemExit(-1)

    monkeypatch.setattr(run, "_execute", leave)
    with pytest.raises(SystemExit):
        run.execute(folder.path)
    status = folder.status()
    assert folder.state() == INTERRUPTED and status is not None and status["error"]["type"] == "SystemExit"


def test_a_run_that_failed_while_another_process_waited_is_not_executed_again(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = plan()
    executed = []

    def fail(*_: Any) -> Any:
        executed.append(folder.attempts())
        raise ModelError("no such model")

    monkeypatch.setattr(run, "_execute", fail)
    assert run.execute(folder.path, 0) == FAILED
    assert run.execute(folder.path, 0) == FAILED  # it was decided on before the first began
    assert executed == [1]
    assert run.execute(folder.path, 1) == FAILED  # and this one after that
    assert executed == [1, 2]
    folder.end(INTERRUPTED, 1.0)
    assert run.execute(folder.path, 0) == FAILED  # only what failed has been executed to its end
    assert executed == [1, 2, 3]
