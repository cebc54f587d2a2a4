import math
from typing import Any

import pytest
import torch

from qlora_lab.data.batching import collate
from qlora_lab.evaluation.target_loss import RowLoss, aggregate, score

CPU = torch.device("cpu")


def scored(model: Any, rows: Any, batch_tokens: int = 64) -> list[RowLoss]:
    return score(model, rows, pad_id=0, batch_tokens=batch_tokens, chunk_tokens=4, device=CPU)


def test_each_row_gets_the_loss_that_transformers_gives_it(model: Any, make_rows: Any) -> None:
    rows = make_rows(9)
    for row, actual in zip(rows, scored(model, rows), strict=True):
        tokens = len(row.example.input_ids) - row.example.target_start
        expected = model(**collate([row.example], 0)).loss.item() * tokens
        assert actual.loss_sum == pytest.approx(expected, rel=1e-5)
        assert actual.target_tokens == tokens and actual.target_bytes == len(row.target)


@pytest.mark.parametrize("batch_tokens", [1, 40, 100_000])
def test_neither_batching_nor_the_order_of_rows_changes_a_loss(model: Any, make_rows: Any, batch_tokens: int) -> None:
    rows = make_rows(20)
    alone = [scored(model, [row])[0] for row in rows]
    together = scored(model, rows, batch_tokens)
    backwards = scored(model, rows[::-1], batch_tokens)[::-1]
    for single, joint, turned in zip(alone, together, backwards, strict=True):
        assert joint.loss_sum == pytest.approx(single.loss_sum, rel=1e-5)  # float32, other shapes
        assert turned.loss_sum == pytest.approx(single.loss_sum, rel=1e-5)
        assert joint.target_tokens == turned.target_tokens == single.target_tokens


def test_what_training_scores_does_not_matter(model: Any, make_rows: Any) -> None:
    assert scored(model, make_rows(5, loss_on="everything")) == scored(model, make_rows(5))


def test_tokens_are_pooled_over_rows() -> None:
    pooled = aggregate([RowLoss(3.0, 2, 4), RowLoss(9.0, 4, 20)])
    assert pooled == {
        "loss": 2.0,
        "bits_per_byte": pytest.approx(12 / math.log(2) / 24),
        "target_tokens": 6,
        "rows": 2,
    }


def test_the_mean_of_nothing_is_missing() -> None:
    empty = aggregate([])
    assert math.isnan(empty["loss"]) and math.isnan(empty["bits_per_byte"])
