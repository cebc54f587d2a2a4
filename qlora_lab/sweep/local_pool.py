"""A pool on this machine: workers of the same kind as on SLURM, started and replaced by this process."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from qlora_lab.sweep.chunk import Chunk
from qlora_lab.sweep.progress import SweepProgress

POLL_S = 0.5
GRACE_S = 60.0
MAX_DEATHS = 20  # of workers, over a whole pool; each run has a limit of its own


class LocalPool:
    """Args:
    gpus: what CUDA_VISIBLE_DEVICES says to each worker; None leaves it what it sees.
    """

    def __init__(self, chunk: Chunk, gpus: Sequence[str | None]) -> None:
        self._chunk = chunk
        self._gpus = gpus

    def run(self, progress: SweepProgress) -> None:
        """Return when no run is left; a worker that was killed is replaced.

        Raises:
            KeyboardInterrupt, SystemExit: after every worker was told to stop and has saved its run.
        """
        workers = {slot: self._start(slot) for slot in range(len(self._gpus))}
        deaths = 0
        try:
            while workers:
                for slot, process in list(workers.items()):
                    if process.poll() is None:
                        continue
                    del workers[slot]
                    if process.returncode < 0 and deaths < MAX_DEATHS and self._has_open_runs():
                        deaths += 1
                        workers[slot] = self._start(slot)
                progress.show()
                time.sleep(POLL_S)
        except BaseException:  # Ctrl-C, SIGTERM: no run goes on that nobody watches
            self._stop(list(workers.values()))
            raise
        progress.show(final=True)

    def _start(self, slot: int) -> subprocess.Popen[bytes]:
        gpu = self._gpus[slot]
        logs = self._chunk.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        environment |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {}
        with (logs / f"{self._chunk.nonce}-{slot}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "qlora_lab.sweep.slurm.worker", str(self._chunk.file), str(slot)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C in the terminal is ours to pass on
            )

    def _has_open_runs(self) -> bool:
        return any(self._chunk.is_open(index) for index in range(len(self._chunk.run_ids)))

    @staticmethod
    def _stop(workers: list[subprocess.Popen[bytes]]) -> None:
        print("stopping the running runs ...", file=sys.stderr, flush=True)
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                worker.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
