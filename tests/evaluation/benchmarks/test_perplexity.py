import math
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lab.config.schema import BenchmarkConfig
from qlora_lab.errors import ConfigError, DataError
from qlora_lab.evaluation.benchmarks.examinee import Examinee
from tests.evaluation.benchmarks.conftest import MakeExaminee, Run

TEXTS = ["A short text.", "Another one, with more in it: naïve café.", "x"]


@torch.inference_mode()
def losses(examinee: Examinee, text: str, window: int, stride: int) -> list[float]:
    """Score each byte after the start token, one by one, with what its window holds before it."""
    ids = [examinee.tokenizer.eos_token_id, *examinee.tokenizer(text, add_special_tokens=False)["input_ids"]]
    found = []
    for place in range(1, len(ids)):
        end = window  # of the first window that reaches this place
        while end < place:
            end += stride
        first = max(0, min(end, len(ids) - 1) - window)
        scores = examinee.model(input_ids=torch.tensor([ids[first:place]])).logits[0, -1].log_softmax(-1)
        found.append(-scores[ids[place]].item())
    return found


@pytest.mark.parametrize(("window", "stride"), [(None, None), (10, None), (10, 4), (7, 1)])
def test_every_byte_is_scored_once_in_its_window(
    run: Run, make_examinee: MakeExaminee, window: int | None, stride: int | None
) -> None:
    examinee = make_examinee()
    rows = [{"text": text} for text in TEXTS]
    outcome = run("perplexity", rows, examinee, window_tokens=window, stride_tokens=stride)
    expected = [losses(examinee, text, window or 2047, stride or window or 2047) for text in TEXTS]
    items = outcome.items["perplexity"]
    assert [item["loss_sum"] for item in items] == pytest.approx([sum(each) for each in expected], rel=1e-5)
    total, in_bytes = sum(map(sum, expected)), sum(len(text.encode()) for text in TEXTS)
    assert outcome.metrics["bits_per_byte"] == pytest.approx(total / math.log(2) / in_bytes, rel=1e-5)
    assert outcome.metrics["perplexity"] == pytest.approx(math.exp(total / in_bytes), rel=1e-5)  # a token is a byte
    assert (outcome.metrics["tokens"], outcome.metrics["bytes"], outcome.metrics["documents"]) == (in_bytes,) * 2 + (3,)


def test_batches_change_nothing_and_empty_documents_are_left_out(run: Run, make_examinee: MakeExaminee) -> None:
    rows = [{"page": text} for text in (TEXTS[0], " \n", TEXTS[1])]
    expected = run("perplexity", rows, text_column="page", window_tokens=8)
    assert [item["item"] for item in expected.items["perplexity"]] == [0, 2]
    for batch_tokens in (1, 30):
        found = run("perplexity", rows, make_examinee(batch_tokens=batch_tokens), text_column="page", window_tokens=8)
        # float32: padding changes how sums are rounded
        assert found.metrics == pytest.approx(expected.metrics, rel=1e-5)


def test_texts_that_cannot_be_scored_are_refused(run: Run, make_examinee: MakeExaminee, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"column 'text' is missing \(columns: 'txt'"):
        run("perplexity", [{"txt": "words"}])
    with pytest.raises(DataError, match="has no text to score: all of its 2 documents are empty"):
        run("perplexity", [{"text": ""}, {"text": " "}])
    with pytest.raises(ConfigError, match=r"window_tokens must be at most 49, .* got 50"):
        run("perplexity", [{"text": "words"}], make_examinee(max_length_tokens=50), window_tokens=50)
    with pytest.raises(ConfigError, match=r"stride_tokens must be at most 49, .* got 50"):
        run("perplexity", [{"text": "words"}], make_examinee(max_length_tokens=50), stride_tokens=50)
    overlapping: dict[str, Any] = {"task": "perplexity", "kind": "file", "path": "a.jsonl"}
    with pytest.raises(ConfigError, match=r"stride_tokens must be at most .*window_tokens \(8\).* got 9"):
        BenchmarkConfig(**overlapping, window_tokens=8, stride_tokens=9).check("evaluation.benchmarks.text")
