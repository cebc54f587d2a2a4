"""What a study set out to do, read from its plan.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_lab.errors import RunFolderError

PLAN_FILE = "plan.json"
STUDIES = "studies"  # runs/studies/NAME/PLAN/


@dataclass(frozen=True)
class StudyPlan:
    """The question, and each planned run's place on the axes.

    Attributes:
        places: run id -> axis -> the value that the run was given, the seed among them.
        fixed: dotted configuration keys that all runs share.
        paper: which numbers of the original study stand beside the arms; see `analysis.study.published`.
        compares: the axes that the question is about; none: the first.
    """

    name: str
    metric: str
    goal: str
    axes: list[str]
    places: dict[str, dict[str, str]]
    question: str | None = None
    paper_found: str | None = None  # by the original study
    caution: str | None = None  # what must not be concluded
    pipeline_check: bool = False  # random weights: the answer is no conclusion
    fixed: dict[str, Any] = field(default_factory=dict)
    created_at: str | None = None
    command: str | None = None
    paper: dict[str, Any] | None = None
    compares: list[str] = field(default_factory=list)


def read_plan(study_folder: Path) -> StudyPlan:
    """Read a study's plan.json.

    Raises:
        RunFolderError: there is none, or it is damaged.
    """
    path = study_folder / PLAN_FILE
    try:
        return plan_of(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise RunFolderError(f"{path} is not there; plan the study with qlora_lab.sweep") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(
            f"{path} is not a plan that can be read ({type(error).__name__}: {error}); "
            "plan the study again with sweep.action=plan"
        ) from error


def plan_of(record: Mapping[str, Any]) -> StudyPlan:
    """Return the plan that a plan.json holds, or would hold."""
    study = record["study"]
    return StudyPlan(
        name=study["name"],
        metric=study["metric"],
        goal=study["goal"],
        axes=list(record["axes"]),
        places={run["run_id"]: dict(run["axes"]) for run in record["runs"]},
        question=study.get("question"),
        paper_found=study.get("paper_found"),
        caution=study.get("caution"),
        pipeline_check=bool(study.get("pipeline_check")),
        fixed=dict(record.get("fixed") or {}),
        created_at=record.get("created_at"),
        command=record.get("command"),
        paper=record.get("paper"),
        compares=list(study.get("compares") or ()),
    )


def planned_folders(folder: Path) -> list[Path]:
    """Return the folders with a plan.json: `folder` itself and those directly inside it, the oldest plan first.

    A study's folder has one folder for each of its plans: runs/studies/NAME/PLAN/.
    """
    plans = [*folder.glob(PLAN_FILE), *folder.glob(f"*/{PLAN_FILE}")]
    return [path.parent for path in sorted(plans, key=lambda path: (path.stat().st_mtime, path))]


def runs_folder(study_folder: Path) -> Path:
    """Return the folder of the runs that a study's folder, old or new, lies in: the parent of `studies`."""
    folder = study_folder.resolve()
    above = next((parent for parent in folder.parents if parent.name == STUDIES), folder.parent)
    return above.parent
