"""Which kernels run on CUDA tensors, and why not others: every reason in one sentence."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_lab.errors import KernelError
from qlora_lab.ops.formats import FORMATS
from qlora_lab.ops.native.cuda_library import CUDA_FILE, VERSION, CudaLibrary
from qlora_lab.ops.native.library import FILE, PATH_VARIABLE
from qlora_lab.ops.native.load import DIFFERENTIABLE, OPS, CudaKernels, find_cuda_library, load_cuda_kernels
from qlora_lab.ops.registry import CUDA_KERNELS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that libraries load from, on a machine that seems to have an H200."""
    (tmp_path / FILE).touch()
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path))
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    return tmp_path


def test_a_library_for_the_gpu_is_loaded(folder: Path, emulated: CudaLibrary) -> None:
    shutil.copy(emulated.path, folder / CUDA_FILE)
    library = find_cuda_library()
    assert library.path == folder / CUDA_FILE
    assert str(CudaKernels(library, None, "")) == "native CUDA (built with 13.0, the driver knows 13.0)"
    assert library.device(0).capability == 90


def test_every_reason_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelError, match=rf"no {CUDA_FILE} in .*; `pip install -e \.` builds it where it finds nvcc"):
        find_cuda_library()
    (folder / CUDA_FILE).write_bytes(b"not a library")
    with pytest.raises(KernelError, match=f"{CUDA_FILE} does not load"):
        find_cuda_library()
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5))
    with pytest.raises(KernelError, match=r"compute capability 7\.5, and the kernels need 8\.0"):
        find_cuda_library()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(KernelError, match="torch finds no GPU that it can use"):
        find_cuda_library()
    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(KernelError, match="torch was built without CUDA"):
        find_cuda_library()
    monkeypatch.setenv(PATH_VARIABLE, "reference")
    with pytest.raises(KernelError, match=f"{PATH_VARIABLE}=reference asks for it"):
        find_cuda_library()


def test_a_gpu_that_is_too_old_runs_the_references(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A T4, whatever library lies there: nothing is registered for it, and the line for the run's record says why."""
    (folder / CUDA_FILE).write_bytes(b"built for newer ones")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5))
    registered: list[str] = []
    own = torch.library.Library("qlora_lab_test_of_a_t4", "FRAGMENT")
    monkeypatch.setattr(own, "impl", lambda name, *_: registered.append(name))
    kernels = load_cuda_kernels(own)
    assert registered == [] and kernels.library is None
    assert str(kernels) == (
        "reference (pure torch): the GPU has compute capability 7.5, and the kernels need 8.0 (Ampere) or more"
    )


AS_ON_A_T4 = """
import sys
import torch

torch.version.cuda, torch.cuda.is_available, torch.cuda.get_device_capability = "12.6", lambda: True, lambda *_: (7, 5)
from qlora_lab.ops.native.load import OPS, kernel_of
from qlora_lab.ops.registry import CUDA_KERNELS
import qlora_lab.quant.linear

print(CUDA_KERNELS)
for name in (f"qlora_lab::{name}" for op in OPS for name in dict.fromkeys((op, kernel_of(op)))):
    own = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    print(name, own, torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "CUDA"))
"""


def test_on_a_gpu_that_is_too_old_every_op_has_its_reference(folder: Path) -> None:
    """Asked of torch's table of kernels for CUDA tensors, in a process that finds a T4 when it starts."""
    (folder / CUDA_FILE).write_bytes(b"built for newer ones")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", AS_ON_A_T4], capture_output=True, text=True, check=True, env=environment
    )
    said, *ops = done.stdout.splitlines()
    assert said.endswith("the GPU has compute capability 7.5, and the kernels need 8.0 (Ampere) or more")
    assert len(ops) == len(OPS) + len(DIFFERENTIABLE)
    assert [op.split()[1:] for op in ops] == [["False", "True"]] * len(ops)


def test_a_folder_that_is_asked_for_must_hold_kernels_for_the_gpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = torch.library.Library("qlora_lab_test_of_a_folder", "FRAGMENT")
    with pytest.raises(KernelError, match=f"^{PATH_VARIABLE}={folder}: no {CUDA_FILE} in {folder}; .*; unset it"):
        load_cuda_kernels(own).require()
    (folder / CUDA_FILE).write_bytes(b"stale")
    with pytest.raises(KernelError, match=f"{CUDA_FILE} does not load"):
        load_cuda_kernels(own).require()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    load_cuda_kernels(own).require()  # a folder for the CPU alone, where nothing else is
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv(PATH_VARIABLE, "reference")
    load_cuda_kernels(own).require()


def test_a_library_of_another_version_is_refused(emulated: CudaLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_lab.ops.native.cuda_library.VERSION", 99)
    with pytest.raises(KernelError, match=f"is of version {VERSION} and this code needs 99; build the kernels again"):
        CudaLibrary(emulated.path)


def test_a_library_numbers_its_own_formats(emulated: CudaLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not this code, whose formats may have got another order since the library was built."""
    backwards = dict(reversed(FORMATS.items()))
    monkeypatch.setattr("qlora_lab.ops.native.library.FORMATS", backwards)
    assert CudaLibrary(emulated.path).format_index == emulated.format_index
    monkeypatch.setattr("qlora_lab.ops.native.library.FORMATS", {**backwards, "nf5": FORMATS["nf4"]})
    with pytest.raises(KernelError, match="was built from other number formats; build it again"):
        CudaLibrary(emulated.path)


def test_the_doctor_says_what_runs_on_gpus() -> None:
    pytest.importorskip("transformers")  # which the doctor looks at; a machine lent for its GPU may not have it
    from qlora_lab.doctor import report

    assert dict(report())["gpu kernels"] == str(CUDA_KERNELS)
