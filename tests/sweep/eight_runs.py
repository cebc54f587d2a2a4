"""A study of eight runs that stand differently, and what is asked about it."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from qlora_lab.runs.folder import FAILED, FINISHED, INTERRUPTED
from qlora_lab.sweep.plan import Plan, make_plan
from qlora_lab.sweep.steer import Asked
from tests.helpers import tiny

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
FINISHED_EARLIER = NOW - timedelta(hours=3)


def record(state: str, ended: datetime = NOW, message: str = "", cause: str | None = None) -> dict[str, Any]:
    error = {"type": "TrainingError", "message": message, "traceback": f"Traceback\n\n  at line 1\n{message}"}
    return {
        "state": state,
        "started_at": (ended - timedelta(minutes=10)).isoformat(timespec="seconds"),
        "ended_at": ended.isoformat(timespec="seconds"),
        "elapsed_s": 600.0,
        "attempt": 1,
        "cause": cause,
        "error": error if message else None,
    }


def put(plan: Plan, index: int, status: dict[str, Any], **files: str) -> None:
    folder = plan.runs_dir / plan.runs[index].run_id
    folder.mkdir(exist_ok=True)
    (folder / "status.json").write_text(json.dumps(status))
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def eight_runs(runs_dir: Path) -> Plan:
    """Eight runs: two finished, three failed for two reasons, one interrupted, two new."""
    points = [({"quant": quant, "seed": str(seed)}, seed) for quant in ("none", "nf4") for seed in range(4)]
    fixed = ("study.name=bits", "trainer.device=cpu")
    base = {quant: tiny(runs_dir, f"quant={quant}", *fixed) for quant in ("none", "nf4")}
    plan = make_plan("bits", [(point, replace(base[point["quant"]], seed=seed)) for point, seed in points])
    plan.write()
    put(plan, 0, record(FINISHED, NOW - timedelta(minutes=30)))
    put(plan, 1, record(FINISHED, FINISHED_EARLIER))
    put(plan, 2, record(FAILED, message="the loss is not finite at step 17", cause="nan"))
    put(plan, 3, record(FAILED, message="the loss is not finite at step 4", cause="nan"))
    put(plan, 4, record(FAILED, message="no space left"))
    put(plan, 5, record(INTERRUPTED))
    return plan


def ids(plan: Plan, *indices: int) -> set[str]:
    return {plan.runs[index].run_id for index in indices}


def asked(plan: Plan, action: str, **more: Any) -> Asked:
    return Asked(action, plan.runs_dir, "bits", **more)
