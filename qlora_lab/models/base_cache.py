"""Quantized base models kept on disk, so that a thousand runs quantize a model once.

    CACHE/bases/KEY/quantized.safetensors    the quantized layers, as they are in memory (quant/held.py)
    CACHE/bases/KEY/model*.safetensors       all other weights
    CACHE/bases/KEY/manifest.json            what KEY is a hash of, and a checksum of every other file

KEY stands for the content of the original files, the quantization, the dtype and kind of device, and the versions of
what writes here. A base appears whole or not at all. Of processes that quantize the same model at once, one writes it,
and the others go on with what they have. Weights are read through memory maps, so runs on one machine share them.
Nothing is deleted by itself: the whole folder may be deleted at any time when no run is loading.
"""

import copy
import fcntl
import hashlib
import json
import logging
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
import xxhash
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from qlora_lab.adapters.new_folder import new_folder
from qlora_lab.config.schema import CLASSIFICATION
from qlora_lab.models.location import Location
from qlora_lab.quant.held import write_held
from qlora_lab.quant.quantizer import QloraLabQuantizer
from qlora_lab.quant.settings import QloraLabConfig

BASE_FORMAT = 1  # raised whenever other bytes would be written for the same model
MANIFEST = "manifest.json"
KEY_DIGITS = 16
CHUNK_BYTES = 2**22
SHARE_OF_FREE = 0.5  # of the free disk, that a base may take at most
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedBase:
    """A place in the cache, filled or not.

    Attributes:
        described: what the folder's name is a hash of.
        config: of the model, saying that the checkpoint holds our layers' buffers.
    """

    folder: Path
    described: dict[str, Any]
    config: PreTrainedConfig

    @property
    def location(self) -> Location:
        return Location(str(self.folder), "main", "delete it, and it is quantized again")

    def is_whole(self) -> bool:
        """Say whether the base is there, every byte as it was written; a damaged one is reported in a line."""
        if not (self.folder / MANIFEST).is_file():
            return False
        fault = _fault(self.folder)
        if fault is not None:
            logger.warning("the quantized base in %s is damaged (%s); it is quantized again", self.folder, fault)
        return fault is None

    def keep(self, model: PreTrainedModel, new: Collection[str]) -> None:
        """Write a base that was just quantized, unless another process does or has; a run never fails by it.

        Args:
            new: weights that are this run's own, drawn from its seed.
        """
        needed = sum(tensor.nbytes for tensor in model.state_dict().values())
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with _lock(self.folder.with_name(f".{self.folder.name}.lock")) as is_ours:
                if not is_ours or ((self.folder / MANIFEST).is_file() and _fault(self.folder) is None):
                    return
                free = shutil.disk_usage(self.folder.parent).free
                if needed > SHARE_OF_FREE * free:
                    raise OSError(f"it takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
                for left in self.folder.parent.glob(f".{self.folder.name}.????????*"):  # by a process that died
                    shutil.rmtree(left, ignore_errors=True)
                with new_folder(self.folder) as fresh:
                    self._write(model, new, fresh)
        except (OSError, SafetensorError) as error:
            logger.warning("the quantized base is not kept in %s (%s); the run goes on", self.folder.parent, error)

    def _write(self, model: PreTrainedModel, new: Collection[str], folder: Path) -> None:
        quantizer = model.hf_quantizer
        assert isinstance(quantizer, QloraLabQuantizer)  # only such models are kept
        with quantizer.saving("held"), _without(model, new):
            model.save_pretrained(folder)
        write_held(model, folder)
        (folder / "config.json").unlink()  # the original's is used
        checksums = {path.name: checksum(path) for path in sorted(folder.iterdir())}
        text = json.dumps({"key": self.described, "checksums": checksums}, indent=2) + "\n"
        manifest = folder / MANIFEST
        manifest.write_text(text, encoding="utf-8")
        for path in folder.iterdir():
            path.chmod(manifest.stat().st_mode)  # safetensors lets nobody else read its files


@contextmanager
def _without(model: PreTrainedModel, names: Collection[str]) -> Iterator[None]:
    """Let `save_pretrained` leave weights out."""
    before = model._keys_to_ignore_on_save
    model._keys_to_ignore_on_save = {*(before or ()), *names}
    try:
        yield
    finally:
        model._keys_to_ignore_on_save = before


def cached_base(
    cache_dir: Path,
    content: str | None,
    config: PreTrainedConfig,
    quantization: QloraLabConfig,
    device: str,
    task: str,
) -> CachedBase | None:
    """Return the place of a quantized model; None where nothing stands for its content.

    Args:
        content: stands for the files of the original model, as a hash or a commit does.
        config: of the original model.
    """
    if content is None:
        return None
    described = {
        "content": content,
        "quantization": quantization.to_dict(),
        "device": device,
        "format": BASE_FORMAT,
        "transformers": transformers.__version__,
    }
    if task == CLASSIFICATION:  # other layers of the same files, whose own head may fit so many classes or not
        described |= {"task": task, "labels": config.num_labels}
    held = copy.deepcopy(config)
    held.quantization_config = {**quantization.to_dict(), "as_held": True}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    return CachedBase(bases_folder(cache_dir) / digest[:KEY_DIGITS], described, held)


def bases_folder(cache_dir: Path) -> Path:
    return cache_dir / "bases"


def cached_bases(cache_dir: Path) -> tuple[int, int]:
    """Return how many bases there are, and their bytes."""
    manifests = list(bases_folder(cache_dir).glob(f"*/{MANIFEST}"))
    return len(manifests), sum(file.stat().st_size for manifest in manifests for file in manifest.parent.iterdir())


def checksum(path: Path) -> str:
    """Return the 128-bit XXH3 of a file: it finds damage at the speed of memory, and is no protection from an enemy."""
    digest = xxhash.xxh3_128()
    buffer = bytearray(CHUNK_BYTES)
    with path.open("rb") as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def _fault(folder: Path) -> str | None:
    """Return what is wrong with a base, or None."""
    try:
        expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["checksums"]
        for name, value in expected.items():
            if checksum(folder / name) != value:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Take a lock between processes if it is free, and say whether that went well; the kernel frees it at our end."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
