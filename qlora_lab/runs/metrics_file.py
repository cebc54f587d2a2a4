"""metrics.jsonl, as the attempt that has the run writes it."""

from collections.abc import Callable

from qlora_lab.runs.files import to_json
from qlora_lab.runs.folder import RunFolder
from qlora_lab.runs.lease import write_whole


class MetricsFile:
    """metrics.jsonl: a line is written whole, so that a killed run loses at most the one being written.

    The lines of earlier attempts are kept; none of them can add to the file once this attempt has opened it.

    Args:
        folder: held by this attempt.
        clock: gives the run's seconds, over all its attempts.
    """

    def __init__(self, folder: RunFolder, clock: Callable[[], float]) -> None:
        assert folder.lease is not None, "only who holds the run writes its metrics"
        self._lease = folder.lease
        self._file = self._lease.appending(folder.path / "metrics.jsonl")
        self._clock = clock

    def append(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """Write the line of a step, and return it.

        Raises:
            LeaseLostError: a later attempt has the run.
            OSError: the disk is full.
        """
        record = {"step": step, "time_s": round(self._clock(), 3), **metrics}
        self._lease.check()
        write_whole(self._file, (to_json(record) + "\n").encode())
        return record
