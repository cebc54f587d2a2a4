"""Training from end to end on a tiny model: stopping, going on, and ending with the same bits."""

import logging
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qlora_lab.config.schema import OptimConfig, TrainerConfig
from qlora_lab.errors import ConfigError, RunFolderError, TrainingError
from qlora_lab.train.checkpoint import load_newest
from qlora_lab.train.fit import FitResult, TrainingInterrupted, fit
from qlora_lab.train.progress import NoProgress

PLAN = [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17], [18, 19, 20, 21, 22, 23]]
OPTIM = OptimConfig(learning_rate=1e-2, weight_decay=0.01, schedule="cosine", warmup_share=0.3, max_grad_norm=1.0)


class Recorder:
    """Keeps the metrics by step, and does something after one of them."""

    def __init__(self, at_step: int = 0, action: Callable[[], object] = lambda: None) -> None:
        self.steps: dict[int, dict[str, float]] = {}
        self.at_step = at_step
        self.action = action

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        self.steps[step] = metrics
        if step == self.at_step:
            self.action()


def train(
    model: Any, examples: Any, folder: Path, *, record: Recorder | None = None, plan: Any = PLAN, **options: Any
) -> FitResult:
    trainer = TrainerConfig(
        micro_batch_size=2,
        batch_size=4,
        checkpoint_every_steps=options.pop("every", 2),
        keep_checkpoints=options.pop("keep", 2),
        log_every_steps=options.pop("log_every", 1),
        gradient_checkpointing=options.pop("gradient_checkpointing", False),
        offload_activations=options.pop("offload_activations", False),
        loss_chunk_tokens=4,
    )
    return fit(
        model,
        examples,
        plan,
        optim=OPTIM,
        trainer=trainer,
        pad_id=0,
        seed=options.pop("seed", 11),
        checkpoints=folder,
        record=record or Recorder(),
        **options,
    )


def weights(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters()}


def assert_same_end(folder: Path, other: Path) -> None:
    """Parameters, optimizer states and random states of two runs' last checkpoints are the same bits."""
    first, second = load_newest(folder), load_newest(other)
    assert first is not None and second is not None
    assert first.counters.step == second.counters.step == len(PLAN)
    assert first.counters.tokens == second.counters.tokens
    for name, value in first.parameters.items():
        assert torch.equal(second.parameters[name], value), name
        for key, tensor in first.optimizer[name].items():
            assert torch.equal(second.optimizer[name][key], tensor), (name, key)
    assert torch.equal(first.rng.torch_cpu, second.rng.torch_cpu)
    assert first.rng.numpy == second.rng.numpy and first.rng.python == second.rng.python


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """Signals as in a terminal: a background process of a shell would start with Ctrl-C ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def uninterrupted(make_model: Any, examples: Any, tmp_path: Path) -> Path:
    """Checkpoints of a run with dropout that nothing disturbed."""
    folder = tmp_path / "uninterrupted"
    train(make_model(attention_dropout=0.2), examples, folder)
    return folder


@pytest.mark.parametrize("stopped_after", [1, 3, 5])
def test_a_run_that_stops_and_goes_on_ends_with_the_same_bits(
    make_model: Any, examples: Any, tmp_path: Path, uninterrupted: Path, stopped_after: int
) -> None:
    record = Recorder()
    model = make_model(attention_dropout=0.2)
    with pytest.raises(TrainingInterrupted, match=rf"after step {stopped_after} of 6, which is saved"):
        train(model, examples, tmp_path / "run", record=record, stop=lambda: len(record.steps) == stopped_after)
    assert list(record.steps) == list(range(1, stopped_after + 1))

    torch.manual_seed(123), random.seed(123), np.random.seed(123)  # another process
    record = Recorder()
    model = make_model(attention_dropout=0.2)
    result = train(model, examples, tmp_path / "run", record=record)
    assert result.resumed_from == stopped_after and result.steps == 6
    assert list(record.steps) == list(range(stopped_after + 1, 7))
    assert_same_end(uninterrupted, tmp_path / "run")


def test_a_run_that_died_repeats_the_steps_since_its_checkpoint(
    make_model: Any, examples: Any, tmp_path: Path, uninterrupted: Path
) -> None:
    def die() -> None:
        raise MemoryError

    threads = threading.active_count()
    with pytest.raises(MemoryError):
        train(make_model(attention_dropout=0.2), examples, tmp_path / "run", record=Recorder(5, die))
    assert threading.active_count() == threads
    record = Recorder()
    result = train(make_model(attention_dropout=0.2), examples, tmp_path / "run", record=record)
    assert result.resumed_from == 4 and list(record.steps) == [5, 6]
    assert_same_end(uninterrupted, tmp_path / "run")


def test_dropout_is_drawn_from_the_seed(make_model: Any, examples: Any, tmp_path: Path, uninterrupted: Path) -> None:
    train(make_model(attention_dropout=0.2), examples, tmp_path / "same")
    assert_same_end(uninterrupted, tmp_path / "same")
    train(make_model(attention_dropout=0.2), examples, tmp_path / "other", seed=12)
    first, other = load_newest(uninterrupted), load_newest(tmp_path / "other")
    assert first is not None and other is not None
    assert all(not torch.equal(other.parameters[name], value) for name, value in first.parameters.items())


def test_a_finished_run_is_not_trained_again(make_model: Any, examples: Any, tmp_path: Path) -> None:
    model = make_model()
    first = train(model, examples, tmp_path)
    assert first.resumed_from is None and first.steps == 6 and first.time_s > 0
    record = Recorder()
    fresh = make_model()
    again = train(fresh, examples, tmp_path, record=record)
    assert again.resumed_from == 6 and not record.steps
    assert (again.steps, again.tokens, again.target_tokens) == (6, first.tokens, first.target_tokens)
    for name, weight in weights(model).items():
        assert torch.equal(weights(fresh)[name], weight), name


def test_training_learns_and_records_every_metric(make_model: Any, examples: Any, tmp_path: Path) -> None:
    record = Recorder()
    plan = [list(range(24))] * 8
    result = train(make_model(), examples, tmp_path, record=record, plan=plan)
    assert set(record.steps[1]) == {
        "train/loss",
        "train/loss_len_le_32",
        "train/grad_norm",
        "train/learning_rate",
        "train/tokens",
        "train/target_tokens",
        "train/step_time_s",
        "train/tokens_per_s",
    }
    assert record.steps[8]["train/loss"] < record.steps[1]["train/loss"] - 0.2
    assert result.tokens == record.steps[8]["train/tokens"] == 8 * sum(example.length for example in examples)
    # 8 steps, warm-up of ceil(2.4) = 3: a quarter, a half, three quarters, then all of it
    rates = [record.steps[step]["train/learning_rate"] for step in (1, 2, 3, 4)]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01])


def test_metrics_are_recorded_as_often_as_asked(make_model: Any, examples: Any, tmp_path: Path) -> None:
    record = Recorder()
    train(make_model(), examples, tmp_path, record=record, log_every=4)
    assert list(record.steps) == [1, 4, 6]


def test_checkpoints_are_kept_as_configured(make_model: Any, examples: Any, tmp_path: Path) -> None:
    train(make_model(), examples, tmp_path, every=2, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000004", "step_000006"]


def test_no_steps_are_no_training(make_model: Any, examples: Any, tmp_path: Path) -> None:
    result = train(make_model(), examples, tmp_path, plan=[])
    assert result == FitResult(0, 0, 0, 0.0, None, result.optimizer) and result.optimizer.startswith("AdamW, 32-bit")


def test_the_model_is_left_in_evaluation_mode_and_quietly(
    make_model: Any,
    examples: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    srun = tmp_path / "bin" / "srun"  # Lightning looks for one, and has a word to say
    srun.parent.mkdir()
    srun.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(srun.parent), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    model = make_model()
    train(model, examples, tmp_path / "run", gradient_checkpointing=True)
    assert not any(module.training for module in model.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert capfd.readouterr() == ("", "")
    assert [str(warning.message) for warning in recwarn] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "run"], "Lightning wrote something"


def test_gradient_checkpointing_trains_the_same(make_model: Any, examples: Any, tmp_path: Path) -> None:
    plain, checkpointed = make_model(attention_dropout=0.2), make_model(attention_dropout=0.2)
    before = {name: weight.clone() for name, weight in weights(plain).items()}
    train(plain, examples, tmp_path / "plain")
    train(checkpointed, examples, tmp_path / "checkpointed", gradient_checkpointing=True)
    for name, weight in checkpointed.named_parameters():
        torch.testing.assert_close(weight, plain.get_parameter(name))
        assert torch.equal(weight, before[name]) != weight.requires_grad, f"{name} moved, or did not"


def test_ctrl_c_finishes_and_saves_the_step(make_model: Any, examples: Any, tmp_path: Path) -> None:
    record = Recorder(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(make_model(), examples, tmp_path, record=record, every=100)
    assert list(record.steps) == [1, 2, 3]
    checkpoint = load_newest(tmp_path)
    assert checkpoint is not None and checkpoint.counters.step == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_stops_at_once(make_model: Any, examples: Any, tmp_path: Path) -> None:
    def press_twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(make_model(), examples, tmp_path, record=Recorder(3, press_twice), every=2)
    checkpoint = load_newest(tmp_path)
    assert checkpoint is not None and checkpoint.counters.step == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_the_last_step_does_not_go_unnoticed(make_model: Any, examples: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(make_model(), examples, tmp_path, record=Recorder(6, lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert train(make_model(), examples, tmp_path).resumed_from == 6


class CtrlCAtTheEnd(NoProgress):
    def close(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_after_the_last_step_does_not_go_unnoticed(make_model: Any, examples: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(make_model(), examples, tmp_path, progress=CtrlCAtTheEnd())


def test_a_handler_of_the_callers_is_left_alone(make_model: Any, examples: Any, tmp_path: Path) -> None:
    pressed = []
    signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    train(make_model(), examples, tmp_path, record=Recorder(3, lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert pressed == [True]


def test_sigterm_stops_after_the_step(make_model: Any, examples: Any, tmp_path: Path) -> None:
    record = Recorder(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TrainingInterrupted, match="after step 3 of 6"):
        train(make_model(), examples, tmp_path, record=record, every=100)
    assert train(make_model(), examples, tmp_path).resumed_from == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_lightning_does_not_take_over_requeuing_under_slurm(
    make_model: Any, examples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "run"}.items():
        monkeypatch.setenv(name, value)
    handlers = []
    record = Recorder(3, lambda: handlers.append(signal.getsignal(signal.SIGUSR1)))
    train(make_model(), examples, tmp_path, record=record)
    assert handlers == [signal.SIG_DFL]


def test_a_weight_gone_bad_stops_training_and_names_the_step(make_model: Any, examples: Any, tmp_path: Path) -> None:
    model = make_model()
    record = Recorder(3, lambda: model.model.norm.weight.data.fill_(float("nan")))
    with pytest.raises(TrainingError, match="stopped at step 4: loss is not finite"):
        train(model, examples, tmp_path, record=record)
    checkpoint = load_newest(tmp_path)
    assert checkpoint is not None and checkpoint.counters.step == 2


@pytest.mark.parametrize("step", [2, 3, 6])
def test_a_step_that_spoils_the_weights_is_never_saved(
    make_model: Any, examples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Loss and gradients of the step are finite: only its update is not, and after the last no other step follows."""
    model = make_model()
    name, weight = next((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
    record = Recorder(step, lambda: weight.data.view(-1)[3:4].fill_(float("inf")))
    after, every = {2: ("step 2", 2), 3: ("step 3", 3), 6: ("step 6", 4)}[step]
    with pytest.raises(TrainingError, match=rf"training stopped after {after}: {name} is not finite"):
        train(model, examples, tmp_path, record=record, every=every)
    checkpoint = load_newest(tmp_path)
    assert (0 if checkpoint is None else checkpoint.counters.step) == {2: 0, 3: 0, 6: 4}[step]


def test_weights_are_checked_where_no_step_is_left(make_model: Any, examples: Any, tmp_path: Path) -> None:
    model = make_model()
    next(weight for weight in model.parameters() if weight.requires_grad).data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="training stopped after step 0"):
        train(model, examples, tmp_path, plan=[])


def test_forward_passes_run_in_the_context_given(make_model: Any, examples: Any, tmp_path: Path) -> None:
    def low_precision() -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    exact, coarse = Recorder(), Recorder()
    train(make_model(), examples, tmp_path / "exact", record=exact)
    train(make_model(), examples, tmp_path / "coarse", record=coarse, forward_context=low_precision)
    for step in exact.steps:
        assert coarse.steps[step]["train/loss"] != exact.steps[step]["train/loss"]
        # products carry 8 bits
        assert coarse.steps[step]["train/loss"] == pytest.approx(exact.steps[step]["train/loss"], rel=0.02)


def test_a_damaged_checkpoint_is_passed_over(
    make_model: Any, examples: Any, tmp_path: Path, uninterrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(attention_dropout=0.2)
    train(model, examples, tmp_path / "run")
    (tmp_path / "run" / "step_000006" / "optimizer.safetensors").write_bytes(b"cut")
    with caplog.at_level(logging.WARNING):
        result = train(make_model(attention_dropout=0.2), examples, tmp_path / "run")
    assert result.resumed_from == 4 and "checkpoint of step 6 is damaged" in caplog.text
    assert_same_end(uninterrupted, tmp_path / "run")


def test_a_checkpoint_beyond_the_plan_is_of_another_run(make_model: Any, examples: Any, tmp_path: Path) -> None:
    train(make_model(), examples, tmp_path)
    with pytest.raises(RunFolderError, match="step 6 and the plan has 3"):
        train(make_model(), examples, tmp_path, plan=PLAN[:3])


def test_an_unresolved_micro_batch_size_is_refused(make_model: Any, examples: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer.micro_batch_size must be a number before training; got None"):
        fit(
            make_model(),
            examples,
            PLAN,
            optim=OPTIM,
            trainer=TrainerConfig(),
            pad_id=0,
            seed=0,
            checkpoints=tmp_path,
            record=Recorder(),
        )


def test_offloading_activations_says_that_it_changes_nothing_on_a_cpu(
    tmp_path: Path, make_model: Any, examples: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plain, asked = make_model(), make_model()
    train(plain, examples, tmp_path / "plain", gradient_checkpointing=True)
    with caplog.at_level(logging.WARNING):
        train(asked, examples, tmp_path / "asked", gradient_checkpointing=True, offload_activations=True)
    assert "trainer.offload_activations changes nothing: the model is not on a GPU" in caplog.text
    for name, weight in weights(plain).items():
        assert torch.equal(weights(asked)[name], weight), name


def test_offloading_activations_needs_checkpointing() -> None:
    with pytest.raises(ConfigError, match=r"needs trainer\.gradient_checkpointing=true"):
        TrainerConfig(offload_activations=True)
