"""The studies whose laptop version is a check that everything runs: they run, and say that they are no conclusion."""

from pathlib import Path

import pytest

from tests.command_line import call

SMALL = ("tracking=none", "launcher=in_process", "trainer.threads=1", "trainer.max_steps=1", "data.rows=16")


@pytest.mark.parametrize(("study", "metric"), [("glue", "exact_match"), ("super_ni", "loss")])
def test_a_pipeline_check_runs_and_concludes_nothing(tmp_path: Path, study: str, metric: str) -> None:
    narrowed = ("quant=nf4", "seed=0", "evaluation.rows=16", "evaluation.max_new_tokens=24")
    done = call("qlora_lab.sweep.__main__", f"+experiment={study}", *narrowed, *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())  # lines are wrapped
    assert f"eval/{metric}" in said and "This is a pipeline check and no conclusion" in said
    assert "The original study found: yes:" in said and "For the question itself take scale=paper." in said
    (report,) = tmp_path.rglob("report.html")
    assert "This is a pipeline check and no conclusion" in report.read_text()
