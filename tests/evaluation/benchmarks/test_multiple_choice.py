from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from qlora_lab.errors import DataError
from qlora_lab.evaluation.benchmarks.examinee import Examinee
from tests.evaluation.benchmarks.choice_rows import arc_rows, hellaswag_rows, piqa_rows, winogrande_rows
from tests.evaluation.benchmarks.conftest import MakeExaminee, Run
from tests.tiny_models import T5


@torch.inference_mode()
def log_likelihood(examinee: Examinee, context: str, continuation: str) -> float:
    """Score one continuation, plainly."""
    before, after = (examinee.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (context, continuation))
    scores = examinee.model(input_ids=torch.tensor([before + after])).logits[0].log_softmax(-1)
    return sum(scores[len(before) - 1 + place, token].item() for place, token in enumerate(after))


def likeliest(scores: list[float], lengths: list[int]) -> int:
    return max(range(len(scores)), key=lambda number: scores[number] / lengths[number])


def test_hellaswag_drops_the_marks_of_its_source(run: Run, make_examinee: MakeExaminee) -> None:
    row = {
        "activity_label": "Baking",
        "ctx_a": "[header] How to bake [title] Mix.",
        "ctx_b": "stir the dough",
        "endings": ["[step] Eat  it.", "Wait.", "Run away from it.", "é é"],
        "label": "1",
    }
    examinee = make_examinee()
    outcome = run("hellaswag", [row], examinee)
    context = "Baking:  How to bake. Mix. Stir the dough".replace("  ", " ")
    endings = [" Eat it.", "Wait.", "Run away from it.", "é é"]
    expected = [log_likelihood(examinee, context, f" {ending}") for ending in endings]
    [item] = outcome.items["hellaswag"]
    assert item["log_likelihoods"] == pytest.approx(expected, rel=1e-5)
    assert outcome.metrics["acc"] == float(likeliest(expected, [1] * 4) == 1)
    assert outcome.metrics["acc_norm"] == float(likeliest(expected, [8, 5, 17, 3]) == 1)
    assert outcome.metrics["acc_bytes"] == float(likeliest(expected, [8, 5, 17, 5]) == 1)


def test_piqa_arc_and_winogrande_score_what_they_should(run: Run, make_examinee: MakeExaminee) -> None:
    examinee = make_examinee()
    asked: dict[str, tuple[dict[str, Any], list[tuple[str, str]], int]] = {
        "piqa": (
            {"goal": "Open a jar.", "sol1": "Turn it.", "sol2": "Look at it.", "label": 1},
            [("Question: Open a jar.\nAnswer:", " Turn it."), ("Question: Open a jar.\nAnswer:", " Look at it.")],
            1,
        ),
        "arc": (
            {"question": "What?", "choices": {"text": ["ice", "fire", "air"], "label": list("123")}, "answerKey": "2"},
            [("Question: What?\nAnswer:", f" {choice}") for choice in ("ice", "fire", "air")],
            1,
        ),
        "winogrande": (
            {"sentence": "Ann met Eve as _ was late.", "option1": "Ann", "option2": "Eve", "answer": "2"},
            [("Ann met Eve as Ann", " was late."), ("Ann met Eve as Eve", " was late.")],
            1,
        ),
    }
    for task, (row, pairs, answer) in asked.items():
        outcome = run(task, [row], examinee)
        expected = [log_likelihood(examinee, *pair) for pair in pairs]
        [item] = outcome.items[task]
        assert item["log_likelihoods"] == pytest.approx(expected, rel=1e-5)
        assert item["answer"] == answer
        assert outcome.metrics["acc"] == float(likeliest(expected, [1] * len(pairs)) == answer)
        assert ("acc_norm" in outcome.metrics) == (task != "winogrande")


@pytest.mark.parametrize(
    ("task", "rows"),
    [("hellaswag", hellaswag_rows), ("piqa", piqa_rows), ("arc", arc_rows), ("winogrande", winogrande_rows)],
)
def test_batches_change_nothing(run: Run, make_examinee: MakeExaminee, task: str, rows: Callable[..., Any]) -> None:
    expected = run(task, rows(9))
    for batch_tokens in (1, 300, 100_000):
        outcome = run(task, rows(9), make_examinee(batch_tokens=batch_tokens))
        assert outcome.metrics == expected.metrics
        for item, same in zip(outcome.items[task], expected.items[task], strict=True):
            # float32 sums over some 50 bytes
            assert item["log_likelihoods"] == pytest.approx(same["log_likelihoods"], rel=1e-5)


@torch.inference_mode()
def test_an_encoder_decoder_reads_the_context_and_writes_the_choice(run: Run, make_examinee: MakeExaminee) -> None:
    torch.manual_seed(3)
    model = T5ForConditionalGeneration(T5Config(**T5 | {"vocab_size": 384})).eval()
    examinee = make_examinee(model)
    [row] = piqa_rows(1)
    [item] = run("piqa", [row], examinee).items["piqa"]
    context = examinee.tokenizer(f"Question: {row['goal']}\nAnswer:")["input_ids"]  # with </s>
    for name, score in zip(("sol1", "sol2"), item["log_likelihoods"], strict=True):
        choice = examinee.tokenizer(f" {row[name]}", add_special_tokens=False)["input_ids"]
        loss = model(input_ids=torch.tensor([context]), labels=torch.tensor([choice])).loss
        assert score == pytest.approx(-loss.item() * len(choice), rel=1e-4)


@pytest.mark.parametrize(
    ("task", "rows", "change", "message"),
    [
        ("hellaswag", hellaswag_rows, {"label": "4"}, "line 1: column 'label' must be a number from 0 to 3; got '4'"),
        ("hellaswag", hellaswag_rows, {"endings": ["one"]}, "column 'endings' must hold a list of 4 texts or more"),
        ("piqa", piqa_rows, {"label": 2}, r"column 'label' must be a number from 0 to 1; got a number \(2\)"),
        ("piqa", piqa_rows, {"sol1": " "}, "line 1: a choice is empty"),
        ("arc", arc_rows, {"answerKey": "E"}, "column 'answerKey' must be one of .*; got 'E'"),
        ("arc", arc_rows, {"choices": ["ice"]}, "column 'choices' must hold an object"),
        ("winogrande", winogrande_rows, {"sentence": "No blank."}, "must hold a blank '_' and words after it"),
        ("winogrande", winogrande_rows, {"answer": "3"}, "column 'answer' must be 1 or 2; got '3'"),
    ],
)
def test_broken_rows_are_refused(
    run: Run, task: str, rows: Callable[..., Any], change: dict[str, Any], message: str
) -> None:
    broken = rows(2)
    broken[0] |= change
    with pytest.raises(DataError, match=message):
        run(task, broken)


def test_rows_without_labels_are_none_to_ask(run: Run) -> None:
    unlabelled = [row | {"label": ""} for row in hellaswag_rows(3)]
    assert run("hellaswag", [*unlabelled, *hellaswag_rows(2)]).metrics["questions"] == 2
    with pytest.raises(DataError, match="none of its 3 rows has a label; try a split with labels"):
        run("hellaswag", unlabelled)


def test_a_question_that_does_not_fit_is_refused(run: Run, make_examinee: MakeExaminee) -> None:
    rows = piqa_rows(3)
    rows[1]["sol2"] = "word " * 100
    with pytest.raises(DataError, match=r"question 2 of evaluation.benchmarks.piqa takes \d+ tokens.* is 200; items"):
        run("piqa", rows, make_examinee(max_length_tokens=200))
