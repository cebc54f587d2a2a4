"""What a job executes. submitit pickles an instance by the name of its class, so this module stays light."""

import importlib
import os
import sys
from pathlib import Path

from submitit.helpers import Checkpointable

from qlora_lab.config.exit_status import FAILED, TERMINATED
from qlora_lab.runs.folder import FINISHED, INTERRUPTED


class RunJob(Checkpointable):
    """Execute one run folder; a job that is preempted is submitted again and resumes its run.

    Args:
        gpu: what CUDA_VISIBLE_DEVICES calls the GPU to use; None leaves the job those it was given.
    """

    def __init__(self, gpu: str | None = None) -> None:
        self.gpu = gpu

    def __call__(self, run_folder: str, attempts_before: int | None = None) -> str:
        """Return the run's id.

        Args:
            run_folder: its path.
            attempts_before: attempts that had begun when the job was submitted, as `run.execute` takes it.

        Raises:
            SystemExit: with status 1 when the run failed, so that SLURM sees it too; 143 when it was told to stop.
        """
        if self.gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpu
        run = importlib.import_module("qlora_lab.run")  # torch comes in here, in the job
        state = run.execute(Path(run_folder), attempts_before)
        if state != FINISHED:
            sys.exit(TERMINATED if state == INTERRUPTED else FAILED)
        return Path(run_folder).name
