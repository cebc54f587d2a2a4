"""W&B's server is silent or slow from the start, or turns all away once a run has begun: the curve is complete anyway.

No cluster is needed, but time-outs are waited for. `tests/benchmarks/tracking_outage.py` does the same for an hour.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.wandb_file import records
from tests.wandb_stand_in import Faults, WandbStandIn, wandb_stand_in

ROOT = Path(__file__).parents[2]
ID = "0" * 12
SILENT, SLOW, BUSY, HANGS_UP = Faults(silent=True), Faults(delay_s=4), Faults(status=429), Faults(drop=True)
STEPS = 50
# In a process of its own, as runs are: it has to come to its end too, whatever W&B's client still tries.
RUN = f"""
import sys
from pathlib import Path
from qlora_lab.tracking.session import open_session
from tests.helpers import tiny

folder = Path(sys.argv[1])
config = tiny(folder, "tracking=wandb_online", "tracking.init_timeout_s=3", "tracking.finish_timeout_s=1")
session = open_session(config, "{ID}", "a_study", folder)
print("opened", flush=True)
sys.stdin.readline()
for step in range({STEPS}):
    session.log(step, {{"train/loss": float(step)}})
session.finish("finished", {{"eval/loss": 1.0}})
"""
STUDY = ["model=tiny_random", "data.rows=32", "evaluation.rows=16", "evaluation.max_new_tokens=24", "seed=0,1"]


def environment(server: WandbStandIn, home: Path) -> dict[str, str]:
    home.mkdir(exist_ok=True)
    return server.environment(home) | {"PYTHONPATH": str(ROOT)}


def sync(server: WandbStandIn, home: Path, *folders: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--yes", "--include-online", *map(str, folders)],
        env=environment(server, home),
        cwd=home,  # it leaves logs in ./wandb
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def kept(file: Path) -> list[float]:
    """Return the curve in the file that W&B's client wrote."""
    rows = [record.history for record in records(file) if record.WhichOneof("record_type") == "history"]
    values = [{item.key or ".".join(item.nested_key): item.value_json for item in row.item} for row in rows]
    return [json.loads(row["train/loss"]) for row in values]


@pytest.mark.parametrize("faults", [SILENT, SLOW, BUSY, HANGS_UP], ids=["silent", "slow", "busy", "hangs_up"])
def test_an_outage_costs_no_point_of_the_curve(faults: Faults, tmp_path: Path) -> None:
    begins_before = faults is BUSY
    with wandb_stand_in() as server:
        server.faults = Faults() if begins_before else faults
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(tmp_path)],
            env=environment(server, tmp_path / "home"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        said = [process.stdout.readline()]
        while said[-1] not in ("opened\n", ""):
            said.append(process.stdout.readline())
        server.faults = faults
        rest, err = process.communicate("\n", timeout=120)
        assert process.returncode == 0, err
        assert server.struck > 0
        assert "tracking stopped" not in rest
        assert ("tracking goes on offline" in "".join(said)) == (not begins_before)
        kind = "run" if begins_before else "offline-run"
        (file,) = tmp_path.glob(f"wandb/{kind}-*/run-{ID}.wandb")
        whole = [float(step) for step in range(STEPS)]
        assert kept(file) == whole
        server.faults = Faults()
        sync(server, tmp_path / "home", file.parent)
        assert [line["train/loss"] for line in server.history(ID)] == whole


def test_a_study_during_an_outage_is_synced_later(tmp_path: Path) -> None:
    with wandb_stand_in() as server:
        server.faults = HANGS_UP
        done = subprocess.run(
            [
                *(sys.executable, "-m", "qlora_lab.sweep", *STUDY, f"paths.runs_dir={tmp_path / 'runs'}"),
                *("launcher=in_process", "trainer.threads=1", "trainer.max_steps=12"),
                *("tracking=wandb_online", "tracking.init_timeout_s=3", "tracking.finish_timeout_s=1"),
            ],
            env=environment(server, tmp_path / "home") | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        runs = [file.parent for file in (tmp_path / "runs").glob("*/result.json")]
        assert len(runs) == 2 and not server.runs
        server.faults = Faults()
        sync(server, tmp_path / "home", *(tmp_path / "runs").glob("*/wandb/offline-run-*"))
        for run in runs:
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            of_training = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
            there = [line for line in server.history(run.name) if "train/loss" in line]
            arrived = {line["trainer/global_step"]: line["train/loss"] for line in there}
            assert of_training and arrived == pytest.approx(of_training)
