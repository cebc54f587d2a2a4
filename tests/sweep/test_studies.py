"""The shipped studies, at each of their scales, and how a scale is chosen."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_lab.config.scale import with_scale
from qlora_lab.errors import ConfigError
from tests.command_line import call
from tests.helpers import hydra_on_conf
from tests.sweep.planned_studies import ONE_SCALE, SCALES, STUDIES, UNFETCHED, planned

ON_A_LAPTOP = ("laptop", "laptop_fine_tuned", "equal_rank")
OWN = """# @package _global_
defaults:
  - _self_
  - mine@_global_: small
study: {question: "why?", metric: eval/loss, paper_found: nothing., pipeline_check: true}
"""


@pytest.fixture(scope="module")
def conf() -> Iterator[None]:
    with hydra_on_conf():
        yield


@pytest.mark.parametrize(("study", "scale"), [*SCALES, *ONE_SCALE])
def test_every_study_is_planned_at_every_scale(
    conf: None, study: str, scale: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, stand_in in UNFETCHED.items():
        monkeypatch.setattr(name, stand_in)
    plan = planned(study, scale, every_choice=False)
    asked = plan.runs[0].config.study
    assert set(asked.compares) <= set(plan.axis_names)
    assert all(run.need is not None and run.need.prediction.peak_bytes for run in plan.runs)
    if scale is not None:
        assert asked.paper_found and asked.caution
        assert all((run.config.trainer.device == "cuda") == (scale not in ON_A_LAPTOP) for run in plan.runs)
    random = any(run.config.model.source == "random" for run in plan.runs)
    assert asked.pipeline_check == random == (study in ("glue", "super_ni") and scale == "laptop")


def test_every_study_of_the_paper_has_both_scales() -> None:
    assert {study for study, _ in SCALES} == set(STUDIES) - {study for study, _ in ONE_SCALE}
    for study, _ in SCALES:
        assert {(study, "laptop"), (study, "paper")} <= set(SCALES)


def test_the_embedded_study_keeps_the_runs_it_always_had(conf: None) -> None:
    plan = planned("dataset_quality", None, every_choice=True)
    data, trainer = plan.runs[0].config.data, plan.runs[0].config.trainer
    assert [run.axes for run in plan.runs] == [
        {"data": data, "seed": seed}
        for data in ("procedural_clean_128", "procedural_half_wrong_2048")
        for seed in ("0", "1")
    ]
    assert (data.rows, trainer.max_steps, trainer.batch_size) == (128, 30, 8)


def test_the_published_scale_is_planned_without_a_gpu_or_a_hub(tmp_path: Path) -> None:
    command = ("+experiment=guanaco", "scale=paper", "launcher.gpu_memory_gb=48")
    done = call("qlora_lab.sweep.__main__", *command, "sweep.action=plan", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "The original study found: a chat model at each size" in done.stdout
    assert "must fit a GPU of 48.0 GiB" in done.stdout and "llama_65b nf4, micro-batch 1: 39.0 GiB" in done.stdout
    assert "4 runs: 4 new" in done.stdout and "55.2 GPU-hours on GPUs that sustain 100 TFLOP/s" in done.stdout
    refused = call("qlora_lab.sweep.__main__", *command, cwd=tmp_path)
    assert refused.returncode == 2
    assert "trainer.device must be cpu or auto, since this process sees no GPU" in refused.stderr
    assert not list(tmp_path.rglob("config.yaml"))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    folder = tmp_path / "sweeps" / "experiment"
    (folder / "mine").mkdir(parents=True)
    (folder / "mine.yaml").write_text(OWN)
    (folder / "mine" / "small.yaml").write_text("hydra: {sweeper: {params: {seed: range(1)}}}\n")
    (folder / "mine" / "large.yaml").write_text(
        "defaults:\n  - override /quant: int8\nhydra: {sweeper: {params: {seed: range(2)}}}\n"
    )
    (folder / "mine" / "wrong.yaml").write_text("launcher: {kind: slurm}\nhydra: {sweeper: {params: {seed: 0}}}\n")
    return tmp_path


@pytest.mark.parametrize("stock", [(), ("hydra/sweeper=basic", "hydra/launcher=basic")], ids=["ours", "stock"])
def test_a_scale_is_chosen_on_the_command_line(own: Path, stock: tuple[str, ...]) -> None:
    plan = ("model=tiny_random", "+experiment=mine", "sweep.action=plan", *stock)
    small = call("qlora_lab.sweep.__main__", *plan, cwd=own)
    large = call("qlora_lab.sweep.__main__", *plan, "scale=large", cwd=own)
    assert small.stdout.count("1 runs: 1 new") == 1
    assert large.stdout.count("2 runs: 2 new") + large.stdout.count("1 runs: 1 new") == (2 if stock else 1)
    assert "This is a check that everything runs; its numbers are no conclusion." in large.stdout
    assert "The original study found: nothing." in large.stdout


def test_the_composed_job_of_a_scale_is_shown(own: Path) -> None:
    job = call("qlora_lab.sweep.__main__", "+experiment=mine", "scale=large", "--cfg", "job", cwd=own)
    assert "format: int8" in job.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("+experiment=mine", "scale=larg"), "scale must be one of large, small, wrong; got 'larg'; did you mean"),
        (("+experiment=instruction_data", "scale=paper"), "study instruction_data has no scales to choose from"),
        (("scale=paper",), "scale=paper chooses the version of a study; give one"),
        (("+experiment=mine", "scale=small,large"), "scale must be one name; got 'scale=small,large'"),
        (("+experiment=mine", "scale=wrong"), "launcher does not belong in a study's file (experiment/mine/wrong)"),
    ],
)
def test_a_scale_that_cannot_be_is_refused(own: Path, arguments: tuple[str, ...], sentence: str) -> None:
    done = call("qlora_lab.sweep.__main__", *arguments, "sweep.action=plan", cwd=own)
    assert done.returncode == 2 and sentence in done.stderr


def test_two_scales_at_once_are_refused() -> None:
    with pytest.raises(ConfigError, match="scale must be one name"):
        with_scale(["+experiment=glue", "scale=paper", "scale=laptop"])
