"""python -m qlora_lab.evaluate: which runs, what is kept of them, and what is refused."""

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose

from qlora_lab import evaluate as evaluating
from qlora_lab.config.load import typed_from_hydra
from qlora_lab.config.refusals import explain
from qlora_lab.config.schema import EvaluateConfig
from qlora_lab.errors import ConfigError, DataError, ModelError, RunFolderError
from qlora_lab.evaluate import evaluate
from qlora_lab.evaluation import run_model
from qlora_lab.runs.folder import RunFolder
from qlora_lab.runs.lease import Claim
from tests.evaluation.finished_runs import finished, planned
from tests.helpers import hydra_on_conf

QUESTIONS = [{"question": f"q{number}", "category": "c", "prompt": f"Say {number}."} for number in range(9)]
SAMPLING = ["max_new_tokens=8", "temperature=1.0", "batch_tokens=45"]
Command = Callable[..., None]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    families = "data.source.families=[nth_word]"
    return finished(tmp_path_factory.mktemp("runs"), "evaluation.rows=2", "evaluation.max_new_tokens=24", families)


@pytest.fixture
def runs_dir(run_folder: RunFolder, tmp_path: Path) -> Path:
    shutil.copytree(run_folder.path, tmp_path / "runs" / run_folder.run_id)
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return tmp_path / "runs"


@pytest.fixture
def asks(runs_dir: Path) -> Callable[..., list[str]]:
    """Return the words of a command that asks the questions."""

    def words(*more: str) -> list[str]:
        file = runs_dir.parent / "asked.jsonl"
        own = [f"evaluation.prompts.own.{setting}" for setting in (f"path={file}", *SAMPLING)]
        return [f"paths.runs_dir={runs_dir}", "evaluation=prompts", "threads=1", *own, *more]

    return words


@pytest.fixture
def command(asks: Callable[..., list[str]]) -> Command:
    def run(*more: str) -> None:
        with hydra_on_conf(evaluate_schema=EvaluateConfig):
            node = compose("evaluate", asks(*more))
        evaluate(node)

    return run


def only_folder(subject: Path) -> Path:
    (folder,) = (subject / "evaluations").iterdir()
    return folder


def answers_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_an_evaluation_is_made_once(
    command: Command, runs_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_id,) = (path.name for path in runs_dir.iterdir())
    command(f"run={run_id[:6]}")
    folder = only_folder(runs_dir / run_id)
    assert folder.name.startswith("own-") and sorted(file.name for file in folder.iterdir()) == [
        *("answers.jsonl", "config.yaml", "result.json")
    ]
    assert "ended_by_length" in capsys.readouterr().out
    assert {line["system"] for line in answers_in(folder)} == {run_id}
    result = json.loads((folder / "result.json").read_text())
    assert result["metrics"]["answers"] == 9 and result["system"] == run_id
    assert run_id in (folder / "config.yaml").read_text()
    monkeypatch.setattr(run_model, "open_model", None)  # not needed: it is finished
    command(f"run={runs_dir / run_id}", "system=renamed")
    assert f"is finished, and signed '{run_id}'" in capsys.readouterr().out
    assert json.loads((folder / "result.json").read_text()) == result


def test_the_base_of_a_run_is_the_same_as_the_model_alone(
    command: Command, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_id,) = (path.name for path in runs_dir.iterdir())
    command(f"run={run_id}", "weights=base", "system=start")
    (base,) = (runs_dir / "bases").iterdir()
    lines = answers_in(only_folder(base))
    assert {line["system"] for line in lines} == {"start"}
    assert not (runs_dir / run_id / "evaluations").exists()
    monkeypatch.setattr(run_model, "open_model", None)
    command("run=base", "model=tiny_random", "quant=nf4", "device=cpu", "compute_dtype=float32", "system=start")
    command(f"run=[{run_id},{runs_dir / run_id}]", "weights=base")


def test_an_adapter_of_no_run_is_asked_on_the_model_that_is_named(command: Command, runs_dir: Path) -> None:
    (run_id,) = (path.name for path in runs_dir.iterdir())
    command(f"run={run_id}")
    adapter = runs_dir.parent / "mine"
    shutil.copytree(runs_dir / run_id / "adapter", adapter)
    words = [f"adapter_folder={adapter}", "model=tiny_random", "device=cpu", "compute_dtype=float32"]
    command(*words)
    command(*words, "weights=trained", "system=another name")  # finished already
    (asked,) = (runs_dir / "bases").glob("mine-*")
    own, run = answers_in(only_folder(asked)), answers_in(only_folder(runs_dir / run_id))
    assert {line["system"] for line in own} == {"mine"}
    assert [line["answer"] for line in own] == [line["answer"] for line in run]
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 999}))
    command(*words)
    changed = next(path for path in (runs_dir / "bases").glob("mine-*") if path != asked)
    assert [line["answer"] for line in answers_in(only_folder(changed))] != [line["answer"] for line in own]
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "some/other"}))
    with pytest.raises(ModelError, match="is for the base 'some/other', and this one is 'tiny_random'"):
        command(*words)


def test_runs_of_a_study_are_named_by_their_place_in_it(
    command: Command, runs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_id,) = (path.name for path in runs_dir.iterdir())
    (runs_dir / run_id / "config.yaml").write_text(
        (runs_dir / run_id / "config.yaml").read_text().replace("  name: null\n  question", "  name: mine\n  question")
    )
    waiting = planned(runs_dir, "seed=5").run_id
    plan = runs_dir / "studies" / "mine" / "0a1b2c3d"
    plan.mkdir(parents=True)
    runs = [{"run_id": run_id, "axes": {"quant": "nf4", "seed": "0"}}, {"run_id": waiting, "axes": {"seed": "5"}}]
    record = {"study": {"name": "mine"}, "configs": "none.json", "axes": {"quant": ["nf4"], "seed": ["0", "5"]}}
    (plan / "plan.json").write_text(json.dumps({**record, "runs": runs}))
    command("study=mine")
    assert {line["system"] for line in answers_in(only_folder(runs_dir / run_id))} == {"mine: quant=nf4, seed=0"}
    assert f"left out, without a result: {waiting} (new)" in capsys.readouterr().out


def test_a_second_process_waits_for_the_first(
    command: Command, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_id,) = (path.name for path in runs_dir.iterdir())
    command(f"run={run_id}")
    folder = only_folder(runs_dir / run_id)
    result = (folder / "result.json").read_text()
    (folder / "result.json").unlink()
    lease = Claim(folder).attempt()
    assert lease is not None
    waits = threading.Event()
    say = print

    def told(*words: Any, **how: Any) -> None:
        say(*words, **how)
        waits.set()

    monkeypatch.setattr("builtins.print", told)
    monkeypatch.setattr(run_model, "open_model", None)  # the other one does the work
    ended: list[BaseException | None] = []

    def wait_and_read() -> None:
        try:
            command(f"run={run_id}")
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    second = threading.Thread(target=wait_and_read)
    second.start()
    assert waits.wait(60)
    (folder / "result.json").write_text(result)
    lease.release()
    second.join(60)
    assert ended == [None] and not list(folder.glob("lease.*"))


@pytest.mark.parametrize(
    ("words", "error", "sentence"),
    [
        (["run=nothing"], RunFolderError, "'nothing' is no run in"),
        (["study=nothing"], RunFolderError, "no study 'nothing'"),
        (["run=12e345678901"], ConfigError, "run must be ids, folders or base; got inf"),
        ([], ConfigError, "give either run=ID"),
        (["run=[]"], ConfigError, "give either run=ID"),
        (["run=a", "study=b"], ConfigError, "give either run=ID"),
        (["run=a", "model=tiny_random"], ConfigError, "model can be given with run=base or adapter_folder only"),
        (["run=base"], ConfigError, "run=base needs a model"),
        (["adapter_folder=a"], ConfigError, "adapter_folder needs a model"),
        (["run=a", "adapter_folder=b"], ConfigError, "give either run=ID"),
        (["adapter_folder=none", "model=tiny_random"], ModelError, "none must hold an adapter in PEFT's format"),
        (["run=[a,b]", "system=one"], ConfigError, "system names the answers of one model"),
        (["run=a", "evaluation.prompts.own.top_p=0"], ConfigError, r"evaluation\.prompts\.own\.top_p must be above 0"),
        (["run=a", "evaluation.prompts.own.kind=procedural"], ConfigError, "kind must be file, hub, wheel or probes"),
        (["run=a", "evaluation=default"], ConfigError, "has neither benchmarks nor prompts"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_gets_one_sentence(
    runs_dir: Path, asks: Callable[..., list[str]], words: list[str], error: type[Exception], sentence: str
) -> None:
    (run_id,) = (path.name for path in runs_dir.iterdir())
    words = [word.replace("run=a", f"run={run_id}") for word in words]
    own = [] if "evaluation=default" in words else asks()[1:]
    with hydra_on_conf(evaluate_schema=EvaluateConfig):
        node = compose("evaluate", [f"paths.runs_dir={runs_dir}", *own, *words])
    with pytest.raises(error, match=sentence):
        evaluate(node)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["evaluation=vicuna", "weigths=base"], "weigths is no configuration key; .* did you mean 'weights'"),
        (["evaluation=vicunna"], "evaluation must be one of .*; did you mean 'vicuna'"),
        (
            ["evaluation=vicuna", "evaluation.prompts.vicuna.topp=1"],
            r"did you mean 'evaluation\.prompts\.vicuna\.top_p'",
        ),
        (["run=a"], "evaluation is not set, and it has no default; choose one of .*, default, .*, vicuna, .*"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_what_hydra_refuses_is_worded_for_this_command(words: list[str], sentence: str) -> None:
    with hydra_on_conf(evaluate_schema=EvaluateConfig), pytest.raises(Exception) as refused:
        compose("evaluate", words)
    assert re.search(sentence, explain(refused.value, EvaluateConfig))


def test_a_bad_prompt_file_is_refused_before_a_model_is_opened(
    command: Command, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_id,) = (path.name for path in runs_dir.iterdir())
    (runs_dir.parent / "asked.jsonl").write_text('{"question": "a", "prompt": "b"}\n{"question": "c"}\n')
    monkeypatch.setattr(run_model, "open_model", None)
    with pytest.raises(DataError, match=r"asked\.jsonl, line 2 must have"):
        command(f"run={run_id}")


def test_one_bad_run_does_not_keep_the_others_waiting(
    command: Command, runs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_id,) = (path.name for path in runs_dir.iterdir())
    bad = planned(runs_dir, "seed=5")
    shutil.copytree(
        runs_dir / run_id, bad.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.yaml", "adapter")
    )
    with pytest.raises(SystemExit) as end:
        command(f"run=[{bad.run_id},{run_id}]")
    assert end.value.code == 1
    assert f"error: {bad.run_id}: run {bad.run_id} has no weights" in capsys.readouterr().err
    assert len(answers_in(only_folder(runs_dir / run_id))) == 9


KILLED = """
import os, signal, sys
from qlora_lab import evaluate
from qlora_lab.runs.evaluations import EvaluationFolder
append, batches = EvaluationFolder.append_answers, []
def append_or_die(folder, records):
    append(folder, records)
    batches.append(records)
    if len(batches) == 2:
        with (folder.path / "answers.jsonl").open("a") as file:
            file.write('{"question": "half a li')
        os.kill(os.getpid(), signal.SIGKILL)
EvaluationFolder.append_answers = append_or_die
evaluate.main()
"""


def test_a_killed_command_goes_on_and_ends_alike(
    command: Command, asks: Callable[..., list[str]], runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_id,) = (path.name for path in runs_dir.iterdir())
    killed = subprocess.run([sys.executable, "-c", KILLED, *asks(f"run={run_id}")], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr.decode()
    folder = only_folder(runs_dir / run_id)
    kept = (folder / "answers.jsonl").read_text().splitlines()
    assert 1 < len(kept) < 9 and kept[-1] == '{"question": "half a li'
    batches = []
    append = evaluating.EvaluationFolder.append_answers
    monkeypatch.setattr(
        evaluating.EvaluationFolder,
        "append_answers",
        lambda folder, records: batches.append(len(records)) or append(folder, records),
    )
    command(f"run={run_id}")
    assert sum(batches) == 9 - (len(kept) - 1)
    gone_on = answers_in(folder)
    shutil.rmtree(folder)
    command(f"run={run_id}")
    assert answers_in(only_folder(runs_dir / run_id)) == gone_on


def test_schema_and_file_agree() -> None:
    with hydra_on_conf(evaluate_schema=EvaluateConfig):
        node = compose("evaluate", ["run=base", "model=smollm2_135m", "evaluation=vicuna"])
    config = typed_from_hydra(node, EvaluateConfig)
    assert config.evaluation.prompts["vicuna"].top_p == 0.9 and config.quant is None
