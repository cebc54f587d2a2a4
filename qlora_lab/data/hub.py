"""Rows of a data set on the Hugging Face hub, through `datasets`."""

import re
from collections.abc import Iterator

from qlora_lab.config.schema import RowsConfig
from qlora_lab.data.records import Record
from qlora_lab.errors import DataError

COMMIT = re.compile(r"^hf://datasets/.+@([0-9a-f]{40})/")  # in the address of a file, as `datasets` records it
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
            file; a set that only a Python loading script can read.
    """
    import datasets  # half a second that only hub sets pay

    try:
        rows = datasets.load_dataset(
            source.hub_id,
            source.hub_config,
            split=source.split,
            revision=source.revision,
            data_files=source.hub_files,
        )
    except (RuntimeError, OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(hub_failure(source, error, place)) from error
    found = (COMMIT.match(address) for address in rows.info.download_checksums or {})
    revisions.update({str(source.hub_id): match[1] for match in found if match is not None})
    for number, columns in enumerate(rows, start=1):
        yield Record(f"row {number}", columns)


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
