"""Rows of a data set on the Hugging Face hub, through `datasets`."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from qlora_lab.config.schema import RowsConfig
from qlora_lab.data.records import Record
from qlora_lab.errors import DataError

if TYPE_CHECKING:
    from datasets import DatasetBuilder

Source = TypeVar("Source", bound=RowsConfig)

COMMIT = re.compile(r"[0-9a-f]{40}")
SCRIPT_MESSAGE = "Dataset scripts are no longer supported"


def read_hub(source: RowsConfig, revisions: dict[str, str], place: str = "data.source") -> Iterator[Record]:
    """Yield the rows of one split of a hub data set.

    `split` may hold a slice, such as `train[:50000]`; `hub_files`, where given, names the files of the
    repository to load, such as `unified_chip2.jsonl` or `*_zsopt_data/part.0.parquet`. `place` is where the source is
    configured, for errors.

    Args:
        revisions: gets the commit that was read, by the hub id.

    Raises:
        DataError: no such data set, revision, configuration, split or file; a gated one; no network; a damaged
            file; a set that only a Python loading script can read; another commit than the one that `revision` is.
    """
    builder = _prepared(source, place)
    if is_commit(builder.hash):
        revisions[str(source.hub_id)] = str(builder.hash)
    with _explained(source, place):
        for number, columns in enumerate(builder.as_dataset(split=source.split), start=1):
            yield Record(f"row {number}", columns)


def at_commit(source: Source, place: str = "data.source") -> Source:
    """Return a source with the commit that is read as its revision; as it is where that is not known, which is said.

    Raises:
        DataError: as `read_hub` does.
    """
    if source.kind != "hub" or is_commit(source.revision):
        return source
    commit = _prepared(source, place).hash
    if not is_commit(commit):
        print(
            f"the commit of {place}.hub_id '{source.hub_id}' is not known, so its rows are tokenized in every run; set "
            f"{place}.revision to a commit",
            file=sys.stderr,
            flush=True,
        )
        return source
    return replace(source, revision=commit)


def is_commit(revision: str | None) -> bool:
    return COMMIT.fullmatch(revision or "") is not None


def _prepared(source: RowsConfig, place: str) -> "DatasetBuilder":
    """Return a hub set in the local cache, with its commit as the builder's hash.

    Without a network a branch or a tag is read at the last commit that was prepared of the set, whatever it stood for;
    a line says so.
    """
    from datasets.packaged_modules.cache.cache import Cache

    with _explained(source, place):
        builder = _builder(source)
        if is_commit(source.revision):
            if builder.hash != source.revision:
                builder = _of_its_commit(builder, source, place)
        elif source.revision is not None and isinstance(builder, Cache):
            print(
                f"without a network {place}.revision '{source.revision}' cannot be looked up; read at commit "
                f"{builder.hash}, the last prepared here",
                file=sys.stderr,
                flush=True,
            )
        builder.download_and_prepare()
    return builder


def _builder(source: RowsConfig) -> "DatasetBuilder":
    import datasets  # half a second that only hub sets pay
    from datasets.packaged_modules.cache.cache import Cache

    asked = (source.hub_id, source.hub_config)
    named = {"revision": source.revision, "data_files": source.hub_files}
    builder = datasets.load_dataset_builder(*asked, **named)
    if source.hub_files is None or isinstance(builder, Cache):
        return builder
    # Without a network `datasets` looks for files that were asked for by name in a folder that it does not write.
    folder = datasets.BuilderConfig(source.hub_config or "default").create_config_id({"data_files": source.hub_files})
    return datasets.load_dataset_builder(*asked, **named, config_id=folder)


def _of_its_commit(latest: "DatasetBuilder", source: RowsConfig, place: str) -> "DatasetBuilder":
    """Return a set at the commit that is asked for; without a network `datasets` gives the last that it prepared."""
    from datasets.packaged_modules.cache.cache import Cache

    *_, config_id, version, commit = Path(latest.cache_dir).parts
    if not Path(latest.cache_dir).with_name(str(source.revision)).is_dir():
        raise DataError(
            f"{place}.hub_id '{source.hub_id}' is in the local hub cache at commit {commit}, and not at "
            f"{place}.revision '{source.revision}'; load that once on a machine with a network, or set the other"
        )
    return Cache(
        repo_id=source.hub_id,
        dataset_name=latest.dataset_name,
        config_name=config_id,
        version=version,
        hash=source.revision,
    )


@contextmanager
def _explained(source: RowsConfig, place: str) -> Iterator[None]:
    import datasets
    import pyarrow

    try:
        yield
    except DataError:
        raise
    except (RuntimeError, OSError, ValueError, pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise DataError(hub_failure(source, error, place)) from error


def hub_failure(source: RowsConfig, error: Exception, place: str) -> str:
    """Say in one sentence why a hub data set did not load and what to do.

    `datasets` raises one kind of error for what is missing, gated or at another revision, so its words tell.
    """
    reason = " ".join(str(error.__cause__ or error).split())
    words = str(error)
    name = f"{place}.hub_id '{source.hub_id}'"
    local = f"give a local copy of its rows with {place}.path=FILE"
    if SCRIPT_MESSAGE in words:
        return (
            f"{name} needs a Python loading script, which `datasets` no longer runs; try "
            f"{place}.revision=refs/convert/parquet, or {local}"
        )
    if "is a gated dataset" in words:
        return (
            f"{name} is gated on the hub: accept its terms on https://huggingface.co/datasets/{source.hub_id} and set "
            f"HF_TOKEN to a token of that account (or `hf auth login`), or {local}"
        )
    if words.startswith("Revision "):
        return f"{name} has no {place}.revision '{source.revision}' on the hub; set one of its commits, or {local}"
    if "doesn't exist on the Hub or cannot be accessed" in words:
        return (
            f"{name} was not found on the hub, or is private; check the id, set HF_TOKEN to a token that may see it, "
            f"or {local}"
        )
    if isinstance(error, ConnectionError):
        return (
            f"{name} is not in the local hub cache, and the hub could not be reached ({words.splitlines()[0]}); load "
            f"it once on a machine with a network and set HF_HOME to that cache, or {local}"
        )
    asked = ", ".join(
        f"{key} '{given}'"
        for key in ("hub_config", "hub_files", "split", "revision")
        if (given := getattr(source, key)) is not None
    )
    return f"{name} did not load with {asked} ({reason}); check these keys of {place}, or {local}"
