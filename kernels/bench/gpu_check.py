"""Everything that only a GPU can tell, in one command: python kernels/bench/gpu_check.py [--only TEXT] [--out FILE].

Builds the CUDA kernels for this GPU, runs the tests on it, watches small shapes with compute-sanitizer, trains models
of up to 65B parameters within the memory of smaller GPUs, measures, and writes one JSON. Works with the Python and
torch it finds and needs no network. A step that cannot run here is left out with its reason, a step that fails is
recorded and the next one runs; the exit status is 1 if any failed. The JSON is written after every step: what was
measured stays where the machine goes away. In a copy that is no repository, --commit says what it is a copy of.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpu_steps import BUILD, CannotRunError, Context, Step, all_steps, build

ROOT = Path(__file__).resolve().parents[2]
BUDGET_S = 470.0  # of all steps; a step gets what is left of it
SHORTEST_S = 5.0  # with less left a step is not begun
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",  # whatever a step prints, at once
    "HF_HUB_OFFLINE": "1",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0",  # some images round float32 products to ten bits
}
KEPT_LINES = 40  # of a failed step's output


@dataclass
class Outcome:
    """What became of a step: `passed`, `failed` or `left out`; the last line that it printed, of tests their number."""

    name: str
    status: str
    seconds: float
    reason: str = ""
    said: str = ""
    results: Any = None


Runner = Callable[[Sequence[str], dict[str, str], float], tuple[int, str]]


def run_command(command: Sequence[str], environment: dict[str, str], limit_s: float) -> tuple[int, str]:
    """Run a command in the checkout; return its exit status (124: it took too long) and what it printed."""
    try:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return 127, str(error)
    try:
        printed, _ = process.communicate(timeout=limit_s)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)  # and what it started, which would keep the GPU's memory
        printed, _ = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return 124, f"{printed}\nstopped after {limit_s:.0f} s"
    return process.returncode, printed


def read_results(path: Path | None) -> Any:
    """Return the JSON that a step wrote; None where there is none, or only its beginning: the step was stopped."""
    try:
        return None if path is None else json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def run_steps(
    steps: Sequence[Step],
    context: Context,
    budget_s: float = BUDGET_S,
    runner: Runner = run_command,
    clock: Callable[[], float] = time.monotonic,
    keep: Callable[[list[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Run the steps in order; none stops the others. `keep` gets the outcomes so far after each."""
    started = clock()
    outcomes: list[Outcome] = []

    def run_in_time(command: Sequence[str], limit_s: float) -> tuple[int, str]:
        left = budget_s - (clock() - started)
        if left < SHORTEST_S:
            raise CannotRunError(f"no time left of {budget_s:.0f} s")
        return runner(command, context.environment, min(left, limit_s))

    for step in steps:
        begun = clock()
        if step.results is not None:
            step.results.unlink(missing_ok=True)  # of an earlier check
        outcome = Outcome(step.name, "passed", 0.0)
        try:
            if step.needs_kernels:
                check_build(outcomes)
            run_step(step, context, run_in_time, outcome)
            outcome.results = read_results(step.results)
        except CannotRunError as error:
            outcome.status, outcome.reason = "left out", str(error)
        outcome.seconds = round(clock() - begun, 1)
        outcomes.append(outcome)
        first = outcome.reason.splitlines()[0] if outcome.reason else outcome.said
        print(f"{step.name:<36} {outcome.status:<9} {outcome.seconds:>6.1f} s  {first}", flush=True)
        keep(outcomes)
    return outcomes


def check_build(outcomes: Sequence[Outcome]) -> None:
    """Raise CannotRunError if the build is among the outcomes and did not pass."""
    for outcome in outcomes:
        if outcome.name == BUILD and outcome.status != "passed":
            raise CannotRunError(f"the build {'failed' if outcome.status == 'failed' else 'was left out'}")


def run_step(
    step: Step, context: Context, run: Callable[[Sequence[str], float], tuple[int, str]], outcome: Outcome
) -> None:
    """Run the commands of a step up to the first that fails, and note in `outcome` what became of them."""
    for command in step.commands(context):
        exit_status, printed = run(command, step.limit_s)
        lines = printed.splitlines() or [""]
        outcome.said = lines[-1]
        if exit_status == 0:
            continue
        refusal = next((text for text in step.refusals if text in printed), None)
        if refusal is not None:
            raise CannotRunError(f"{Path(command[0]).name} says here: {refusal}")
        last = "\n".join(lines[-KEPT_LINES:])
        outcome.status = "failed"
        outcome.reason = f"{' '.join(map(str, command))}: exit status {exit_status}\n{last}"
        return


def printed_by(*command: str) -> str | None:
    """Return what a command prints; None where it fails, as git does in a copy without a repository."""
    status, printed = run_command(command, {}, 30.0)
    return printed.strip() if status == 0 else None


def machine(commit: str | None) -> dict[str, Any]:
    """Return what was measured on: the commit, the GPU, its driver, torch.

    Args:
        commit: for a copy without a repository, which is asked otherwise.

    Raises:
        CannotRunError: there is no GPU, or torch cannot use it.
    """
    try:
        import torch
    except ImportError as error:
        raise CannotRunError(f"this Python has no torch ({error})") from error
    if not torch.cuda.is_available():
        raise CannotRunError("torch finds no GPU that it can use")
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    found = printed_by("git", "rev-parse", "HEAD")
    changed = found and printed_by("git", "status", "--porcelain", "--untracked-files=no")
    major, minor = torch.cuda.get_device_capability()
    return {
        "commit": f"{found}+changes" if changed else found or commit,
        "gpu": torch.cuda.get_device_name(),
        "nvidia_smi": printed_by(*query),
        "capability": f"{major}{minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON; by default kernels/bench/results/GPU-COMMIT.json")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--only", default="", help="steps whose name contains this, beside the build")
    parser.add_argument("--commit", help="what this is a copy of, where there is no repository")
    options = parser.parse_args()
    started = time.monotonic()
    try:
        found = machine(options.commit)
    except CannotRunError as error:
        print(f"nothing was checked: {error}", file=sys.stderr)
        return 2
    scratch = options.build.resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    capability = found["capability"] + ("a-real" if found["capability"] == "90" else "-real")
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {"QLORA_LAB_KERNELS": str(scratch), "PYTHONPATH": paths} | ENVIRONMENT
    words = (found["gpu"], (found["commit"] or "unknown")[:10], options.only)
    name = "-".join(word.replace(" ", "-") for word in words if word)
    out = options.out or ROOT / "kernels" / "bench" / "results" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)

    def write(outcomes: list[Outcome]) -> None:
        steps = [asdict(outcome) for outcome in outcomes]
        unfinished = out.with_suffix(".part")
        unfinished.write_text(json.dumps({"machine": found, "steps": steps}, indent=1) + "\n")
        unfinished.replace(out)

    steps = [step for step in all_steps(scratch) if options.only in step.name or step.commands is build]
    context = Context(scratch, sys.executable, capability, environment)
    outcomes = run_steps(steps, context, BUDGET_S - (time.monotonic() - started), keep=write)
    print(f"written: {out}")
    return 1 if any(outcome.status == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
