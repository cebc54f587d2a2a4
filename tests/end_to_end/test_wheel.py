"""The wheel that pip builds from a checkout: for any Python, with the kernels, and with nothing of torch's in it."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from qlora_lab.ops.native.library import FILE, FOLDER, PATH_VARIABLE
from qlora_lab.ops.native.load import BINDING_FILE

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler on this machine")
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--wheel-dir", str(folder), "--config-settings", f"build-dir={folder / 'build'}"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(CHECKOUT)], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_it_is_for_any_python_and_has_every_module_and_the_kernels_and_no_torch(wheel: Path) -> None:
    assert "-py3-none-" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = [path for package in ("qlora_lab", "analysis") for path in (CHECKOUT / package).rglob("*.py")]
    assert {path.relative_to(CHECKOUT).as_posix() for path in modules} <= names
    libraries = {name for name in names if ".so" in name or name.endswith((".dll", ".dylib"))}
    assert {f"{FOLDER}/{FILE}", f"{FOLDER}/{BINDING_FILE}"} <= libraries
    assert all(name.startswith(f"{FOLDER}/libqlk_") for name in libraries)
    assert "qlora_lab/_sweeps/experiment/dataset_quality.yaml" in names
    assert not any(name.startswith("tests/") for name in names)


def test_building_needs_no_second_torch() -> None:
    settings = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    assert [requirement.partition(">")[0] for requirement in settings["build-system"]["requires"]] == [
        "scikit-build-core"
    ]


def test_its_kernels_run_where_it_is_unpacked(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != PATH_VARIABLE}
    done = subprocess.run(
        [sys.executable, "-m", "qlora_lab.doctor"],
        env={**environment, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    said = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith(("kernels", "library")))
    assert said["kernels"].startswith("native ") and said["kernels"].endswith("(stable ABI)")
    assert said["library"] == str(tmp_path / FOLDER / FILE)
