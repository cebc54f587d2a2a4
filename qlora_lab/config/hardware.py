"""What this machine is and does well, found without importing torch."""

import os
from dataclasses import dataclass
from pathlib import Path

# A CPU without one of these emulates bfloat16: measured three to five times slower than float32.
BFLOAT16_CPU_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
INTERESTING_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Hardware:
    cpu_model: str
    cpu_flags: frozenset[str]
    cores: int  # that this process may use
    gpus: tuple[str, ...]  # model names

    @property
    def instruction_sets(self) -> list[str]:
        return [flag for flag in INTERESTING_CPU_FLAGS if flag in self.cpu_flags]


def detect(proc: Path = Path("/proc")) -> Hardware:
    """Read the processor and the NVIDIA driver's list of GPUs.

    Args:
        proc: the proc file system; where it is missing, nothing but the core count is known.
    """
    fields = _first_cpu(proc / "cpuinfo")
    return Hardware(
        cpu_model=fields.get("model name", "unknown"),
        cpu_flags=frozenset(fields.get("flags", "").split()),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        gpus=_gpu_models(proc / "driver" / "nvidia" / "gpus"),
    )


def _first_cpu(cpuinfo: Path) -> dict[str, str]:
    if not cpuinfo.is_file():
        return {}
    first = cpuinfo.read_text().split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _gpu_models(folder: Path) -> tuple[str, ...]:
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or not folder.is_dir():
        return ()
    models = []
    for information in sorted(folder.glob("*/information")):
        named = [line for line in information.read_text().splitlines() if line.startswith("Model:")]
        models.append(named[0].partition(":")[2].strip() if named else "unknown GPU")
    return tuple(models)
