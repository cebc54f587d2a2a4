"""Sets of prompts answered: what is saved of each, what a kill and a full disk leave, and what goes on from there."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_lab.config.schema import ModelConfig, PromptSetConfig, QuantConfig
from qlora_lab.errors import ConfigError, DataError, RunFolderError
from qlora_lab.evaluation import answers as answering
from qlora_lab.evaluation.answers import PromptTask
from qlora_lab.evaluation.candidates import Base, Candidate
from qlora_lab.evaluation.prompt_sets import Prompt
from qlora_lab.evaluation.run_model import RunModel
from qlora_lab.ratings.answers import read_answers
from qlora_lab.runs.evaluations import EvaluationFolder
from tests.small_disk import fill, small_disk

SAMPLED = PromptSetConfig(path="given", temperature=1.0, max_new_tokens=7, batch_tokens=30, stop=["never"])


@pytest.fixture
def subject(model: Any, tokenizer: Any) -> RunModel:
    at = ModelConfig(source="folder", path="nowhere", prompt_format="plain", max_length_tokens=20)
    return RunModel(model, tokenizer, "tiny", Base(at, QuantConfig(), "plain", "float32", "cpu"), None)


@pytest.fixture
def prompts(make_rows: Any) -> list[Prompt]:
    return [Prompt(f"q{number}", "words", row.prompt) for number, row in enumerate(make_rows(12))]


def answered(subject: RunModel, task: PromptTask, path: Path) -> tuple[dict[str, float], list[dict[str, Any]]]:
    folder = EvaluationFolder(path, task.name, task.settings)
    with folder.lock():
        found = task.execute(subject, folder)
        assert found["revisions"] == task.revisions
        return found["metrics"], folder.answers()


def test_an_answer_is_saved_with_what_it_was_drawn_with(subject: RunModel, prompts: Any, tmp_path: Path) -> None:
    task = PromptTask("own", SAMPLED, prompts, {"a/hub-set": "0123"})
    metrics, lines = answered(subject, task, tmp_path)
    assert [line["question"] for line in lines] == [prompt.question for prompt in prompts]
    file = EvaluationFolder(tmp_path, task.name, task.settings).path / "answers.jsonl"
    found = read_answers(file)  # as the tools for ratings read them
    assert [(each.prompt, each.category, each.system) for each in found] == [
        (prompt.text, "words", "tiny") for prompt in prompts
    ]
    assert {line["stop_reason"] for line in lines} == {"eos", "length"}
    assert all(line["tokens"] == 7 for line in lines if line["stop_reason"] == "length")
    assert len({line["seed"] for line in lines}) == 12
    assert metrics["answers"] == metrics["ended_by_eos"] + metrics["ended_by_length"] == 12
    assert metrics["tokens_per_answer"] == sum(line["tokens"] for line in lines) / 12
    assert not any(name.startswith("right") for name in metrics)


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"top_p": 0.5}, {"seed": 1}, {"stop": []}], ids=str)
def test_other_settings_are_another_evaluation(prompts: Any, change: dict[str, Any]) -> None:
    assert (
        PromptTask("own", replace(SAMPLED, **change), prompts).settings != PromptTask("own", SAMPLED, prompts).settings
    )


def test_what_changes_no_answer_changes_no_folder(subject: RunModel, prompts: Any, tmp_path: Path) -> None:
    other = PromptTask("own", replace(SAMPLED, path="elsewhere", batch_tokens=10_000), prompts)
    assert other.settings == PromptTask("own", SAMPLED, prompts).settings
    greedy = replace(SAMPLED, temperature=0.0)
    assert PromptTask("own", greedy, prompts).settings == PromptTask("own", replace(greedy, seed=4), prompts).settings
    _, lines = answered(subject, PromptTask("own", SAMPLED, prompts), tmp_path / "small")
    assert answered(subject, other, tmp_path / "large")[1] == lines


class Killed(BaseException):
    pass


def test_an_attempt_goes_on_where_the_last_one_stopped(
    subject: RunModel, prompts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = PromptTask("own", SAMPLED, prompts)
    whole = answered(subject, task, tmp_path / "whole")
    folder = EvaluationFolder(tmp_path / "torn", task.name, task.settings)
    generate, asked = answering.generate_batch, []

    def counted(model: Any, tokenizer: Any, batch: Any, **how: Any) -> Any:
        if len(asked) == 3:
            raise Killed
        asked.append(len(batch))
        return generate(model, tokenizer, batch, **how)

    monkeypatch.setattr(answering, "generate_batch", counted)
    with pytest.raises(Killed), folder.lock():
        task.execute(subject, folder)
    file = folder.path / "answers.jsonl"
    kept = len(file.read_text().splitlines())
    assert 0 < kept == sum(asked) < 12
    file.write_bytes(file.read_bytes()[:-9])  # half a line, of a batch that was being written
    asked.clear()
    monkeypatch.setattr(answering, "generate_batch", lambda *args, **how: asked.append(1) or generate(*args, **how))
    assert answered(subject, task, tmp_path / "torn") == whole
    assert len(asked) < len(answering.generation_batches([[0] * 5] * 12, 7, 30)) + 1


def test_half_a_line_is_cut_off_the_file(tmp_path: Path) -> None:
    """Else the next line would be written behind it, and a second kill would leave a damaged one."""
    folder = EvaluationFolder(tmp_path, "own", {})
    folder.path.mkdir(parents=True)
    file = folder.path / "answers.jsonl"
    file.write_text('{"question": "a"}\n{"question": "half a li')
    assert folder.answers() == [{"question": "a"}]
    assert file.read_text() == '{"question": "a"}\n'


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    folder = EvaluationFolder(tmp_path, "own", {})
    folder.path.mkdir(parents=True)
    (folder.path / "answers.jsonl").write_text('{"question": "a"}\n{torn\n{"question": "b"}\n')
    with pytest.raises(RunFolderError, match=r"answers\.jsonl, line 2 is damaged"):
        folder.answers()


def test_a_prompt_without_room_is_refused_or_skipped_but_never_cut(
    subject: RunModel, prompts: Any, tmp_path: Path
) -> None:
    long = [*prompts[:2], Prompt("long", "words", " ".join(["w1"] * 14))]  # 14 + 7 tokens, and there are 20
    with pytest.raises(DataError, match=r"1 of 3 prompts are longer than the 13 tokens .*: 'long'"):
        answered(subject, PromptTask("own", SAMPLED, long), tmp_path)
    metrics, lines = answered(subject, PromptTask("own", replace(SAMPLED, too_long="skip"), long), tmp_path)
    assert [line["question"] for line in lines] == ["q0", "q1"]
    assert (metrics["answers"], metrics["skipped_too_long"]) == (2, 1)


def test_probes_give_shares_of_right_answers(
    subject: RunModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = [answering.PROBE_SET[0], *[probe for probe in answering.PROBE_SET if probe.category == "arithmetic"][:2]]
    said = {rules[0].name: "Ulaanbaatar.", rules[1].name: "It is 391.", rules[2].name: "I do not know."}
    prompts = [Prompt(probe.name, probe.category, probe.name) for probe in rules]
    task = PromptTask("probes", PromptSetConfig(kind="probes", temperature=0, max_new_tokens=4), prompts)
    monkeypatch.setattr(
        answering,
        "generate_batch",
        lambda model, tokenizer, batch, **_: [
            answering.Generation([], said[prompt.question], "eos") for prompt in prompts[: len(batch)]
        ],
    )
    monkeypatch.setattr(answering, "generation_batches", lambda *_: [[0, 1, 2]])
    metrics, lines = answered(subject, task, tmp_path)
    assert [line["right"] for line in lines] == [True, True, False]
    assert metrics["right/factual_recall"] == 1 and metrics["right/arithmetic"] == 0.5
    assert metrics["right"] == pytest.approx(2 / 3)


def test_a_classifier_is_refused(subject: RunModel, prompts: Any, tmp_path: Path) -> None:
    classifier = replace(subject.base, model=replace(subject.base.model, task="classification"))
    with pytest.raises(ConfigError, match="tiny is a classifier"):
        PromptTask("own", SAMPLED, prompts).check(Candidate("tiny", tmp_path, classifier))


def test_a_full_disk_loses_no_answer(subject: RunModel, prompts: Any, tmp_path: Path) -> None:
    task = PromptTask("own", SAMPLED, prompts)
    whole = answered(subject, task, tmp_path / "whole")
    with small_disk(tmp_path / "disk", size_kib=64) as disk:
        folder = EvaluationFolder(disk, task.name, task.settings)
        with folder.lock():
            folder.append_answers(whole[1][:2])
            ballast = fill(disk)
            with pytest.raises(OSError, match="No space left"):
                task.execute(subject, folder)
        ballast.unlink()
        assert answered(subject, task, disk) == whole


def test_lines_are_json(subject: RunModel, prompts: Any, tmp_path: Path) -> None:
    task = PromptTask("own", SAMPLED, prompts[:1])
    answered(subject, task, tmp_path)
    file = EvaluationFolder(tmp_path, task.name, task.settings).path / "answers.jsonl"
    assert set(json.loads(file.read_text())) == {
        *("question", "category", "prompt", "answer", "system", "stop_reason", "tokens", "seed"),
    }
