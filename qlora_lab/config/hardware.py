"""What this machine is and does well, found without importing torch."""

import os
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# A CPU without one of these emulates bfloat16: measured three to five times slower than float32.
BFLOAT16_CPU_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
NVIDIA_SMI_S = 20.0  # the driver may have to wake up
INTERESTING_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Hardware:
    cpu_model: str
    cpu_flags: frozenset[str]
    cores: int  # that this process may use
    gpus: tuple[str, ...]  # model names, of those that this process may use
    gpu_ids: tuple[str, ...] = ()  # what CUDA_VISIBLE_DEVICES calls each of them
    memory_bytes: int | None = None  # that this process may use; None: not known

    @property
    def instruction_sets(self) -> list[str]:
        return [flag for flag in INTERESTING_CPU_FLAGS if flag in self.cpu_flags]


def detect(
    proc: Path = Path("/proc"), devices: Path = Path("/dev"), control_groups: Path = Path("/sys/fs/cgroup")
) -> Hardware:
    """Read the processor and the NVIDIA driver's list of GPUs.

    Args:
        proc: the proc file system; where it is missing, nothing but the core count is known.
        devices: where GPUs have their files, also where a container hides what the driver says of them.
        control_groups: where a container finds the limit of its memory.
    """
    fields = _first_cpu(proc / "cpuinfo")
    everything = _all_gpus(proc / "driver" / "nvidia" / "gpus") or [{} for _ in devices.glob("nvidia[0-9]*")]
    gpus = _visible(everything, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Hardware(
        cpu_model=fields.get("model name", "unknown"),
        cpu_flags=frozenset(fields.get("flags", "").split()),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        gpus=tuple(model for _, model in gpus),
        gpu_ids=tuple(identifier for identifier, _ in gpus),
        memory_bytes=_memory_bytes(proc / "meminfo", control_groups),
    )


@cache
def gpu_memory_bytes(gpu_ids: tuple[str, ...]) -> int | None:
    """Return the memory of the smallest of these GPUs, by nvidia-smi; None where it does not say.

    Args:
        gpu_ids: of a `Hardware`.
    """
    query = ["nvidia-smi", f"--id={','.join(gpu_ids)}", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=NVIDIA_SMI_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    sizes = [int(line) for line in done.stdout.split() if line.isdecimal()]  # in MiB
    return min(sizes) << 20 if sizes and done.returncode == 0 else None


def product_dtype(hardware: Hardware, device: str, dtype: str) -> str:
    """Return the dtype in which attention and output head multiply what they get, and give back, in `dtype`.

    Args:
        device: "cpu" or "cuda".
        dtype: of the model's computation, such as "bfloat16".
    """
    emulated = device == "cpu" and dtype == "bfloat16" and not hardware.cpu_flags & BFLOAT16_CPU_FLAGS
    return "float32" if emulated else dtype


def _memory_bytes(meminfo: Path, control_groups: Path) -> int | None:
    """Return the machine's memory, or the limit of the container around us where that is less."""
    found = re.search(r"^MemTotal:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.is_file() else None
    sizes = [int(found[1]) << 10] if found is not None else []
    for limit in (control_groups / "memory.max", control_groups / "memory" / "memory.limit_in_bytes"):
        text = limit.read_text().strip() if limit.is_file() else ""
        sizes += [int(text)] if text.isdecimal() else []
    return min(sizes, default=None)


def _first_cpu(cpuinfo: Path) -> dict[str, str]:
    if not cpuinfo.is_file():
        return {}
    first = cpuinfo.read_text().split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _all_gpus(folder: Path) -> list[dict[str, str]]:
    """Return the driver's fields of each GPU, such as Model and GPU UUID, in the order of the PCI bus."""
    files = sorted(folder.glob("*/information")) if folder.is_dir() else []
    pairs = ([line.partition(":") for line in file.read_text().splitlines()] for file in files)
    return [{key.strip(): value.strip() for key, _, value in fields} for fields in pairs]


def _visible(gpus: list[dict[str, str]], chosen: str | None) -> list[tuple[str, str]]:
    """Return the id and the model of each GPU that CUDA_VISIBLE_DEVICES leaves.

    Args:
        gpus: the driver's fields of all.
        chosen: indices or ids such as GPU-8932f937 and MIG-...; CUDA takes none from the first unknown one on.
    """
    entries = [str(index) for index in range(len(gpus))] if chosen is None else chosen.split(",")
    found: list[tuple[str, str]] = []
    for entry in (entry.strip() for entry in entries):
        if entry.isdecimal() and int(entry) < len(gpus):
            fields = gpus[int(entry)]
        elif entry.startswith(("GPU-", "MIG-")) and gpus:
            fields = next((each for each in gpus if each.get("GPU UUID", "").startswith(entry)), {})
        else:
            break
        found.append((entry, fields.get("Model", "unknown GPU")))
    return found
