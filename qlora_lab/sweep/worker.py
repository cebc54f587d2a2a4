"""What a job executes. submitit pickles an instance by the name of its class, so this module stays light."""

import importlib
import sys
from pathlib import Path

from submitit.helpers import Checkpointable


class RunJob(Checkpointable):
    """Execute one run folder; a job that is preempted is submitted again and resumes its run."""

    def __call__(self, run_folder: str) -> str:
        """Return the run's id.

        Raises:
            SystemExit: with status 1 when the run failed, so that SLURM sees it too.
        """
        run = importlib.import_module("qlora_lab.run")  # torch comes in here, in the job
        state = run.execute(Path(run_folder))
        if state != "finished":
            sys.exit(1)
        return Path(run_folder).name
