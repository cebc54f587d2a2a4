import hashlib
from pathlib import Path

import safetensors.torch
import torch

from qlora_lab.train.tensor_file import write_tensors


def test_the_library_reads_back_every_type_and_shape(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(3, 5),
        "transposed": torch.randn(3, 5).T,
        "strided": torch.randn(8)[::2],
        "double": torch.randn(2, dtype=torch.float64),
        "half": torch.randn(3).half(),
        "brain": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(4.0),
        "empty": torch.zeros(0, 3),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "long": torch.tensor([2**40]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    digest = write_tensors(tmp_path / "file", tensors)
    read = safetensors.torch.load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    assert digest == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
