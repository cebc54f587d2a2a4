"""What installing does without a compiler; that it builds with one, every other test of this folder needs."""

import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
TOOLS = ("make", "ninja")  # that CMake asks for; compilers are found beside them


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_without_a_compiler_nothing_is_built_and_one_warning_says_so(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        if found is not None:
            (tools / name).symlink_to(found)
    if not any(tools.iterdir()):
        pytest.skip("neither make nor ninja is installed")

    def cmake(*words: str) -> subprocess.CompletedProcess[str]:
        command = [shutil.which("cmake") or "", *words]
        return subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True, check=True)

    said = " ".join(cmake("-S", str(KERNELS), "-B", str(tmp_path / "build")).stderr.split())
    assert said.count("Warning") == 1 and "no C++ compiler" in said and "pure-torch reference kernels" in said
    cmake("--build", str(tmp_path / "build"))
    cmake("--install", str(tmp_path / "build"), "--prefix", str(tmp_path / "installed"))
    installed = tmp_path / "installed" / "qlora_lab"
    assert sorted(path.name for path in installed.iterdir()) == ["_conf", "_sweeps"]
    assert (installed / "_sweeps" / "experiment" / "dataset_quality.yaml").is_file()
