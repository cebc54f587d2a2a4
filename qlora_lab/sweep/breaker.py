"""A circuit breaker without a daemon: workers hold back runs when the first ones of their class all failed alike."""

import hashlib
from pathlib import Path
from typing import Any

from qlora_lab.runs.files import to_json

# Faults of one machine or of nobody say nothing about the next run.
COUNTED = ("code", "nan", "gpu_memory", "host_memory", "changed")


class Breaker:
    """The fate of the first runs of a resource class, as files that workers on any node create.

    Args:
        folder: of this class and this submission.
        max_failures: that may be alike before any run has finished.
    """

    def __init__(self, folder: Path, max_failures: int) -> None:
        self._folder = folder
        self._max_failures = max_failures

    def finished(self) -> None:
        """Note that a run can finish: from now on failures are the runs' own."""
        if not self._works.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._works.touch()

    def failed(self, run_id: str, status: dict[str, Any]) -> None:
        """Note a failure of a run, unless it says nothing about others, or others have finished."""
        if status.get("cause") not in COUNTED or self._works.exists():
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        error = status.get("error") or {}
        (self._folder / f"failed-{_signature(status)}-{run_id}").write_text(
            to_json({"run_id": run_id, "cause": status["cause"], "message": error.get("message")}) + "\n"
        )

    def reason(self) -> str | None:
        """Return why no further run should start, None while there is no reason."""
        if not self._folder.is_dir() or self._works.exists():
            return None
        alike: dict[str, list[str]] = {}
        for file in self._folder.glob("failed-*"):
            _, signature, run_id = file.name.split("-")
            alike.setdefault(signature, []).append(run_id)
        for run_ids in alike.values():
            if len(run_ids) >= self._max_failures:
                return f"the first {len(run_ids)} runs all failed alike ({', '.join(sorted(run_ids)[:3])}, ...)"
        return None

    @property
    def works(self) -> bool:
        """Whether a run has finished."""
        return self._works.exists()

    @property
    def _works(self) -> Path:
        return self._folder / "works"


def breaker_folder(folder: Path, generation: str, resource_class: str) -> Path:
    return folder / "breaker" / f"{generation}-{resource_class}"


def _signature(status: dict[str, Any]) -> str:
    """Return what equal failures have in common: cause and error, without what differs from run to run."""
    error = status.get("error") or {}
    trace = [line for line in str(error.get("traceback", "")).splitlines() if line.startswith("  File ")]
    text = f"{status.get('cause')} {error.get('type')} {trace[-1:]}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]
