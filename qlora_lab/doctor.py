"""What this machine has and what of it qlora_lab uses: python -m qlora_lab.doctor."""

import sys
from collections.abc import Iterable

import torch

from qlora_lab.config.hardware import detect
from qlora_lab.models.base_cache import bases_folder, cached_bases
from qlora_lab.ops.registry import CUDA_KERNELS, KERNELS
from qlora_lab.runs.environment import PACKAGES, package_version
from qlora_lab.wheels import default_cache_dir


def report() -> Iterable[tuple[str, str]]:
    """Yield (what, finding) in the order in which they are printed."""
    hardware = detect()
    library = KERNELS.library
    yield "python", sys.version.split()[0]
    vectors = " ".join(hardware.instruction_sets) or "no vector instructions known"
    yield "cpu", f"{hardware.cpu_model}, {hardware.cores} cores, {vectors}"
    yield "gpus", ", ".join(hardware.gpus) or "none"
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads, {cuda()}"
    yield "kernels", str(KERNELS)
    yield "gpu kernels", str(CUDA_KERNELS)
    if library is not None:
        yield "library", str(library.path)
        yield "instruction sets", f"{', '.join(library.isas)} (the last one runs unless QLK_ISA names another)"
    if CUDA_KERNELS.library is not None:
        yield "gpu library", str(CUDA_KERNELS.library.path)
    bases, size = cached_bases(default_cache_dir())
    yield "quantized bases", f"{bases} in {bases_folder(default_cache_dir())}, {size / 1e9:.2f} GB (may be deleted)"
    for name in PACKAGES:
        if name != "torch":
            yield name, package_version(name) or "not installed"


def cuda() -> str:
    """Say what torch can do with a GPU."""
    if torch.version.cuda is None:
        return "built without CUDA"
    return f"CUDA {torch.version.cuda}" + ("" if torch.cuda.is_available() else ", which finds no GPU it can use")


def main() -> None:
    lines = list(report())
    width = max(len(what) for what, _ in lines)
    for what, finding in lines:
        print(f"{what:<{width}}  {finding}")


if __name__ == "__main__":
    main()
