"""What a study set out to do, read from its plan.json."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_lab.errors import RunFolderError


@dataclass(frozen=True)
class StudyPlan:
    """The question, and each planned run's place on the axes.

    Attributes:
        places: run id -> axis -> the value that the run was given, the seed among them.
        fixed: dotted configuration keys that all runs share.
    """

    name: str
    metric: str
    goal: str
    axes: list[str]
    places: dict[str, dict[str, str]]
    question: str | None = None
    fixed: dict[str, Any] = field(default_factory=dict)
    created_at: str | None = None
    command: str | None = None


def read_plan(study_folder: Path) -> StudyPlan:
    """Read a study's plan.json.

    Raises:
        RunFolderError: there is none, or it is damaged.
    """
    path = study_folder / "plan.json"
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        return StudyPlan(
            name=plan["study"]["name"],
            metric=plan["study"]["metric"],
            goal=plan["study"]["goal"],
            axes=list(plan["axes"]),
            places={run["run_id"]: dict(run["axes"]) for run in plan["runs"]},
            question=plan["study"].get("question"),
            fixed=dict(plan.get("fixed") or {}),
            created_at=plan.get("created_at"),
            command=plan.get("command"),
        )
    except FileNotFoundError as error:
        raise RunFolderError(f"{path} is not there; plan the study with qlora_lab.sweep") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(
            f"{path} is not a plan that can be read ({type(error).__name__}: {error}); "
            "plan the study again with sweep.action=plan"
        ) from error
