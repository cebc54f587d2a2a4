"""What a worker does with the runs of its chunk: one of them, or one after the other until none is left.

Nothing is handed out: a worker takes a run by taking its lease. The warm process keeps its imports, and the quantized
base model of its last run.
"""

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import ConfigError, LeaseLostError, RunFolderError
from qlora_lab.runs.causes import CHANGED, INFRASTRUCTURE, NO_SPACE, RULES, STOPPED
from qlora_lab.runs.folder import FAILED, FINISHED, INTERRUPTED, RUNNING, RunFolder
from qlora_lab.runs.lease import Lease
from qlora_lab.sweep.breaker import Breaker, breaker_folder
from qlora_lab.sweep.chunk import POOL, Chunk
from qlora_lab.sweep.plan_file import code_commit, code_sha256
from qlora_lab.sweep.run_folders import PlannedFolders
from qlora_lab.sweep.settle import may_go_on

ELSEWHERE, HELD_BACK = "elsewhere", "held back"  # besides the states of a run
LAST_MOMENT_S = 120.0  # before its time is over, a pool worker begins no further run
CLAIM_POLL_S = 1.0


class Worker:
    """Executes runs of a chunk in this process.

    Args:
        stop_cause: asked for the cause to record when a run was told to stop.
        silent_cause: asked for the cause of an attempt that ended without a word, by the run's record.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        chunk: Chunk,
        *,
        stop_cause: Callable[[], str] = lambda: STOPPED,
        silent_cause: Callable[[dict[str, Any]], str] = lambda record: INFRASTRUCTURE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._chunk = chunk
        self._stop_cause = stop_cause
        self._silent_cause = silent_cause
        self._clock = clock
        self._began = clock()
        self._longest_s = 0.0
        self._bases: Any = None
        self._changed = changed_code(chunk)
        self._planned: PlannedFolders | None = None
        folder = breaker_folder(chunk.folder, chunk.generation, chunk.resource_class)
        self._breaker = Breaker(folder, chunk.max_failures)

    def one(self, index: int) -> str:
        """Execute one run, waiting for its lease until it is clear whether another process executes it.

        Returns:
            How it ended: a state, ELSEWHERE, or HELD_BACK by the circuit breaker or a full disk. A canary waits for who
            executes its run, since others wait to hear how that ends.
        """
        return self._unless_full(lambda: self._one(index))

    def _one(self, index: int) -> str:
        folder = self._chunk.run(index)
        claim = folder.claim()
        while self._chunk.is_open(index):
            reason = self._breaker.reason()
            if reason is not None:
                print(f"run {folder.run_id} is held back: {reason}", flush=True)
                return HELD_BACK
            lease = claim.attempt()
            if lease is not None:
                return self._execute(folder, index, lease)
            if claim.holder_moved and not self._chunk.canary:
                print(f"run {folder.run_id} is being executed by another process", flush=True)
                return ELSEWHERE
            time.sleep(CLAIM_POLL_S)
        return folder.state()

    def all(self, number: int) -> str:
        """Execute runs until none is left, or time is nearly up; begin where worker `number` has its share.

        Returns:
            FINISHED when no run is left that nobody executes, or FAILED if one of its own failed; INTERRUPTED when time
            is up or a run was told to stop; HELD_BACK when the circuit breaker says so, or the disk is full.
        """
        return self._unless_full(lambda: self._all(number))

    def _all(self, number: int) -> str:
        end = FINISHED
        claims = {index: self._chunk.run(index).claim() for index in self._order(number)}
        while claims:
            for index, claim in list(claims.items()):
                if not self._chunk.is_open(index):
                    del claims[index]
                    continue
                reason = self._breaker.reason()
                if reason is not None:
                    print(f"no further run is begun: {reason}", flush=True)
                    return HELD_BACK
                if self._time_is_up():
                    return INTERRUPTED
                lease = claim.attempt()
                if lease is not None:
                    del claims[index]
                    state = self._execute(self._chunk.run(index), index, lease)
                    if state == INTERRUPTED:
                        return INTERRUPTED
                    end = FAILED if state == FAILED else end
                elif claim.holder_moved:
                    del claims[index]
            if claims:  # held by processes that have not been seen to live: look again
                time.sleep(CLAIM_POLL_S)
        return end

    def _unless_full(self, work: Callable[[], str]) -> str:
        """Return how work ends: HELD_BACK where the disk is so full that not even a run's end can be recorded."""
        try:
            return work()
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            print(f"no further run is begun: {error}", flush=True)
            return HELD_BACK

    def _order(self, number: int) -> Iterator[int]:
        """Yield every run, first this worker's own block: neighbours share a base model."""
        runs, workers = len(self._chunk.run_ids), self._chunk.tasks * self._chunk.per_gpu
        first = number % workers * runs // workers
        yield from range(first, runs)
        yield from range(first)

    def _time_is_up(self) -> bool:
        if self._chunk.limit_s is None:
            return False
        left_s = self._chunk.limit_s - (self._clock() - self._began)
        return left_s < min(LAST_MOMENT_S, self._chunk.limit_s / 3) + self._longest_s

    def _execute(self, folder: RunFolder, index: int, lease: Lease) -> str:
        began = self._clock()
        try:
            state = self._refused(folder, index, lease) or self._run(folder, index, lease)
        except LeaseLostError as error:
            print(f"run {folder.run_id}: {error}", flush=True)
            return ELSEWHERE
        self._longest_s = max(self._longest_s, self._clock() - began)
        if state == FINISHED:
            self._breaker.finished()
        elif state == FAILED:
            self._breaker.failed(folder.run_id, folder.status() or {})
        return state

    def _run(self, folder: RunFolder, index: int, lease: Lease) -> str:
        try:
            config = self._complete(folder, lease)
            run = importlib.import_module("qlora_lab.run")  # torch comes in here, once
            if self._bases is None and self._chunk.mode == POOL:
                self._bases = importlib.import_module("qlora_lab.models.warm").WarmBase()
        except Exception as error:  # recorded, like everything else that keeps a run from its result
            self._end(folder, lease, error)
            return FAILED
        attempts = self._chunk.attempts[index]
        stop, bases = self._stop_cause, self._bases
        return str(run.execute(folder.path, attempts, lease=lease, stop_cause=stop, bases=bases, config=config))

    def _complete(self, folder: RunFolder, lease: Lease) -> RunConfig | None:
        """Write a new run's configuration, as it was planned; a pool reads those of all its runs at once."""
        if self._chunk.plan_file is None:
            return None
        if self._planned is None:
            run_ids = self._chunk.run_ids if self._chunk.mode == POOL else [folder.run_id]
            self._planned = PlannedFolders(Path(self._chunk.plan_file), run_ids)
        return self._planned.complete(folder, lease)

    def _refused(self, folder: RunFolder, index: int, lease: Lease) -> str | None:
        """Record why a run must not be executed, if so: it was planned with other code, or kills who executes it."""
        before = folder.status() or {}
        if before.get("state") == RUNNING:  # that attempt ended without a word
            cause = self._silent_cause(before)
            folder.lease = lease
            try:
                folder.end(INTERRUPTED, folder.elapsed_s(), cause=cause)
            except BaseException:
                lease.release()
                raise
            if not may_go_on(folder.status()):
                self._end(folder, lease, ConfigError(KILLS), cause)
                return FAILED
        if self._has_outgrown(folder, index):
            print(f"run {folder.run_id} needs more memory than this job has; the next command asks for it", flush=True)
            lease.release()
            return ELSEWHERE
        if self._changed is not None:
            with contextlib.suppress(RunFolderError):  # a plan that this code cannot read any more
                self._complete(folder, lease)
            self._end(folder, lease, ConfigError(self._changed), CHANGED)
            return FAILED
        return None

    def _has_outgrown(self, folder: RunFolder, index: int) -> bool:
        """Say whether the run's last attempt was in a job of this chunk, whose memory it outgrew."""
        status = folder.status() or {}
        more = RULES.get(status.get("cause") or "", RULES[INFRASTRUCTURE]).memory_factor > 1
        return self._chunk.resources is not None and more and status["attempt"] > self._chunk.attempts[index]

    def _end(self, folder: RunFolder, lease: Lease, error: Exception, cause: str | None = None) -> None:
        with folder.holding(lease):
            folder.begin()
            folder.end(FAILED, folder.elapsed_s(), error, cause=cause)
        print(f"run {folder.run_id} failed: {error}", flush=True)


KILLS = (
    "attempts at the run ended without a word until it was out of tries; look for what killed it (memory, a fault of "
    "native code) in its log and the nodes' logs; then `retry` tries it again"
)


def changed_code(chunk: Chunk) -> str | None:
    """Say that the code is not what the runs were submitted with; None where it is."""
    if chunk.code_sha256 in (None, code_sha256()):
        return None
    return (
        f"the code has changed since this run was submitted (at commit {chunk.commit or 'unknown'}, now "
        f"{code_commit() or 'unknown'}); check out what it was submitted with, or start the study again to plan "
        "its runs with the new code"
    )
