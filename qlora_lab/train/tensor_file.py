"""Writing tensors in the safetensors format, straight to disk and hashed on the way.

The library's own writer either holds a second copy of all tensors in memory (`save`) or hides a full disk
behind its own exception type (`save_file`). Files written here are read with the library.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write named tensors to `path`, flushed to the disk, and return the file's SHA-256.

    Raises:
        OSError: the disk is full or not writable; part of the file may be there.
    """
    return write_hashed(path, _safetensors_chunks(tensors, metadata or {}))


def write_hashed(path: Path, chunks: Iterator[bytes | memoryview]) -> str:
    """Write chunks of bytes to `path`, flushed to the disk, and return their SHA-256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _safetensors_chunks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The format: length of the header (8 bytes, little endian), the header in JSON, the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # readers map the tensors' bytes, which must lie at a multiple of 8
    yield len(encoded).to_bytes(8, "little")
    yield encoded
    for tensor in tensors.values():
        if tensor.numel():
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
