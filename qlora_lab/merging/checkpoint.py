"""The tensors of a base model by name, each read by itself: from its files, or from a model in memory."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from qlora_lab.errors import ModelError
from qlora_lab.models.location import Location, explained

# The index of several files, and the name of a single one.
LAYOUTS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)


class Checkpoint(Protocol):
    """Tensors by name, in the order in which they are stored."""

    @property
    def names(self) -> list[str]:
        """Every name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU; the memory may be a map of the file and must not be written to."""


class FileCheckpoint:
    """A checkpoint of transformers, in safetensors or torch's own format, mapped and not loaded.

    Raises:
        ModelError: a file is missing or damaged.
    """

    def __init__(self, location: Location) -> None:
        self._location = location
        self._handles: dict[str, Any] = {}
        for file in checkpoint_files(location):
            with explained(location, "model"):
                handle = (
                    _SafetensorsFile(file)
                    if file.suffix == ".safetensors"
                    else torch.load(file, map_location="cpu", mmap=True, weights_only=True)
                )
                self._handles |= dict.fromkeys(handle.keys(), handle)

    @cached_property
    def names(self) -> list[str]:
        return list(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        handle = self._handles[name]
        return handle.shape(name) if isinstance(handle, _SafetensorsFile) else tuple(handle[name].shape)

    def read(self, name: str) -> Tensor:
        with explained(self._location, "model"):
            tensor: Tensor = self._handles[name][name]
        return tensor


class ModelCheckpoint:
    """The parameters of a model in memory; tied ones once."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


class _SafetensorsFile:
    def __init__(self, file: Path) -> None:
        self._file = safe_open(file, framework="pt", device="cpu")

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


def checkpoint_files(location: Location) -> list[Path]:
    """Return the files that a model's weights lie in, fetching them from the hub where they are not in its cache.

    Raises:
        ModelError: there are none, or some are missing.
    """
    for index, single in LAYOUTS:
        listing = fetched(location, index)
        if listing is not None:
            with explained(location, "model"):
                names = sorted(set(json.loads(listing.read_text(encoding="utf-8"))["weight_map"].values()))
            files = {name: fetched(location, name) for name in names}
            missing = [name for name, file in files.items() if file is None]
            if missing:
                raise ModelError(f"{location.name} lacks {missing[0]}, which its {index} names; {location.remedy}")
            return [file for file in files.values() if file is not None]
        alone = fetched(location, single)
        if alone is not None:
            return [alone]
    raise ModelError(
        f"{location.name} has no weights: none of {', '.join(name for pair in LAYOUTS for name in pair)} is there; "
        f"{location.remedy}"
    )


def fetched(location: Location, name: str) -> Path | None:
    """Return a file of a model, from the hub where it is not in its cache; None where the model has none such."""
    if not location.on_hub:
        file = Path(location.name) / name
        return file if file.is_file() else None
    with explained(location, "model"):
        found = cached_file(
            location.name, name, revision=location.revision, _raise_exceptions_for_missing_entries=False
        )
    return None if found is None else Path(found)
