"""A plan refuses what cannot be answered, has a folder of its own, and stays readable with thousands of runs."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_lab import hashing, wheels
from qlora_lab.config.hardware import Hardware
from qlora_lab.config.schema import EvaluationSetConfig, RunConfig
from qlora_lab.errors import ConfigError, ModelError
from qlora_lab.runs.folder import RunFolder
from qlora_lab.runs.identity import run_id
from qlora_lab.sweep import study
from qlora_lab.sweep.dotted import flatten
from qlora_lab.sweep.listing import MOST_LISTED, listed
from qlora_lab.sweep.metric_names import check_metric, metric_names
from qlora_lab.sweep.plan import Plan, PlannedRun, make_plan
from qlora_lab.sweep.prepare import prepare
from tests.helpers import tiny


def plan_of_seeds(config: RunConfig, *seeds: int) -> Plan:
    return make_plan("study", [({"seed": str(seed)}, replace(config, seed=seed)) for seed in seeds])


def asking(config: RunConfig, metric: str) -> RunConfig:
    return replace(config, study=replace(config.study, metric=metric))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny(tmp_path_factory.mktemp("runs"))


def test_every_distinct_plan_has_a_folder_of_its_own(config: RunConfig) -> None:
    whole, narrow = plan_of_seeds(config, 0, 1, 2), plan_of_seeds(config, 0, 1)
    assert whole.folder.parent == narrow.folder.parent == whole.runs_dir / "studies" / "study"
    assert whole.folder != narrow.folder
    assert plan_of_seeds(config, 2, 1, 0).folder == whole.folder  # the same runs, asked the same
    by_bytes = plan_of_seeds(asking(config, "eval/bits_per_byte"), 0, 1, 2)
    assert by_bytes.folder != whole.folder
    assert len(whole.folder.name) == 8


def test_a_narrowed_plan_leaves_the_whole_one_alone(config: RunConfig) -> None:
    whole = plan_of_seeds(config, 0, 1)
    record = whole.write()
    before = (whole.folder / "plan.json").read_bytes()
    plan_of_seeds(config, 0).write()
    assert (whole.folder / "plan.json").read_bytes() == before
    assert [run["axes"] for run in record["runs"]] == [{"seed": "0"}, {"seed": "1"}]


def test_a_sweep_answers_for_its_own_plan_whatever_the_file_says(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of_seeds(config, 0, 1)
    record = plan.write()
    (plan.folder / "plan.json").write_text("{}")
    with pytest.raises(SystemExit):  # nothing has run
        study._answer(plan, record)
    said = capsys.readouterr()
    assert f"report: {plan.folder / 'report.html'}" in said.out
    assert all(run.run_id in said.out for run in plan.runs)
    assert "2 of 2 runs did not finish" in said.err


@pytest.mark.parametrize(
    ("metric", "nearest"),
    [
        ("eval/los", "eval/loss"),
        ("loss", "eval/loss"),
        ("eval/bits_per_bite", "eval/bits_per_byte"),
        ("eval/held_out/loss", "eval/loss"),  # rows of the run's own data are no set with a name
        ("train/row_seen", "train/rows_seen"),
    ],
)
def test_a_metric_that_no_run_will_report_is_refused_in_the_plan(config: RunConfig, metric: str, nearest: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"study\.metric must be one of .*; got '{metric}'; did you mean '{nearest}'"
    ):
        plan_of_seeds(asking(config, metric), 0, 1)


def test_exact_match_is_refused_where_no_run_has_it(config: RunConfig) -> None:
    without = replace(config, data=replace(config.data, exact_match=False))
    both = [asking(replace(config, data=replace(config.data, exact_match=has)), "eval/exact_match") for has in (0, 1)]
    check_metric(both)  # one of them reports it
    with pytest.raises(ConfigError, match=r"'eval/exact_match', but no run .* data\.exact_match"):
        plan_of_seeds(asking(without, "eval/exact_match"), 0)


def test_metrics_of_sets_are_known(config: RunConfig) -> None:
    sets = {
        name: EvaluationSetConfig(kind="procedural", template="procedural", exact_match=has)
        for name, has in (("sums", True), ("chat", False))
    }
    on_sets = replace(config, evaluation=replace(config.evaluation, sets=sets))
    names = metric_names(on_sets)
    assert {"eval/sums/loss", "eval/sums/exact_match", "eval/chat/bits_per_byte", "eval/exact_match"} <= set(names)
    assert "eval/chat/exact_match" not in names
    with pytest.raises(ConfigError, match=r"did you mean 'eval/chat/loss'"):
        check_metric([asking(on_sets, "eval/chats/loss")])


def test_what_a_run_reports_is_what_a_study_may_ask_for(tmp_path: Path) -> None:
    from qlora_lab.run import execute

    (planned,) = plan_of_seeds(tiny(tmp_path), 0).runs
    folder = RunFolder.create(tmp_path, planned.run_id, planned.config)
    assert execute(folder.path) == "finished"
    reported = set(folder.result()["metrics"])
    names = set(metric_names(planned.config))
    assert reported <= names, "what sweep/metric_names.py does not list can never decide a study"
    # what a system does not tell is not reported
    assert not [name for name in names - reported if not name.endswith("_bytes")]


def test_a_wheel_is_hashed_once_a_plan(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"wheel" + str(tmp_path).encode()
    wheel = wheels.PinnedWheel("small", "1.0", hashlib.sha256(content).hexdigest(), size_mb=1, holds="nothing")
    monkeypatch.setitem(wheels.WHEELS, "small", wheel)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / wheel.file_name).write_bytes(content)
    hashed = []
    original = hashing.file_sha256
    monkeypatch.setattr(hashing, "file_sha256", lambda path: hashed.append(path) or original(path))
    source = replace(config.data.source, kind="wheel", wheel="small", member="rows.jsonl")
    on_wheel = replace(
        config, data=replace(config.data, source=source), paths=replace(config.paths, cache_dir=str(tmp_path))
    )
    assert len(plan_of_seeds(on_wheel, *range(5)).runs) == 5
    assert len(hashed) == 1
    (tmp_path / "wheels" / wheel.file_name).write_bytes(b"damaged")
    with pytest.raises(ModelError, match="is damaged"):
        plan_of_seeds(on_wheel, 0)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ("model.architecture.model_type=lama",),
            r"model\.architecture\.model_type must be one of .*did you mean 'llama'",
        ),
        (("model.source=wheel", "model.wheel=asdiv"), r"model\.wheel must be one of smollm2_135m; got 'asdiv'"),
        (("data=asdiv_clean_200", "data.source.wheel=asdi"), r"data\.source\.wheel must be one of asdiv; got 'asdi'"),
        (("trainer.device=cuda",), r"trainer\.device must be cpu or auto, since this process sees no GPU"),
    ],
)
def test_what_cannot_work_here_is_refused_in_the_plan(
    tmp_path: Path, overrides: tuple[str, ...], sentence: str
) -> None:
    machine = Hardware("a laptop", frozenset(), cores=2, gpus=())
    with pytest.raises(ConfigError, match=sentence):
        prepare(tiny(tmp_path, *overrides), machine)


def test_a_gpu_run_is_planned_where_there_is_one_and_for_slurm(tmp_path: Path) -> None:
    laptop = Hardware("a laptop", frozenset(), cores=2, gpus=())
    with_gpu = replace(laptop, gpus=("H200",), gpu_ids=("0",))
    assert prepare(tiny(tmp_path, "trainer.device=cuda"), with_gpu).trainer.device == "cuda"
    assert prepare(tiny(tmp_path, "trainer.device=cuda", "launcher=slurm"), laptop).trainer.device == "cuda"


def test_thousands_of_runs_are_planned_in_a_screen(config: RunConfig) -> None:
    runs = [PlannedRun(run_id(config)[:8] + f"{n:04}", {"seed": str(n)}, config, "new") for n in range(3000)]
    plan = Plan("study", Path("runs"), runs, repeated=0)
    lines = plan.text().splitlines()
    assert len(lines) == 1 + 1 + MOST_LISTED + 1 + 1
    assert lines[-2:] == ["and 2,980 more runs", "3,000 runs: 3,000 new"]


def test_lists_are_cut_where_more_than_one_is_left() -> None:
    assert listed(["a", "b", "c"], most=2) == ["a", "b", "c"]
    assert listed(["a", "b", "c", "d"], most=2) == ["a", "b", "and 2 more"]
    assert listed([]) == []


def test_nested_values_have_dotted_keys() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None, "f": {}}) == {"a.b": 1, "a.c.d": [2], "e": None}
