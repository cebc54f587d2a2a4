"""The folder of one evaluation of one model: which benchmark or prompts, what came out, item by item.

RUN/evaluations/NAME-HASH/  config.yaml  result.json  items.jsonl or answers.jsonl

HASH is of the settings that decide the result, so that the same evaluation is the same folder: a finished one is not
repeated, one that was interrupted is gone on with.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qlora_lab.errors import RunFolderError
from qlora_lab.runs.files import read_json, to_json, whole_lines, write_atomic, write_json, write_json_lines
from qlora_lab.runs.lease import POLL_S, Claim, Lease

HASH_LENGTH = 8  # hex digits; a run has a handful of evaluations


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Return the first digits of a SHA-256 over the canonical JSON of settings."""
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:HASH_LENGTH]


class EvaluationFolder:
    """Paths and files of one evaluation.

    Args:
        subject: the folder of the run, or of the base model alone.
        name: of the benchmark or the set of prompts.
        settings: what decides the result, besides the model.
    """

    def __init__(self, subject: Path, name: str, settings: Mapping[str, Any]) -> None:
        self.path = subject / "evaluations" / f"{name}-{settings_hash(settings)}"
        self.settings = settings
        self.lease: Lease | None = None  # held inside `lock`

    def is_finished(self) -> bool:
        return (self.path / "result.json").is_file()

    def result(self) -> dict[str, Any]:
        """Return the content of result.json.

        Raises:
            RunFolderError: the file is damaged.
        """
        file = self.path / "result.json"
        try:
            found = read_json(file)
        except ValueError as error:
            raise RunFolderError(f"{file} is damaged ({error}); remove it, and the evaluation is made again") from error
        assert isinstance(found, dict)
        return found

    def write_config(self, further: Mapping[str, Any]) -> None:
        """Write config.yaml: the settings, and what tells of the model and the machine, but is no part of the hash."""
        values = {"settings": dict(self.settings), **further}
        write_atomic(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(values)), self.lease)

    def write_items(self, records: list[dict[str, Any]]) -> None:
        """Write items.jsonl: one record for each item of a benchmark."""
        write_json_lines(self.path / "items.jsonl", records, self.lease)

    def answers(self) -> list[dict[str, Any]]:
        """Return the whole lines of answers.jsonl; half of one that a killed process left is cut off the file.

        Raises:
            RunFolderError: another line is damaged.
        """
        file = self.path / "answers.jsonl"
        if not file.is_file():
            return []
        lines, torn = whole_lines(file)
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise RunFolderError(
                    f"{file}, line {number} is damaged ({error}); remove the line, and its prompt is answered again"
                ) from error
        if torn:
            self.write_answers(records)
        return records

    def append_answers(self, records: list[dict[str, Any]]) -> None:
        """Add lines to answers.jsonl; they are on disk when this returns."""
        assert self.lease is not None
        self.lease.check()
        with (self.path / "answers.jsonl").open("a", encoding="utf-8") as file:
            file.write("".join(to_json(record) + "\n" for record in records))
            file.flush()
            os.fsync(file.fileno())

    def write_answers(self, records: list[dict[str, Any]]) -> None:
        """Write all of answers.jsonl."""
        write_json_lines(self.path / "answers.jsonl", records, self.lease)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json, which finishes the evaluation."""
        write_json(self.path / "result.json", dict(result), self.lease)

    @contextmanager
    def lock(self, *, poll_s: float = POLL_S) -> Iterator[None]:
        """Hold the evaluation, waiting while another process makes it; who dies or falls silent loses it."""
        self.path.mkdir(parents=True, exist_ok=True)
        told = f"{self.path} is being written by another process; waiting for it"
        self.lease = lease = Claim(self.path).wait(told, poll_s=poll_s, log=partial(print, flush=True))
        try:
            yield
        finally:
            self.lease = None
            lease.release()
            with contextlib.suppress(OSError):  # nothing was written
                self.path.rmdir()
