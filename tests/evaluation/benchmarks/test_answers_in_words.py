import math
from typing import Any

import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from qlora_lab.config.schema import BenchmarkConfig
from qlora_lab.errors import ConfigError, DataError
from qlora_lab.evaluation.benchmarks import answers as in_words
from qlora_lab.evaluation.benchmarks import glue
from qlora_lab.evaluation.benchmarks.examinee import Examinee
from qlora_lab.evaluation.benchmarks.natural_instructions import same
from qlora_lab.evaluation.generate import Stops
from tests.evaluation.benchmarks.conftest import MakeExaminee, Run

COLA = [
    {"sentence": text, "label": label, "idx": number}
    for number, (text, label) in enumerate([("A cat sat.", 1), ("Sat cat a.", 0), ("Birds fly.", 1), ("Fly of.", 0)])
]


def classifier(*labels: str) -> RobertaForSequenceClassification:
    torch.manual_seed(2)
    config = RobertaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=300,
        pad_token_id=0,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    return RobertaForSequenceClassification(config).eval()


def test_metrics_of_each_glue_task() -> None:
    # three right positives, one wrong, one right negative, one wrong
    names = ("not_equivalent", "equivalent")
    targets = [names[number] for number in (1, 1, 1, 0, 0, 1)]
    answers = [names[number] for number in (1, 1, 1, 1, 0, 0)]
    found = glue.metrics("mrpc", targets, answers)
    assert found["acc"] == pytest.approx(4 / 6) and found["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    names = ("unacceptable", "acceptable")
    targets = [names[number] for number in (1, 1, 1, 0, 0, 1)]
    answers = [names[number] for number in (1, 1, 1, 1, 0, 0)]
    # (3 * 1 - 1 * 1) / sqrt((3 + 1) (3 + 1) (1 + 1) (1 + 1))
    assert glue.metrics("cola", targets, answers)["matthews"] == pytest.approx(2 / 8)
    assert glue.metrics("cola", targets, ["acceptable"] * 6)["matthews"] == 0.0
    scores = glue.metrics("stsb", ["0.0", "1.0", "2.0", "5.0"], ["0.2", "1.0", "4.0", "3.0"])
    assert scores["spearman"] == pytest.approx(0.8) and scores["pearson"] == pytest.approx(7.6 / math.sqrt(14 * 9.23))
    assert math.isnan(glue.metrics("stsb", ["0.0", "1.0"], ["3.0", "3.0"])["pearson"])


def test_what_is_no_class_is_wrong_and_counted() -> None:
    found = glue.metrics("qqp", ["duplicate", "not_duplicate", "duplicate"], ["yes", "no", "duplicate"])
    assert found == {"acc": 1 / 3, "f1": pytest.approx(0.5), "unreadable": 2, "texts": 3}
    assert glue.metrics("stsb", ["0.0", "1.0", "2.0"], ["none", "1.0", "2.0"])["unreadable"] == 1


def test_a_classifier_is_scored_by_the_classes_it_chooses(run: Run, make_examinee: MakeExaminee) -> None:
    model = classifier("unacceptable", "acceptable")
    outcome = run("glue_cola", COLA, make_examinee(model, max_length_tokens=200))
    items = outcome.items["glue_cola"]
    assert [item["target"] for item in items] == ["acceptable", "unacceptable"] * 2
    assert outcome.metrics["acc"] == sum(item["answer"] == item["target"] for item in items) / 4
    expected = glue.metrics("cola", [item["target"] for item in items], [item["answer"] for item in items])
    assert outcome.metrics == expected
    for batch_tokens in (1, 100):
        same_model = make_examinee(model, max_length_tokens=200, batch_tokens=batch_tokens)
        assert run("glue_cola", COLA, same_model) == outcome


def test_a_classifier_of_other_classes_is_refused(run: Run, make_examinee: MakeExaminee) -> None:
    with pytest.raises(
        ConfigError, match="asks for the classes unacceptable, acceptable, and the model chooses among no"
    ):
        run("glue_cola", COLA, make_examinee(classifier("no", "yes"), max_length_tokens=200))


def test_models_are_asked_only_what_they_can_be() -> None:
    def check(task: str, model_task: str) -> None:
        BenchmarkConfig(task=task, kind="hub", hub_id="a/b").check_model("evaluation.benchmarks.b", model_task)

    check("mmlu", "causal"), check("glue_stsb", "seq2seq"), check("glue_cola", "classification")
    for task, model_task, message in (
        ("mmlu", "seq2seq", "cannot be asked of a model whose model.task is 'seq2seq'"),
        ("mmlu", "classification", "such models are scored on glue_"),
        ("glue_stsb", "classification", "have no regression head"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(task, model_task)


INSTRUCTIONS = [
    {"task_name": "task1", "id": "1", "definition": "Name a bird.", "inputs": "small", "targets": "A robin."},
    {"task_name": "task1", "id": "2", "definition": "Name a bird.", "inputs": "small", "targets": "the wren"},
    {"task_name": "task2", "id": "3", "definition": "Add.", "inputs": "1 and 2", "targets": "3"},
]


def test_exact_match_leaves_case_and_punctuation_aside() -> None:
    assert same("A robin.", "a  ROBIN") and not same("A robin.", "robin")


def test_the_best_of_several_references_counts(
    run: Run, make_examinee: MakeExaminee, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rouge_score", reason="needs rouge-score: pip install 'qlora_lab[evaluation]'")
    from qlora_lab.evaluation.benchmarks import natural_instructions
    from qlora_lab.evaluation.generate import Generation

    said = {"Name a bird.": "the small wren", "Add.": "3!"}

    def answers(examinee: Examinee, config: Any, prompts: Any, advance: Any) -> list[Generation]:
        asked = [examinee.tokenizer.decode(prompt) for prompt in prompts]
        return [Generation([], next(said[words] for words in said if words in prompt), "eos") for prompt in asked]

    monkeypatch.setattr(natural_instructions, "written_answers", answers)
    outcome = run("natural_instructions", INSTRUCTIONS)
    first, second = outcome.items["natural_instructions"]
    assert first["references"] == ["A robin.", "the wren"] and first["family"] == "task1"
    assert first["rouge_l"] == pytest.approx(0.8)  # two of three words, and both of two
    assert (first["exact_match"], second["exact_match"], second["rouge_l"]) == (False, True, 1.0)
    assert outcome.metrics == {"rouge_l": pytest.approx(0.9), "exact_match": 0.5, "prompts": 2}


def test_answers_are_generated_and_long_prompts_refused(run: Run, make_examinee: MakeExaminee) -> None:
    pytest.importorskip("rouge_score", reason="needs rouge-score: pip install 'qlora_lab[evaluation]'")
    expected = run("natural_instructions", INSTRUCTIONS, max_new_tokens=6)
    assert all(item["answer"] for item in expected.items["natural_instructions"])
    again = run("natural_instructions", INSTRUCTIONS, make_examinee(batch_tokens=1), max_new_tokens=6)
    assert again == expected
    with pytest.raises(
        DataError, match=r"the prompt of item 1 of .* tokens and does not fit in 20 .*items are never cut"
    ):
        run("natural_instructions", INSTRUCTIONS, max_new_tokens=6, max_source_tokens=20)


def test_an_answer_ends_with_its_turn(run: Run, make_examinee: MakeExaminee, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the template of a chat model has it, which may never write the end of the whole text."""
    scores = [{"sentence1": "A cat sat.", "sentence2": "Birds fly.", "label": 3.1}] * 2
    [answer, _] = run("glue_stsb", scores, max_new_tokens=12).items["glue_stsb"]
    end = answer["answer"][1]

    def ends(prompt_format: str, tokenizer: Any) -> Stops:
        assert prompt_format == "plain"
        return Stops(texts=(end,))

    monkeypatch.setattr(in_words, "turn_ends", ends)
    shorter = run("glue_stsb", scores, max_new_tokens=12).items["glue_stsb"]
    assert [item["answer"] for item in shorter] == [answer["answer"].partition(end)[0].strip()] * 2


def test_scores_of_stsb_are_not_rounded_as_those_a_model_is_trained_on() -> None:
    columns = {"sentence1": "A cat sat.", "sentence2": "Birds fly.", "label": 3.1}
    found = glue.labelled("stsb", columns)
    assert found is not None and (found.label, found.row.target) == (3.1, "3.2")
    assert glue.labelled("stsb", columns | {"label": -1}) is None
    named = glue.labelled("cola", COLA[0])
    assert named is not None and named.label == named.row.target == "acceptable"
    rounded = glue.metrics("stsb", ["1.2", "3.2", "5.0"], ["1.2", "3.2", "5.0"])
    exact = glue.metrics("stsb", [1.1, 3.1, 5.0], ["1.2", "3.2", "5.0"])
    assert rounded["pearson"] == 1.0 > exact["pearson"]
