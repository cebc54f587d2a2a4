"""Where sweep_costs.py measures: a folder with commands of SLURM that start nothing, and runs that do nothing."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AXES = {
    "adapter": "all_linear,attention,feed_forward,query_value,qlora_paper",
    "quant": "none,nf4,fp4_e2m1,fp4_e3m0,int4,int8,nf3,nf2",
    "data": "procedural_clean_128,procedural_half_wrong_2048",
    "optim": "adamw,qlora_paper",
    "optim.learning_rate": "1e-4,2e-4,3e-4,5e-4,1e-3,2e-3,3e-3",
}
COMBINATIONS, LEARNING_RATES = 160, 7
FIXED = ["model=tiny_random", "tracking=none", "trainer.device=cpu", "trainer.compute_dtype=float32"]
COMMANDS = {
    "sbatch": """script=$(mktemp -p $FAKE_SLURM script.XXXXXX); number=$(ls $FAKE_SLURM | wc -l)
if [ "$1" = --parsable ]; then cat > $script; echo $number; exit; fi
cp "$1" $script; echo Submitted batch job $number""",
    "squeue": "cat $FAKE_SLURM/queue 2> /dev/null || true",
    "scontrol": "echo 'MaxArraySize            = 20001'",
    "sacct": ":",
}
# Stands in for qlora_lab.run in the workers of this benchmark: what a run records, and no work.
NO_OP_RUN = """
import sys, types
from pathlib import Path

def execute(path, attempts_before=None, *, lease, stop_cause, bases=None, config=None):
    from qlora_lab.config import hardware
    from qlora_lab.runs.environment import environment
    from qlora_lab.runs.folder import FINISHED, RunFolder
    from qlora_lab.runs.metrics_file import MetricsFile
    folder = RunFolder(Path(path))
    with folder.holding(lease):
        folder.begin()
        config or folder.config()
        folder.write_environment({"cpu": "none"})
        MetricsFile(folder, lambda: 1.0).append(1, {"train/loss": 1.0})
        folder.write_result({"metrics": METRICS})
        folder.end(FINISHED, 1.0)
    return FINISHED

METRICS = {"eval/loss": 1.0, "eval/bits_per_byte": 1.0, "eval/target_tokens": 10, "eval/rows": 8, "train/steps": 30}
CONTENTS = {"qlora_lab.run": {"execute": execute}, "qlora_lab.models.warm": {"WarmBase": lambda: None}}
for name, content in CONTENTS.items():
    module = types.ModuleType(name)
    module.__dict__.update(content)
    sys.modules[name] = module
"""


@dataclass(frozen=True)
class Cost:
    cpu_s: float
    peak_bytes: int
    printed: str


@dataclass(frozen=True)
class Bench:
    """Where everything happens."""

    folder: Path
    runs: int
    sample: int
    stock: Path | None

    def command(self, command: list[str], log: Path | None = None, **variables: str) -> Cost:
        """Return what a command took that must succeed, and what it printed, unless that goes into a log."""
        paths = [
            str(ROOT),
            *([str(self.stock)] if self.stock else []),
            *filter(None, [variables.pop("PYTHONPATH", "")]),
        ]
        environment = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "FAKE_SLURM": str(self.folder / "slurm"),
            "PYTHONPATH": os.pathsep.join(reversed(paths)),
            **variables,
        }
        (self.folder / "printed").touch()
        with (log or self.folder / "printed").open("wb") as printed:
            process = subprocess.Popen(
                command, stdout=printed, stderr=subprocess.STDOUT, env=environment, cwd=self.folder
            )
            _, status, used = os.wait4(process.pid, 0)
        text = (self.folder / "printed").read_text(errors="replace")
        if os.waitstatus_to_exitcode(status):
            sys.exit(f"{' '.join(command)[:300]} failed:\n{text[-3000:]}")
        return Cost(used.ru_utime + used.ru_stime, used.ru_maxrss << 10, text)

    def ours(self, *overrides: str) -> Cost:
        """Run the study's command, for SLURM."""
        seeds = self.runs // (COMBINATIONS * LEARNING_RATES)
        axes = [*(f"{key}={values}" for key, values in AXES.items()), f"seed=range({seeds})"]
        where = [f"paths.runs_dir={self.folder / 'runs'}", "launcher=slurm", "launcher.slurm.gpus_per_run=0"]
        return self.command([sys.executable, "-m", "qlora_lab.sweep", *FIXED, *where, *axes, *overrides])

    def steer(self, action: str) -> Cost:
        """Run a command about the study."""
        runs_dir = str(self.folder / "runs")
        return self.command([sys.executable, "-m", "qlora_lab.sweep", action, "study", "--runs-dir", runs_dir])

    def prepare(self) -> None:
        for name in ("bin", "slurm", "no_op"):
            (self.folder / name).mkdir()
        for name, script in COMMANDS.items():
            (self.folder / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
            (self.folder / "bin" / name).chmod(0o755)
        (self.folder / "no_op" / "sitecustomize.py").write_text(NO_OP_RUN)


def disk(*folders: Path) -> tuple[int, int, int]:
    """Return the bytes, the bytes in whole blocks, and the inodes below folders."""
    found = [path.lstat() for folder in folders for path in folder.rglob("*")]
    files = sum(each.st_size for each in found if each.st_nlink == 1)
    return files, sum(each.st_blocks * 512 for each in found), len(found)
