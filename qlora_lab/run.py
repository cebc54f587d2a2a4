"""One run: build (load, quantize, adapt) -> fit -> evaluate -> run folder.

The only module that joins the light chain (configuration, run folders, tracking) and the heavy one
(models, data, training, evaluation).
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qlora_lab.adapters.lora import count_parameters
from qlora_lab.adapters.peft_format import save_adapter, save_full
from qlora_lab.config import hardware
from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import ConfigError, LeaseLostError, TrainingError
from qlora_lab.evaluation.benchmarks.examinee import Examinee
from qlora_lab.evaluation.benchmarks.run import BenchmarkOutcome, check_benchmarks, check_packages, run_benchmarks
from qlora_lab.evaluation.suite import EvaluationOutcome, evaluate
from qlora_lab.evaluation.weights import cached_if_small
from qlora_lab.hashing import file_sha256
from qlora_lab.models.load import commit_of
from qlora_lab.models.precision import computing_in
from qlora_lab.models.warm import WarmBase
from qlora_lab.ops.blockwise.checks import DTYPES
from qlora_lab.ops.registry import CUDA_KERNELS, KERNELS
from qlora_lab.runs.causes import STOPPED
from qlora_lab.runs.environment import environment
from qlora_lab.runs.folder import FAILED, FINISHED, INTERRUPTED, RunFolder
from qlora_lab.runs.heap import give_back
from qlora_lab.runs.lease import Lease
from qlora_lab.runs.metrics_file import MetricsFile
from qlora_lab.tracking.session import NoSession, Session, open_session
from qlora_lab.train.fit import FitResult, TrainingInterrupted, fit
from qlora_lab.train.interrupt import stop_requests
from qlora_lab.train.peak_memory import PeakMemory
from qlora_lab.train.progress import progress_for
from qlora_lab.train.rng import seed_everything
from qlora_lab.workbench import Workbench, build, say_what_was_built

Record = Callable[[int, dict[str, float]], None]
Clock = Callable[[], float]
LOST = "lost"  # what `execute` says of an attempt that another one has replaced


def execute(
    path: Path,
    attempts_before: int | None = None,
    *,
    lease: Lease | None = None,
    stop_cause: Callable[[], str] = lambda: STOPPED,
    bases: WarmBase | None = None,
    config: RunConfig | None = None,
) -> str:
    """Execute the run whose folder is `path`, resuming it where it stopped.

    The folder is complete before W&B gets the adapter and the end of the run: nothing there can undo a result.

    Args:
        path: the run folder.
        attempts_before: attempts that had begun when this one was decided on. A run that another process has executed
            since, and that failed, is left as it is: it would fail again.
        lease: of the run, where the caller holds it already; it is released here.
        stop_cause: asked, when the run was told to stop, for the cause to record.
        bases: keeps the quantized base model for the next run in this process.
        config: what the folder's config.yaml holds, where the caller has just written it.

    Returns:
        The run's state: finished, failed (its traceback is in status.json), interrupted (told to stop), or lost (a
        later attempt has taken the run; this one has written nothing since).

    Raises:
        KeyboardInterrupt, SystemExit: on Ctrl-C, and on SIGTERM and the like where the process turns those into
            SystemExit, after the run was recorded as interrupted.
    """
    folder = RunFolder(path)
    with folder.lock() if lease is None else folder.holding(lease):
        state = folder.state()
        failed_since = state == FAILED and attempts_before is not None and folder.attempts() > attempts_before
        if state == FINISHED or failed_since:
            return state
        clock = _clock_from(folder.elapsed_s())
        session: Session = NoSession()

        def end(state: str, error: BaseException | None = None) -> str:
            stopped = state == INTERRUPTED
            folder.end(state, clock(), error, cause=stop_cause() if stopped else None)
            if state == FINISHED:
                session.adapter(folder.adapter)
            session.finish(state, folder.summary())
            return state

        try:
            folder.begin()
            try:
                config = folder.config() if config is None else config
                session = open_session(config, folder.run_id, config.study.name or "qlora_lab", folder.path)
                result = _execute(folder, config, session, clock, bases)
                folder.write_result(result)
            except LeaseLostError:
                raise
            except TrainingInterrupted as error:
                return end(INTERRUPTED, error)
            except (KeyboardInterrupt, SystemExit) as error:
                end(INTERRUPTED, error)
                raise
            except BaseException as error:
                # Whatever went wrong is recorded; the sweep goes on with the other runs.
                end(FAILED, error)
                print(f"run {folder.run_id} failed: {error}", file=sys.stderr, flush=True)
                return FAILED
            return end(FINISHED)
        except LeaseLostError as error:
            print(f"run {folder.run_id}: {error}", file=sys.stderr, flush=True)
            return LOST


def _clock_from(elapsed_s: float) -> Clock:
    """Return a clock of the seconds over all attempts of a run, `elapsed_s` of them before this one."""
    started = time.monotonic()
    return lambda: elapsed_s + time.monotonic() - started


def _execute(
    folder: RunFolder, config: RunConfig, session: Session, clock: Clock, bases: WarmBase | None
) -> dict[str, Any]:
    """Do the work of one attempt and return the content of result.json."""
    _check_device(config)
    check_packages(config.evaluation.benchmarks.values())
    if config.trainer.threads is None:
        raise ConfigError("trainer.threads must be resolved before a run; got null; plan the run again")
    torch.set_num_threads(config.trainer.threads)
    folder.write_environment(_environment(config))
    session.begin(folder.summary())
    memory = PeakMemory(config.trainer.device)
    metrics_file = MetricsFile(folder, clock)

    def record(step: int, metrics: dict[str, float]) -> None:
        session.log(step, metrics_file.append(step, metrics))

    # Before anything is initialised, so that a seed fixes the adapters too.
    seed_everything(config.seed)
    bench = build(config, bases)
    say_what_was_built(bench, config, folder.run_id)
    check_benchmarks(_examinee(bench, config), config.evaluation.benchmarks)
    if bench.data.removed is not None:
        folder.keep_removed_rows(bench.data.removed.path)
    if config.evaluation.before_training and not folder.has_metric(0, "eval/loss"):
        record(0, _evaluate(bench, config).metrics)
    memory.end_section()
    trained = _train(bench, config, folder, record)
    training_peaks = memory.end_section()
    give_back()
    checksum = _save_weights(bench, config, folder)
    evaluation_started = time.monotonic()
    outcome = _evaluate(bench, config)
    folder.write_evaluation(outcome.rows, outcome.generations)
    give_back()
    benchmarks = _benchmarks(bench, config)
    folder.write_benchmarks(benchmarks.items)
    metrics = {**outcome.metrics, **benchmarks.metrics}
    record(trained.steps, metrics)
    memory.end_section()
    trainable, total = count_parameters(bench.model)
    return {
        "metrics": {
            **metrics,
            **_training_metrics(trained),
            **bench.plan_metrics(),
            **({f"train/{name}": peak for name, peak in training_peaks.items()} if trained.trained_now else {}),
            "eval/time_s": time.monotonic() - evaluation_started,
            "run/time_s": clock(),
            **{f"memory/{name}": peak for name, peak in memory.highest.items()},
        },
        "trainable_parameters": trainable,
        "total_parameters": total,
        "optimizer": trained.optimizer,
        "quantized_parameters": bench.quantized.quantized,
        "quantized_share": bench.quantized.share,
        "data": bench.data.report.to_dict(),
        "benchmark_revisions": benchmarks.revisions,
        "model_revision": commit_of(bench.model),
        "adapter_sha256": checksum,
    }


def _check_device(config: RunConfig) -> None:
    """A run goes on only on the kind of device it was resolved for, and with the kernels that were asked for."""
    KERNELS.require()
    if config.trainer.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "trainer.device is 'cuda', but torch sees no GPU here; run it where one is, "
            "or plan it for this machine with trainer.device=cpu (that is another run)"
        )
    if config.trainer.device == "cuda":
        CUDA_KERNELS.require()


def _environment(config: RunConfig) -> dict[str, Any]:
    machine = hardware.detect()
    return environment(
        machine,
        device=torch.cuda.get_device_name() if config.trainer.device == "cuda" else "cpu",
        compute_dtype=config.trainer.compute_dtype,
        attention_and_head_dtype=hardware.product_dtype(machine, config.trainer.device, config.trainer.compute_dtype),
        threads=torch.get_num_threads(),
        kernels=str(KERNELS),
        gpu_kernels=str(CUDA_KERNELS),
    )


def _train(bench: Workbench, config: RunConfig, folder: RunFolder, record: Record) -> FitResult:
    with stop_requests() as stop_requested:
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
            lease=folder.lease,
            pack_tokens=config.data.longest_row_tokens if config.data.packing else None,
            forward_context=lambda: computing_in(bench.model, DTYPES[config.trainer.compute_dtype]),
            stop=stop_requested,
            progress=progress_for(sys.stdout),
        )


def _save_weights(bench: Workbench, config: RunConfig, folder: RunFolder) -> str:
    """Save what was trained and return the sha256 of its weights file."""
    assert folder.lease is not None  # execute holds it
    with folder.lease.staged(folder.adapter) as staged:
        if config.adapter.kind == "lora":
            save_adapter(bench.model, staged, config.adapter, config.model.hub_id or config.model.name)
            weights = staged / "adapter_model.safetensors"
        else:
            save_full(bench.model, staged)
            weights = staged / "model.safetensors"
        return file_sha256(weights)


def _evaluate(bench: Workbench, config: RunConfig) -> EvaluationOutcome:
    """Evaluate the model as it is.

    Raises:
        TrainingError: the loss is not finite, so that there is nothing to compare.
    """
    with computing_in(bench.model, DTYPES[config.trainer.compute_dtype]):
        outcome = evaluate(
            bench.model,
            bench.tokenizer,
            bench.data.held_out,
            config.evaluation,
            exact_match_sets=bench.data.exact_match_sets,
            loss_chunk_tokens=config.trainer.loss_chunk_tokens,
            weights_context=cached_if_small,
        )
    bad = [row["key"] for row in outcome.rows if not math.isfinite(row["loss_sum"])]
    if bad:
        raise TrainingError(
            f"eval/loss is not finite: {len(bad)} of {len(outcome.rows)} held-out rows have none that is, such as "
            f"{bad[0]}; try trainer.compute_dtype=float32, or a lower optim.learning_rate"
        )
    return outcome


def _benchmarks(bench: Workbench, config: RunConfig) -> BenchmarkOutcome:
    with computing_in(bench.model, DTYPES[config.trainer.compute_dtype]):
        return run_benchmarks(_examinee(bench, config), config.evaluation.benchmarks, weights_context=cached_if_small)


def _examinee(bench: Workbench, config: RunConfig) -> Examinee:
    return Examinee.of_run(bench.model, bench.tokenizer, config)


def _training_metrics(trained: FitResult) -> dict[str, float]:
    return {
        "train/steps": trained.steps,
        "train/tokens": trained.tokens,
        "train/target_tokens": trained.target_tokens,
        "train/time_s": trained.time_s,
    }
