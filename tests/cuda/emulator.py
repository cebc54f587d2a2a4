"""Builds kernels/cuda for the CPU, under the shim of kernels/emu."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"
SOURCES = sorted((KERNELS / "cuda").glob("*.cu"))
EMULATOR = [KERNELS / "emu" / name for name in ("emu.cpp", "managed.cpp")]
FLAGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off", "-fPIC")
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g")


def why_not() -> str | None:
    """Return why the emulator cannot be built here, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "the emulator switches stacks on x86-64 only"
    if shutil.which("g++") is None:
        return "no g++ on this machine"
    return None


def include_folders(scratch: Path) -> list[Path]:
    """Return where the sources find their headers; qlk/tables.h is written into `scratch`, which nobody else reads."""
    header = scratch / "include" / "qlk" / "tables.h"
    subprocess.run([sys.executable, KERNELS / "generate_tables.py", header], check=True)
    return [KERNELS / "include", scratch / "include", KERNELS, KERNELS / "cuda"]


def digest_of_sources(*further: bytes) -> str:
    """Return what changes whenever a source of the kernels does, or `further`."""
    inputs = sorted(p for p in KERNELS.rglob("*") if p.suffix in (".cu", ".cuh", ".h", ".cpp"))
    inputs += [KERNELS / "generate_tables.py", ROOT / "qlora_lab" / "ops" / "formats.py", Path(__file__)]
    return hashlib.sha256(b"".join([*(path.read_bytes() for path in inputs), *further])).hexdigest()[:16]


def build(name: str, *extra: Path, sanitize: bool = False, shared: bool = True) -> Path:
    """Return a library (or a program) of the emulated kernels and `extra` sources, built anew if anything changed."""
    target = ROOT / "build" / "emulated" / digest_of_sources(*(path.read_bytes() for path in extra)) / name
    if target.exists():
        return target
    flags = [*FLAGS, "-O1", *(SANITIZED if sanitize else ())]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folders = [KERNELS / "emu", *include_folders(Path(scratch))]
        compile_ = ["g++", *flags, "-DQLK_EMULATED", *[f"-I{folder}" for folder in folders], "-x", "c++", "-c"]

        def object_of(source: Path) -> str:
            result = f"{scratch}/{source.stem}.o"
            subprocess.run([*compile_, source, "-o", result], check=True)
            return result

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            objects = list(pool.map(object_of, (*SOURCES, *EMULATOR, *extra)))
        link = ["g++", *(SANITIZED if sanitize else ()), *(("-shared",) if shared else ()), *objects]
        subprocess.run([*link, "-o", f"{scratch}/{name}"], check=True)
        Path(scratch, name).rename(target)
    return target
