"""The records of a W&B run file as messages of W&B's own protocol."""

import time
from pathlib import Path
from typing import Any

from qlora_lab.tracking import wandb_file


def records(file: Path, timeout_s: float = 20.0) -> list[Any]:
    """Return every record of a .wandb file, in order, once its run has ended there: `finish` does not wait for it."""
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + timeout_s
    while True:
        found = [Record.FromString(content) for content in wandb_file.records(file.read_bytes(), wandb_file.Damage())]
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        assert time.monotonic() < deadline, f"{file} never came to its end"
        time.sleep(0.05)
