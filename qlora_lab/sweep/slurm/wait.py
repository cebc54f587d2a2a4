"""launcher.wait=true: watch the runs of a submission to their end, submitting again what may be."""

import sys
import time
from collections import Counter
from collections.abc import Sequence

from qlora_lab.runs.folder import FAILED, FINISHED, RunFolder, states_of
from qlora_lab.sweep.progress import SweepProgress
from qlora_lab.sweep.slurm.commands import UnreachableError
from qlora_lab.sweep.slurm.submit import Submission

POLL_S = 5.0
IDLE_ROUNDS = 3  # submissions in a row in which no run began


def wait(submission: Submission, runs: Sequence[RunFolder]) -> None:
    """Return when no run is left that may go on by itself, or submitting does not get any further.

    Raises:
        LaunchError: SLURM refuses what is submitted again.
    """
    progress = SweepProgress(list(runs), sys.stdout)
    idle, began = 0, -1
    fruitless, ended = 0, Counter(states_of(runs))
    crowded = False
    while idle < IDLE_ROUNDS:
        try:
            if submission.jobs():
                progress.show()
                time.sleep(POLL_S)
                continue
            submission.record_unbegun(runs)
            states = states_of(runs)
            now = Counter(states)
            fruitless = fruitless + 1 if now[FAILED] > ended[FAILED] and now[FINISHED] == ended[FINISHED] else 0
            ended = now
            open_runs = [run for run, state in zip(runs, states, strict=True) if state not in (FINISHED, FAILED)]
            if open_runs and fruitless >= submission.max_failures:
                print(f"{fruitless} submissions in a row ended with failures alone; nothing more is submitted")
                break
            outcome = submission.launch(open_runs, runs)
        except UnreachableError as error:
            print(error, file=sys.stderr)
            time.sleep(POLL_S)
            continue
        if not outcome.submitted and not outcome.queued:
            if not outcome.left:
                break
            if not crowded:  # jobs that are not of this plan take the site's whole limit, and end some day
                print(f"{len(outcome.left)} runs are above the site's limit; waiting until it has room", flush=True)
            crowded = True
            time.sleep(POLL_S)
            continue
        crowded = False
        attempts = sum(run.attempts() for run in runs)
        idle, began = (idle + 1 if attempts == began else 0), attempts
    progress.show(final=True)
