"""Why an attempt ended, told from what ended it."""

import errno

import pytest

from qlora_lab.errors import ConfigError, RunFolderError, TrainingError
from qlora_lab.runs.causes import CODE, DISK, GPU_MEMORY, HOST_MEMORY, INFRASTRUCTURE, NAN, RULES, STOPPED, cause_of


class OutOfMemoryError(RuntimeError):
    """As torch's, which is told by its name."""


def because_of(inner: BaseException, outer: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), GPU_MEMORY),
        (because_of(OutOfMemoryError("CUDA out of memory"), RuntimeError("the step failed")), GPU_MEMORY),
        (MemoryError(), HOST_MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 bytes"), HOST_MEMORY),
        (TrainingError("training stopped after step 3: the loss is not finite"), NAN),
        (TrainingError("the checkpoint is of another model"), CODE),
        (because_of(OSError(errno.ENOSPC, "No space left on device"), RunFolderError("not saved")), DISK),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), DISK),
        (OSError(errno.ESTALE, "Stale file handle"), INFRASTRUCTURE),
        (OSError(errno.ENOENT, "No such file or directory"), CODE),
        (KeyboardInterrupt(), STOPPED),
        (SystemExit(143), STOPPED),
        (ConfigError("adapter.rank must be 1 or more"), CODE),
    ],
    ids=lambda value: str(value)[:30],
)
def test_causes_are_told_apart(error: BaseException, cause: str) -> None:
    assert cause_of(error) == cause and cause in RULES
