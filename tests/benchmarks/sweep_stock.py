"""The stock side of sweep_costs.py: Hydra's basic sweeper and hydra-submitit-launcher."""

import sys
from dataclasses import dataclass

from sweep_bench import AXES, FIXED, ROOT, Bench, Cost, disk

# What a stock application is: a no-op task on the same configuration. Nothing ever runs, so nothing is waited for.
STOCK_APP = """
import sys, time
import hydra, submitit
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from qlora_lab.config.command import PLUGINS
from qlora_lab.config.schema import RunConfig
sys.path.append(str(PLUGINS))
ConfigStore.instance().store(name="run_schema", node=RunConfig)
submitit.Job.results = lambda job: [JobReturn(status=JobStatus.COMPLETED)]

def timed(self, batch, plain=Sweeper.validate_batch_is_legal):
    began = time.process_time()
    plain(self, batch)
    print("COMPOSED", time.process_time() - began)

Sweeper.validate_batch_is_legal = timed

@hydra.main(version_base="1.3", config_path={conf!r}, config_name="train")
def task(node):
    pass

task()
"""


@dataclass(frozen=True)
class Stock:
    """What a run costs Hydra's basic sweeper and hydra-submitit-launcher."""

    plan_s: float  # composing it in the launcher
    submit_s: float  # the rest: its place in the list of jobs, its pickle, its part of sbatch
    memory_bytes: float
    disk_bytes: float
    inodes: float
    job_s: float  # of a no-op run
    finished_inodes: int


def stock_submit(bench: Bench, count: int) -> tuple[Cost, float]:
    """Submit runs with Hydra's basic sweeper and hydra-submitit-launcher; return the seconds of composing, too."""
    code = STOCK_APP.format(conf=str(ROOT / "conf"))
    axes = {key: values.split(",")[0] for key, values in AXES.items()}
    fixed = [*FIXED, *(f"{key}={value}" for key, value in axes.items())]
    folder = bench.folder / f"stock{count}"
    hydra = ["--multirun", "hydra/launcher=submitit_slurm", f"hydra.sweep.dir={folder}", f"seed=range({count})"]
    cost = bench.command([sys.executable, "-c", code, *hydra, *fixed], HYDRA_FULL_ERROR="1")
    (composed_s,) = (float(line.split()[1]) for line in cost.printed.splitlines() if line.startswith("COMPOSED "))
    return cost, composed_s


def stock(bench: Bench) -> Stock:
    sizes = bench.sample // 4, bench.sample
    (few, few_composed_s), (many, many_composed_s) = (stock_submit(bench, count) for count in sizes)
    more = sizes[1] - sizes[0]
    _, blocks, inodes = disk(bench.folder / f"stock{bench.sample}")
    done, left = stock_worker(bench, bench.sample)
    return Stock(
        plan_s=(many_composed_s - few_composed_s) / more,
        submit_s=(many.cpu_s - many_composed_s - few.cpu_s + few_composed_s) / more,
        memory_bytes=(many.peak_bytes - few.peak_bytes) / more,
        disk_bytes=blocks / bench.sample,
        inodes=inodes / bench.sample,
        job_s=done.cpu_s,
        finished_inodes=left,
    )


def stock_worker(bench: Bench, count: int) -> tuple[Cost, int]:
    """Execute one job of `stock_submit`, and count what a finished run leaves."""
    folder = bench.folder / f"stock{count}"
    pickles = sorted((folder / ".submitit").glob("*/*_submitted.pkl"))
    job = pickles[0].name.removesuffix("_submitted.pkl")
    array, _, task = job.partition("_")
    before = disk(folder)[2]
    cost = bench.command(
        [sys.executable, "-u", "-m", "submitit.core._submit", str(pickles[0].parent)],
        PYTHONPATH=str(ROOT / "qlora_lab" / "plugins"),
        SLURM_JOB_ID=job,
        SLURM_ARRAY_JOB_ID=array,
        SLURM_ARRAY_TASK_ID=task,
        **dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0"),
        **dict.fromkeys(("SLURM_JOB_NUM_NODES", "SLURM_NTASKS"), "1"),
        SLURM_JOB_NODELIST="node",
        SUBMITIT_EXECUTOR="slurm",
    )
    logs = 2  # stdout and stderr, which SLURM opens
    return cost, disk(folder)[2] - before + 2 + logs  # its job's folder and its pickle were there before


def in_words(measured: Stock, runs: int, sample: int) -> dict[str, str]:
    """Return what is to be said of the stock launcher, by the rows of the table."""
    plan_s, submit_s = runs * measured.plan_s, runs * measured.submit_s
    return {
        "plan": f"{plan_s:,.0f} s ({1e3 * measured.plan_s:.0f} ms a run, of {sample})",
        "plan and submit": f"{plan_s + submit_s:,.0f} s",
        "submit": f"{submit_s:,.0f} s ({1e3 * measured.submit_s:.1f} ms a run)",
        "memory of that": f"{runs * measured.memory_bytes / 1e6:,.0f} MB ({measured.memory_bytes / 1e3:.0f} kB a run)",
        "disk of that": f"{runs * measured.disk_bytes / 1e6:,.0f} MB and {runs * measured.inodes:,.0f} inodes",
        "the same command, all finished": "starts every run again",
        "status": "none",
        "a killed run is noticed after": "up to 600 s (from its code)",
        "a run that does nothing": f"{measured.job_s:.2f} s",
        "the same in a warm pool": "none",
        "inodes of it": f"{measured.finished_inodes}",
    }
