"""A launching command without a study around it: python launcher.py RUNS_DIR COUNT KEY=VALUE... submits and ends."""

import json
import sys
from pathlib import Path

from qlora_lab.config.schema import LauncherConfig, SlurmConfig
from qlora_lab.runs.folder import RunFolder
from qlora_lab.sweep.slurm.scheduler import SlurmScheduler
from qlora_lab.sweep.slurm.submit import Submission
from qlora_lab.sweep.slurm.wait import wait
from tests.slurm.launcher_names import run_ids

SMALL = {"gpus_per_run": 1, "cpus_per_run": 1, "memory_gb": 1, "time_limit_min": 10}


def main() -> None:
    runs_dir, count = Path(sys.argv[1]).resolve(), int(sys.argv[2])
    settings = {key: json.loads(value) for key, _, value in (word.partition("=") for word in sys.argv[3:])}
    retry_failed = settings.pop("retry_failed", False)
    beyond_rules = settings.pop("beyond_rules", retry_failed)
    slurm = SlurmConfig(**{**SMALL, **{k: settings.pop(k) for k in list(settings) if k in SlurmConfig.__annotations__}})
    launcher = LauncherConfig(kind="slurm", slurm=slurm, **settings)
    runs = [RunFolder(runs_dir / run_id) for run_id in run_ids(count)]
    for run in runs:
        run.path.mkdir(parents=True, exist_ok=True)
    submission = Submission(runs_dir / "slurm", "test", SlurmScheduler(), launcher)
    submission.record_unbegun(runs)
    done = ("finished",) if retry_failed else ("finished", "failed")
    to_do = [run for run in runs if run.state() not in done]
    outcome = submission.launch(to_do, runs, beyond_rules=beyond_rules)
    print(json.dumps(outcome.__dict__), flush=True)
    if launcher.wait:
        wait(submission, runs)


main()
