"""One run: build (load, quantize, adapt) -> fit -> evaluate -> run folder.

The only module that joins the light chain (configuration, run folders, tracking) and the heavy one
(models, data, training, evaluation).
"""

import hashlib
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import seed_everything
from transformers import PreTrainedModel

from qlora_lab.adapters.lora import add_adapters, count_parameters, train_everything
from qlora_lab.adapters.peft_format import save_adapter, save_full
from qlora_lab.config import hardware
from qlora_lab.config.schema import RunConfig
from qlora_lab.data.batching import plan_steps
from qlora_lab.data.prepare import PreparedData, prepare_data
from qlora_lab.errors import ConfigError
from qlora_lab.evaluation.suite import EvaluationOutcome, evaluate
from qlora_lab.fetch import default_cache_dir
from qlora_lab.models.load import load_model, load_tokenizer
from qlora_lab.quant.linear import cached_weights
from qlora_lab.runs.environment import environment
from qlora_lab.runs.folder import FAILED, FINISHED, INTERRUPTED, MetricsFile, RunFolder
from qlora_lab.tracking.session import open_session
from qlora_lab.train.fit import FitResult, TrainingInterrupted, fit
from qlora_lab.train.progress import progress_for

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KERNELS = "reference (pure torch)"  # the only implementation of the ops so far
Record = Callable[[int, dict[str, float]], None]


def execute(path: Path) -> str:
    """Execute the run whose folder is `path`, resuming it where it stopped.

    Returns:
        The run's state: finished, failed (its traceback is in status.json) or interrupted (told to stop).

    Raises:
        KeyboardInterrupt: on Ctrl-C, after the run was recorded as interrupted.
    """
    folder = RunFolder(path)
    with folder.lock():
        if folder.state() == FINISHED:
            return FINISHED
        folder.begin()
        try:
            folder.write_result(_execute(folder, folder.config()))
        except TrainingInterrupted as error:
            folder.end(INTERRUPTED, error)
            return INTERRUPTED
        except KeyboardInterrupt as error:
            folder.end(INTERRUPTED, error)
            raise
        except BaseException as error:
            # Whatever went wrong is recorded; the sweep goes on with the other runs.
            folder.end(FAILED, error)
            print(f"run {folder.run_id} failed: {error}", file=sys.stderr, flush=True)
            return FAILED
        folder.end(FINISHED)
        return FINISHED


@dataclass(frozen=True)
class Workbench:
    """What a run works with, before its first step."""

    model: PreTrainedModel
    tokenizer: Any
    data: PreparedData
    plan: list[list[int]]


def build(config: RunConfig) -> Workbench:
    """Load, quantize and adapt the model, and prepare the data and the plan of steps."""
    cache_dir = Path(config.paths.cache_dir) if config.paths.cache_dir else default_cache_dir()
    tokenizer = load_tokenizer(config.model, cache_dir)
    data = prepare_data(
        config.data,
        config.evaluation,
        prompt_format=config.model.prompt_format,
        tokenizer=tokenizer,
        seed=config.seed,
        cache_dir=cache_dir,
        data_dir=Path(config.paths.data_dir),
    )
    model = load_model(
        config.model,
        config.quant,
        compute_dtype=DTYPES[config.trainer.compute_dtype],
        device=config.trainer.device,
        cache_dir=cache_dir,
        seed=config.seed,
    )
    if config.adapter.kind == "lora":
        add_adapters(model, config.adapter, torch.Generator().manual_seed(config.seed))
    else:
        train_everything(model)
    plan = plan_steps(
        [len(example.input_ids) for example in data.train],
        batch_size=config.trainer.batch_size,
        max_steps=config.trainer.max_steps,
        max_tokens=config.trainer.max_train_tokens,
        seed=config.seed,
        group_by_length=config.trainer.group_by_length,
    )
    return Workbench(model, tokenizer, data, plan)


def _execute(folder: RunFolder, config: RunConfig) -> dict[str, Any]:
    """Do the work of one attempt and return the content of result.json."""
    started = time.monotonic()
    _check_device(config)
    torch.set_num_threads(config.trainer.threads or 1)
    folder.write_environment(_environment(config))
    session = open_session(config, folder.run_id, config.study.name or "qlora_lab", folder.path)
    metrics_file = MetricsFile(folder)

    def record(step: int, metrics: dict[str, float]) -> None:
        metrics_file.append(step, metrics)
        session.log(step, metrics)

    state, metrics = FAILED, {}
    try:
        # Before anything is initialised, so that a seed fixes the adapters too.
        seed_everything(config.seed, verbose=False)
        bench = build(config)
        print(f"run {folder.run_id}: {bench.data.report.summary()}", flush=True)
        if config.evaluation.before_training:
            record(0, _evaluate(bench, config).metrics)
        trained = _train(bench, config, folder, record)
        checksum = _save_weights(bench, config, folder)
        evaluation_started = time.monotonic()
        outcome = _evaluate(bench, config)
        folder.write_evaluation(outcome.rows, outcome.generations)
        record(trained.steps, outcome.metrics)
        metrics = {
            **outcome.metrics,
            **_training_metrics(trained),
            "eval/time_s": time.monotonic() - evaluation_started,
            "run/time_s": time.monotonic() - started,
            "memory/peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        if config.trainer.device == "cuda":
            metrics["memory/peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
        session.adapter(folder.adapter)
        state = FINISHED
    except (KeyboardInterrupt, TrainingInterrupted):
        state = INTERRUPTED
        raise
    finally:
        session.finish(state, metrics)
    trainable, total = count_parameters(bench.model)
    return {
        "metrics": metrics,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "data": bench.data.report.to_dict(),
        "adapter_sha256": checksum,
    }


def _check_device(config: RunConfig) -> None:
    """A run goes on only on the kind of device it was resolved for: another kind gives other numbers."""
    if config.trainer.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "trainer.device is 'cuda', but torch sees no GPU here; run it where one is, "
            "or plan it for this machine with trainer.device=cpu (that is another run)"
        )


def _environment(config: RunConfig) -> dict[str, Any]:
    return environment(
        hardware.detect(),
        device=torch.cuda.get_device_name() if config.trainer.device == "cuda" else "cpu",
        compute_dtype=config.trainer.compute_dtype,
        threads=torch.get_num_threads(),
        kernels=KERNELS,
    )


def _train(bench: Workbench, config: RunConfig, folder: RunFolder, record: Record) -> FitResult:
    with _stop_requests() as stop_requested:
        return fit(
            bench.model,
            bench.data.train,
            bench.plan,
            optim=config.optim,
            trainer=config.trainer,
            pad_id=bench.tokenizer.pad_token_id,
            seed=config.seed,
            checkpoints=folder.checkpoints,
            record=record,
            stop=stop_requested,
            progress=progress_for(sys.stdout),
        )


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM, which schedulers send first, into an answer to "shall I stop after this step?"."""
    requested = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal requested
        requested = True

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield lambda: requested
    finally:
        signal.signal(signal.SIGTERM, before)


def _save_weights(bench: Workbench, config: RunConfig, folder: RunFolder) -> str:
    """Save what was trained and return the sha256 of its weights file."""
    if config.adapter.kind == "lora":
        save_adapter(bench.model, folder.adapter, config.adapter, config.model.hub_id or config.model.name)
        weights = folder.adapter / "adapter_model.safetensors"
    else:
        save_full(bench.model, folder.adapter)
        weights = folder.adapter / "model.safetensors"
    with weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _evaluate(bench: Workbench, config: RunConfig) -> EvaluationOutcome:
    return evaluate(
        bench.model,
        bench.tokenizer,
        bench.data.held_out,
        config.evaluation,
        exact_match=config.data.exact_match,
        loss_chunk_tokens=config.trainer.loss_chunk_tokens,
        weights_context=cached_weights,
    )


def _training_metrics(trained: FitResult) -> dict[str, float]:
    return {
        "train/steps": trained.steps,
        "train/tokens": trained.tokens,
        "train/target_tokens": trained.target_tokens,
        "train/time_s": trained.time_s,
    }
