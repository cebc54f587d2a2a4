"""Benchmarks as a run's configuration names them."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose

from qlora_lab.config.hardware import Hardware
from qlora_lab.config.refusals import explain
from qlora_lab.config.resolve import resolve
from qlora_lab.config.schema import BenchmarkConfig, RowsConfig, RunConfig
from qlora_lab.data import sources
from qlora_lab.data.records import Record
from qlora_lab.errors import ConfigError, DataError
from qlora_lab.evaluation.benchmarks.run import run_benchmarks
from qlora_lab.runs.fingerprint import source_fingerprint
from qlora_lab.runs.folder import FAILED, FINISHED, RunFolder
from qlora_lab.runs.identity import run_id
from qlora_lab.sweep.metric_names import check_metric, metric_names
from tests.evaluation.benchmarks.choice_rows import piqa_rows
from tests.evaluation.benchmarks.conftest import MakeExaminee, write_rows
from tests.helpers import composed, hydra_on_conf, tiny

LAPTOP = Hardware("some CPU", frozenset(), 2, ())


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    composed = tiny(tmp_path, "data.rows=32", "trainer.device=cpu", f"paths.data_dir={tmp_path}")
    benchmarks = {"ways": BenchmarkConfig(task="piqa", kind="file", path="ways.jsonl", split="dev", rows=5)}
    write_rows(tmp_path / "ways.jsonl", piqa_rows(12))
    return replace(composed, evaluation=replace(composed.evaluation, rows=4, max_new_tokens=24, benchmarks=benchmarks))


def resolved(config: RunConfig) -> RunConfig:
    found = resolve(config, LAPTOP, lambda source: source_fingerprint(source, Path(config.paths.data_dir)))
    return replace(found, trainer=replace(found.trainer, threads=1))


def with_benchmarks(config: RunConfig, benchmarks: dict[str, BenchmarkConfig]) -> RunConfig:
    return replace(config, evaluation=replace(config.evaluation, benchmarks=benchmarks))


def test_a_run_ends_with_its_benchmarks(config: RunConfig, tmp_path: Path) -> None:
    from qlora_lab.run import execute

    planned = resolved(config)
    folder = RunFolder.create(tmp_path, run_id(planned), planned)
    assert execute(folder.path) == FINISHED
    metrics = folder.result()["metrics"]
    lines = (folder.path / "evaluation/benchmarks/ways.jsonl").read_text().splitlines()
    right = [json.loads(line)["acc"] for line in lines]
    assert len(right) == 5 and metrics["eval/ways/dev_5rows/0shot/acc"] == sum(right) / 5
    assert {name for name in metrics if name.startswith("eval/ways/")} == set(
        planned.evaluation.benchmarks["ways"].metric_names("ways")
    )
    assert "eval/loss" in metrics
    assert json.loads((folder.path / "metrics.jsonl").read_text().splitlines()[-1]).keys() >= {
        "eval/ways/dev_5rows/0shot/acc_norm"
    }


def test_bad_rows_are_refused_before_there_is_training_to_lose(config: RunConfig, tmp_path: Path) -> None:
    from qlora_lab.run import execute

    with (tmp_path / "ways.jsonl").open("a") as file:
        file.write('{"goal": "warm up", "sol1": "sit", "sol2": "run", "label": 7}\n')
    planned = resolved(config)
    folder = RunFolder.create(tmp_path, run_id(planned), planned)
    assert execute(folder.path) == FAILED
    error = (folder.status() or {})["error"]
    assert re.search(r"ways.jsonl.*line 13: column 'label' must be a number from 0 to 1", error["message"])
    assert folder.last_metrics() is None and not folder.adapter.exists()


def test_the_commit_of_a_hub_set_is_recorded(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_lab.run import execute

    def read_hub(source: RowsConfig, revisions: dict[str, str], place: str) -> Iterator[Record]:
        revisions[str(source.hub_id)] = f"{source.revision} is 0123"
        yield from (Record(f"row {number}", row) for number, row in enumerate(piqa_rows(4)))

    monkeypatch.setattr(sources, "read_hub", read_hub)
    hub = BenchmarkConfig(task="piqa", kind="hub", hub_id="a/piqa", revision="v1", split="dev")
    planned = resolved(with_benchmarks(config, {**config.evaluation.benchmarks, "hub": hub}))
    folder = RunFolder.create(tmp_path, run_id(planned), planned)
    assert execute(folder.path) == FINISHED
    assert folder.result()["benchmark_revisions"] == {"hub": {"a/piqa": "v1 is 0123"}}


def test_other_rows_are_another_run_and_no_benchmarks_change_no_id(config: RunConfig, tmp_path: Path) -> None:
    planned = resolved(config)
    ids = {run_id(planned), run_id(resolved(with_benchmarks(config, {})))}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "ways.jsonl").rename(tmp_path / "elsewhere/ways.jsonl")
    moved = {"ways": replace(config.evaluation.benchmarks["ways"], path="elsewhere/ways.jsonl")}
    assert run_id(resolved(with_benchmarks(config, moved))) == run_id(planned)  # the same rows, from elsewhere
    write_rows(tmp_path / "elsewhere/ways.jsonl", piqa_rows(12, seed=1))
    ids.add(run_id(resolved(with_benchmarks(config, moved))))
    examples = replace(moved["ways"], task="mmlu", shots=1)
    examples = replace(examples, examples=moved["ways"])
    with_examples = resolved(with_benchmarks(config, {"ways": examples})).evaluation.benchmarks["ways"]
    assert with_examples.examples is not None and with_examples.examples.content_sha256 is not None
    assert len(ids) == 3


def test_a_study_may_be_decided_by_a_benchmark(config: RunConfig) -> None:
    assert "eval/ways/dev_5rows/0shot/acc_norm" in metric_names(config)
    asking = replace(config, study=replace(config.study, metric="eval/ways/dev_5rows/0shot/acc"))
    check_metric([asking])
    with pytest.raises(ConfigError, match=r"did you mean 'eval/ways/dev_5rows/0shot/acc"):
        check_metric([replace(asking, study=replace(asking.study, metric="eval/ways/dev/0shot/acc"))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "mmul"}, r"evaluation.benchmarks.b.task must be one of mmlu, .*did you mean 'mmlu'"),
        ({"task": "piqa", "shots": 5}, "b.shots must be 0, since piqa is asked without worked examples; got 5"),
        ({"task": "mmlu", "rows": 0}, "b.rows must be 1 or more; got 0"),
        ({"task": "mmlu", "kind": "procedural"}, "b.kind must be one of file, hub, wheel; got 'procedural'"),
        ({"task": "mmlu", "kind": "file"}, "b.path is needed when evaluation.benchmarks.b.kind is 'file'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchmarkConfig(**{"kind": "hub", "hub_id": "a/b"} | options).check("evaluation.benchmarks.b")


def test_a_composed_configuration_is_refused_in_a_sentence() -> None:
    with pytest.raises(Exception, match=r"cannot be asked of a model whose model.task is 'seq2seq'"):
        composed("evaluation=mmlu", "model=t5_small")
    with hydra_on_conf(), pytest.raises(Exception) as refused:  # Hydra's own, of several kinds
        compose("train", ["+evaluation.benchmarks.x.kind=file"])
    assert "write '+evaluation.benchmarks={x:{kind:...}}'" in explain(refused.value)


def test_a_hub_out_of_reach_says_what_to_try(make_examinee: MakeExaminee) -> None:
    benchmark = BenchmarkConfig(task="mmlu", kind="hub", hub_id="cais/mmlu", hub_config="all", split="test")
    message = r"benchmarks.mmlu.hub_id 'cais/mmlu' is not in the local hub cache.*benchmarks.mmlu.path=FILE"
    with pytest.raises(DataError, match=message):
        run_benchmarks(make_examinee(), {"mmlu": benchmark})
