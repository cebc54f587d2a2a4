"""What sweep.action=plan shows of a plan besides its runs: memory, what would be submitted, time, disk."""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from qlora_lab.config.refusals import explain
from qlora_lab.sweep.forecast import Forecast, forecast, waiting
from qlora_lab.sweep.needs import MemoryGroup, memory_groups, memory_text
from qlora_lab.sweep.plan import Plan
from qlora_lab.sweep.plan_file import code_commit
from qlora_lab.sweep.site import Submission, submission
from qlora_lab.sweep.states import REFUSED


@dataclass(frozen=True)
class Preview:
    """A plan, and what it takes to execute what is left of it.

    Attributes:
        forecast: None where nothing is left.
    """

    plan: Plan
    memory: list[MemoryGroup]
    submission: Submission
    forecast: Forecast | None

    def text(self) -> str:
        """Return the preview for a person."""
        code = f"code: {code_commit() or 'of no commit'}"
        parts = [self.plan.text(), code, memory_text(self.memory), self.submission.text()]
        return "\n".join([*parts, *([self.forecast.text()] if self.forecast is not None else [])])

    def to_json(self) -> str:
        """Return the preview for a program; keys stay what they are."""
        plan, submitted = self.plan, self.submission
        study = plan.runs[0].config.study
        states = Counter([*(run.state for run in plan.runs), *(REFUSED for _ in plan.refused)])
        unfit = [{"run_id": run.run_id, "axes": run.axes, "reason": run.refusal} for run in plan.runs if run.is_refused]
        impossible = [{"run_id": None, "axes": each.axes, "reason": explain(each.error)} for each in plan.refused]
        values: dict[str, Any] = {
            "study": plan.name,
            "question": study.question,
            "folder": str(plan.folder),
            "commit": code_commit(),
            "axes": plan.axis_names,
            "states": dict(states),
            "repeated": plan.repeated,
            "runs": [{"run_id": run.run_id, "axes": run.axes, "state": run.state} for run in plan.runs],
            "refused": [*unfit, *impossible],
            "memory": [asdict(group) for group in self.memory],
            "submission": {
                "launcher": submitted.launcher.kind,
                "runs": submitted.runs,
                "queued": submitted.queued,
                "arrays": submitted.arrays,
                "tasks": submitted.tasks,
                "left": submitted.left,
                "not_known": submitted.not_known,
                "note": "\n".join(submitted.notes) or None,
            },
            "forecast": asdict(self.forecast) if self.forecast is not None else None,
        }
        return json.dumps(values, ensure_ascii=False, indent=2)


def preview_of(plan: Plan) -> Preview:
    """Return the preview of a plan.

    Raises:
        ConfigError: SLURM has not what is asked for.
    """
    first = plan.runs[0].config
    left = waiting(plan, retry_failed=first.sweep.retry_failed)
    return Preview(
        plan=plan,
        memory=memory_groups((run.config, run.need) for run in plan.runs if run.need is not None),
        submission=submission(plan, left, first.launcher),
        forecast=forecast(plan, left) if left else None,
    )
