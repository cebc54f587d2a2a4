"""Rows of a data set on the Hugging Face hub, through `datasets`."""

from collections.abc import Iterator

from qlora_lab.config.schema import SourceConfig
from qlora_lab.data.records import Record
from qlora_lab.errors import DataError

SCRIPT_MESSAGE = "Dataset scripts are no longer supported"


def read_hub(source: SourceConfig) -> Iterator[Record]:
    """Yield the rows of one split of a hub data set.

    `split` may hold a slice, such as `train[:50000]`; `path`, where given, names the one file of the
    repository to load, such as `unified_chip2.jsonl`.

    Raises:
        DataError: no such data set, configuration, split or file; no network; a set that only a Python
            loading script can read.
    """
    import datasets  # half a second that only hub sets pay

    try:
        rows = datasets.load_dataset(
            source.hub_id,
            source.hub_config,
            split=source.split,
            revision=source.revision,
            data_files=source.path,
        )
    except (RuntimeError, OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        not_found = isinstance(error, datasets.exceptions.DatasetNotFoundError)
        raise DataError(hub_failure(source, error, not_found=not_found)) from error
    for number, columns in enumerate(rows, start=1):
        yield Record(f"row {number}", columns)


def hub_failure(source: SourceConfig, error: Exception, *, not_found: bool) -> str:
    """Say in one sentence why a hub data set did not load and what to do."""
    reason = " ".join(str(error).split())
    set_name = f"data.source.hub_id '{source.hub_id}'"
    download = "download one of its data files and use data.source.kind=file data.source.path=FILE"
    if SCRIPT_MESSAGE in reason:
        return (
            f"{set_name} needs a Python loading script, which `datasets` no longer runs; try "
            f"data.source.revision=refs/convert/parquet, or {download}"
        )
    if not_found:
        return (
            f"{set_name} was not found on the hub, or is gated ({reason}); check the id, log in with "
            f"`hf auth login`, or {download}"
        )
    if isinstance(error, ConnectionError):
        return (
            f"{set_name} could not be reached ({reason}); on a machine with a network load it once so that "
            f"it is in the cache, or {download}"
        )
    return f"{set_name} did not load ({reason}); check hub_config, split, revision and path, or {download}"
