"""What one's own tasks of lm-evaluation-harness are made of: a folder of definitions, and the files of their rows."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from glob import glob
from pathlib import Path
from typing import Any

import yaml

from qlora_lab.hashing import file_sha256, remembered_sha256

# What `datasets` reads files with, by the name that stands in place of a set's
READERS = {  # names that `datasets` takes for a kind of files
    *("arrow", "csv", "json", "pandas", "parquet", "text", "xml", "hdf5", "lance", "iceberg", "vortex", "tsfile"),
    *("webdataset", "imagefolder", "audiofolder", "videofolder", "meshfolder", "pdffolder", "niftifolder"),
    *("conll", "eval", "harbor", "mmcif", "pdb", "genbank", "fasta", "fastq"),
}
LEFT_OUT = {"__pycache__", ".ipynb_checkpoints"}  # written beside definitions by those who read them


def definitions_sha256(folder: Path) -> str:
    """Return a hash of the files in a folder of definitions, and of the local files of rows that they name.

    Raises:
        OSError: a file cannot be read.
    """
    beside = [file for file in _files_below(folder) if not LEFT_OUT & set(file.relative_to(folder).parts)]
    lines = [f"{file.relative_to(folder)} {file_sha256(file)}\n" for file in beside]
    lines += [f"{name} {remembered_sha256(file)}\n" for name, file in sorted(local_rows(beside))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def local_rows(files: Iterable[Path]) -> set[tuple[str, Path]]:
    """Return the local files that definitions read rows from, each with the name they give it.

    Relative names are looked up where `datasets` does so: in the working directory, or in the folder that stands for a
    set. Files that a set of the hub is made of are no local ones, whatever lies here under their names.

    Args:
        files: definitions and others; definitions that are included from elsewhere are read too.
    """
    found: set[tuple[str, Path]] = set()
    for file in files:
        values = _merged(file, frozenset())
        for path in _texts(values.get("dataset_path")):
            options = values.get("dataset_kwargs")
            options = options if isinstance(options, Mapping) else {}
            if path in READERS:
                for name in [*_texts(options.get("data_files")), *_texts(options.get("data_dir"))]:
                    places = glob(name, recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
                    found |= {(name, row) for place in places for row in _files_below(Path(place))}
            elif Path(path).is_dir():  # read in place of a set of the hub with that id
                found |= {(path, row) for row in _files_below(Path(path))}
    return found


def sets_of_hub(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the ids of the hub sets that tasks read, by what the harness says of each task's configuration."""
    names = {str(config["dataset_path"]) for config in configs.values() if config.get("dataset_path")}
    return sorted(name for name in names if name not in READERS and not Path(name).is_dir())


class _Definitions(yaml.SafeLoader):
    """Reads YAML with tags that are nobody's here, such as the harness's `!function`, as nothing."""


_Definitions.add_multi_constructor("!", lambda *_: None)


def _read(file: Path) -> Mapping[str, Any]:
    """Return a definition; nothing where a file is none."""
    if not file.name.endswith((".yaml", ".yml", "_yaml")):
        return {}
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Definitions)
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}  # the harness passes over it too
    return values if isinstance(values, Mapping) else {}


def _merged(file: Path, above: frozenset[Path]) -> dict[str, Any]:
    """Return a definition on top of those that it includes; those `above` include it, and are not read again."""
    file = file.resolve()
    if file in above or not file.is_file():
        return {}
    values = _read(file)
    merged: dict[str, Any] = {}
    for name in _texts(values.get("include")):
        merged |= _merged(file.parent / name, above | {file})
    return merged | dict(values)


def _files_below(place: Path) -> list[Path]:
    return [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value that may be one, a list of them, or either by name."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)
