from array import array
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lab.config.schema import CAUSAL, SEQ2SEQ
from qlora_lab.data.layout import lay_out, token_rows
from qlora_lab.data.tokenization import Example
from qlora_lab.models.cross_entropy import IGNORE_INDEX

PAD = 7


def padded(rows: Sequence[Sequence[int]], padding: int) -> list[list[int]]:
    longest = max(len(row) for row in rows)
    return [[*row, *[padding] * (longest - len(row))] for row in rows]


def slowly(rows: Sequence[Sequence[Example]], task: str, *, packed: bool) -> dict[str, list[list[int]]]:
    """Lay out one micro-batch, token by token."""
    if task != CAUSAL:
        prompts = [list(example.input_ids[: example.target_start]) for (example,) in rows]
        targets = [[IGNORE_INDEX, *example.input_ids[example.target_start :]] for (example,) in rows]
        return {
            "input_ids": padded(prompts, PAD),
            "attention_mask": padded([[1] * len(prompt) for prompt in prompts], 0),
            "labels": padded(targets, IGNORE_INDEX),
        }
    ids = [[token for example in row for token in example.input_ids] for row in rows]
    labels = [
        [
            token if place >= example.loss_start else IGNORE_INDEX
            for example in row
            for place, token in enumerate(example.input_ids)
        ]
        for row in rows
    ]
    found = {"input_ids": padded(ids, PAD), "labels": padded(labels, IGNORE_INDEX)}
    if packed:
        return found | {"position_ids": padded([[*(p for e in row for p in range(e.length))] for row in rows], 0)}
    return found | {"attention_mask": padded([[1] * len(row) for row in ids], 0)}


@st.composite
def examples(draw: st.DrawFn) -> Example:
    length = draw(st.integers(2, 12))
    ids = draw(st.lists(st.integers(0, 50_000), min_size=length, max_size=length))
    start = draw(st.integers(1, length - 1))
    return Example(array("i", ids), start, draw(st.sampled_from([1, start])), key="k", family=None, target_bytes=1)


@given(
    micro_batches=st.lists(
        st.lists(st.lists(examples(), min_size=1, max_size=3), min_size=1, max_size=4), min_size=1, max_size=4
    ),
    kind=st.sampled_from([(CAUSAL, False), (CAUSAL, True), (SEQ2SEQ, False)]),
)
@settings(max_examples=200, deadline=None)
def test_micro_batches_are_those_laid_out_one_by_one(
    micro_batches: list[list[list[Example]]], kind: tuple[str, bool]
) -> None:
    task, packed = kind
    if not packed:
        micro_batches = [[row[:1] for row in rows] for rows in micro_batches]
    every = [example for rows in micro_batches for row in rows for example in row]
    kinds = np.arange(1, len(every) + 1)
    shares = [[len(row) for row in rows] for rows in micro_batches]
    found = lay_out(token_rows(every), kinds, shares, PAD, task=task, packed=packed)
    number = 0
    for rows, micro_batch in zip(micro_batches, found, strict=True):
        assert {name: values.tolist() for name, values in micro_batch.inputs.items()} == slowly(
            rows, task, packed=packed
        )
        assert all(values.dtype == np.int64 and values.flags.c_contiguous for values in micro_batch.inputs.values())
        own: list[list[int]] = []
        for row in rows:
            own.append([])
            for example in row:
                number += 1
                length = example.length if task == CAUSAL else 1 + example.target_tokens
                own[-1] += [number] * length
        assert micro_batch.kinds.tolist() == padded(own, 0)


@pytest.mark.parametrize("ids", [array("i", [5, 6, 2]), [5, 6, 2]])
def test_examples_may_hold_their_tokens_in_any_sequence(ids: Sequence[int]) -> None:
    rows = token_rows([Example(ids, 1, 1, key="k", family=None, target_bytes=1)] * 2)
    assert (rows.ids.tolist(), rows.ids.dtype) == ([5, 6, 2, 5, 6, 2], np.int32)
