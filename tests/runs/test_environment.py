"""The commit in the record of a run and of a benchmark."""

import subprocess
from pathlib import Path

import pytest

from qlora_lab.runs.environment import git_commit, measured_commit


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name in ("kernels/cpu.cpp", "kernels/bench/results/cpu.json", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    who = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
    for command in (["init", "--quiet"], ["add", "."], [*who, "commit", "--quiet", "--message", "All"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    return tmp_path


def test_a_benchmark_tells_its_commit_and_whether_kernels_were_changed(repository: Path) -> None:
    commit = measured_commit(repository)
    assert len(commit) == 40
    for name in ("README.md", "kernels/bench/results/cpu.json"):
        (repository / name).write_text("after")
    assert (measured_commit(repository), git_commit(repository)) == (commit, f"{commit}+changes")
    (repository / "kernels" / "cpu.cpp").write_text("after")
    assert measured_commit(repository) == f"{commit}+changes"


def test_outside_a_repository_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert (measured_commit(tmp_path), git_commit(tmp_path)) == ("unknown", None)
