"""What nvcc makes of the kernels: nothing spilled, within the budgets, and the instructions they were written for."""

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cuda.emulator import ROOT, SOURCES, digest_of_sources, include_folders

NVCC = shutil.which("nvcc")
ARCHITECTURES = ("sm_90a", "sm_80")
REGISTERS = 128  # of a thread: then two blocks of 256 threads fit on a multiprocessor
REGISTERS_OF_TILES = 248  # 64 rows keep 64 sums and the next x; from 129 on a multiprocessor has one block anyway
SHARED_BYTES = 48 * 1024

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine"),
    pytest.mark.skipif("QLORA_LAB_GATE" not in os.environ, reason="make kernels-check compiles them, for two minutes"),
]


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel, from ptxas's report."""

    name: str
    stack_bytes: int
    spilled_bytes: int
    registers: int
    shared_bytes: int


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """The cubin of each source, and what ptxas said of it; kept until a source changes, or nvcc."""
    options = ["-std=c++17", "-O3", "-fmad=false", "--resource-usage", f"-arch={request.param}"]
    version = subprocess.run([NVCC, "--version"], check=True, capture_output=True).stdout
    folder = ROOT / "build" / "cubins" / digest_of_sources(version, Path(__file__).read_bytes()) / request.param
    folder.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in include_folders(tmp_path_factory.mktemp(request.param))]

    def compile_(source: Path) -> tuple[Path, str]:
        cubin, report = folder / f"{source.stem}.cubin", folder / f"{source.stem}.txt"
        if not report.exists():  # it is written last
            command = [NVCC, *options, *includes, "-cubin", source, "-o", cubin]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            report.write_text(done.stdout + done.stderr)
        return cubin, report.read_text()

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return dict(zip((source.stem for source in SOURCES), pool.map(compile_, SOURCES), strict=True))


def kernels(report: str) -> Iterator[Kernel]:
    pattern = (
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r"\s+ptxas info\s*: Used (\d+) registers(?:.*?(\d+) bytes smem)?"
    )
    for name, stack, stores, loads, registers, shared in re.findall(pattern, report):
        yield Kernel(name, int(stack), int(stores) + int(loads), int(registers), int(shared or 0))


def test_nothing_is_spilled_and_budgets_hold(compiled: dict[str, tuple[Path, str]]) -> None:
    found = [(source, kernel) for source, (_, report) in compiled.items() for kernel in kernels(report)]
    assert {source for source, _ in found} == {source.stem for source in SOURCES} - {"runtime"}
    for source, kernel in found:
        budget = REGISTERS_OF_TILES if source == "tiles" else REGISTERS
        assert (kernel.stack_bytes, kernel.spilled_bytes) == (0, 0), kernel
        assert kernel.registers <= budget and kernel.shared_bytes <= SHARED_BYTES, kernel


def disassembler() -> str | None:
    """Return nvdisasm: of the toolkit, or of the package nvidia-cuda-nvdisasm."""
    packages = Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin/nvdisasm")
    return shutil.which("nvdisasm") or next(map(str, packages), None)


def instructions(cubin: Path, tool: str) -> dict[str, set[str]]:
    """Return the instructions of each kernel."""
    text = subprocess.run([tool, cubin], check=True, capture_output=True, text=True).stdout
    result: dict[str, set[str]] = {}
    name = ""
    for line in text.splitlines():
        if section := re.match(r"\.text\.(\S+):", line):
            name = section[1]
        elif instruction := re.search(r"\*/\s+(?:@!?U?P\d+ +)?([A-Z][A-Z0-9.]+)", line):
            result.setdefault(name, set()).add(instruction[1])
    return result


def test_memory_moves_in_vectors_and_products_use_tensor_cores(compiled: dict[str, tuple[Path, str]]) -> None:
    tool = disassembler()
    if tool is None:
        pytest.skip("no nvdisasm on this machine; the package nvidia-cuda-nvdisasm has one")
    of_source = {source: instructions(cubin, tool) for source, (cubin, _) in compiled.items()}
    for source, of_kernel in of_source.items():
        for name, found in of_kernel.items():
            assert not any(i.startswith(("LDL", "STL")) for i in found), (source, name)

    def all_of(source: str, kernel: str, wanted: str, variant: str = "") -> bool:
        pattern = rf"\d{kernel}[IE]\w*{variant}"
        chosen = [found for name, found in of_source[source].items() if re.search(pattern, name)]
        assert chosen, f"no kernel {kernel} in {source}"
        return all(any(re.fullmatch(wanted, i) for i in found) for found in chosen)

    load16, store16 = r"LDG?\.E(\.\w+)*\.128(\.\w+)*", r"STG?\.E(\.\w+)*\.128(\.\w+)*"
    assert all_of("quantize", "quantize", load16)
    assert all_of("dequantize", "dequantize", store16)
    assert all_of("few_rows", "few_rows", load16)
    assert all_of("tiles", "tiles", load16) and all_of("tiles", "tiles", r"HMMA\.16816\.F32(\.BF16)?")
    for kernel in ("low_rank_grad_A", "low_rank_add"):
        assert all_of("low_rank", kernel, store16, variant="Lb1EEEv")
    for kernel in ("low_rank_down", "low_rank_grad_A", "low_rank_add"):
        assert all_of("low_rank", kernel, r"HMMA\.16816\.F32(\.BF16)?")
        assert all_of("low_rank", kernel, load16, variant="Lb1EEEv")  # where vectors fit
    assert all_of("adamw", "update", load16) and all_of("adamw", "update", store16)


def test_newer_gpus_get_ptx(tmp_path: Path) -> None:
    includes = [f"-I{path}" for path in include_folders(tmp_path)]
    for source in SOURCES:
        ptx = tmp_path / f"{source.stem}.ptx"
        subprocess.run(
            [str(NVCC), "-std=c++17", "-fmad=false", "-arch=compute_90", "-ptx", *includes, source, "-o", ptx],
            check=True,
        )
        assert "fma.rn.f32" not in ptx.read_text() or source.stem in ("few_rows",)  # written as fmaf there
