from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lab.data.batching import collate, left_pad, plan_steps, split_micro_batches
from qlora_lab.data.tokenization import Example
from qlora_lab.errors import DataError

LENGTHS = [5 + (index * 37) % 90 for index in range(500)]
lengths_lists = st.lists(st.integers(1, 100), min_size=1, max_size=70)


def plan(
    lengths: list[int],
    batch_size: int,
    max_steps: int | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    group_by_length: bool = True,
) -> list[list[int]]:
    return plan_steps(
        lengths,
        batch_size=batch_size,
        max_steps=max_steps,
        max_tokens=max_tokens,
        seed=seed,
        group_by_length=group_by_length,
    )


@given(lengths=lengths_lists, batch_size=st.integers(1, 9), seed=st.integers(0, 3), grouped=st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_epoch_holds_every_row_once(lengths: list[int], batch_size: int, seed: int, grouped: bool) -> None:
    steps_an_epoch = -(-len(lengths) // batch_size)
    steps = plan(lengths, batch_size, max_steps=3 * steps_an_epoch, seed=seed, group_by_length=grouped)
    assert len(steps) == 3 * steps_an_epoch
    for epoch in range(3):
        of_epoch = steps[epoch * steps_an_epoch : (epoch + 1) * steps_an_epoch]
        assert sorted(row for step in of_epoch for row in step) == list(range(len(lengths)))
        assert all(len(step) == batch_size for step in of_epoch[:-1])


@given(
    lengths=lengths_lists,
    batch_size=st.integers(1, 9),
    max_tokens=st.integers(1, 5000),
    max_steps=st.none() | st.integers(0, 50),
)
@settings(max_examples=150, deadline=None)
def test_plan_stops_with_the_row_that_reaches_the_budget(
    lengths: list[int], batch_size: int, max_tokens: int, max_steps: int | None
) -> None:
    steps = plan(lengths, batch_size, max_steps=max_steps, max_tokens=max_tokens)
    rows = [row for step in steps for row in step]
    tokens = sum(lengths[row] for row in rows)
    assert all(steps)
    if max_steps is not None:
        assert len(steps) <= max_steps
    if rows:
        assert tokens - lengths[rows[-1]] < max_tokens
    if tokens < max_tokens:
        assert len(steps) == max_steps


@pytest.mark.parametrize("grouped", [True, False])
def test_plan_depends_on_its_inputs_alone_and_shorter_plans_begin_longer_ones(grouped: bool) -> None:
    steps = plan(LENGTHS, 8, max_steps=200, group_by_length=grouped)
    assert steps == plan(LENGTHS, 8, max_steps=200, group_by_length=grouped)
    assert steps[:90] == plan(LENGTHS, 8, max_steps=90, group_by_length=grouped)
    assert steps != plan(LENGTHS, 8, max_steps=200, seed=1, group_by_length=grouped)
    epoch = -(-len(LENGTHS) // 8)
    assert steps[:epoch] != steps[epoch : 2 * epoch]  # shuffled anew


def padding_share(batches: list[list[int]], lengths: list[int]) -> float:
    """Share of positions that are padding when each batch is padded to its longest row."""
    positions = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    return 1 - sum(lengths[row] for batch in batches for row in batch) / positions


def test_grouping_saves_padding_and_keeps_the_order_random() -> None:
    grouped, loose = (plan(LENGTHS, 8, max_steps=62, group_by_length=group) for group in (True, False))
    assert padding_share(grouped, LENGTHS) < 0.08
    assert padding_share(loose, LENGTHS) > 0.35
    one_window = plan(LENGTHS[:128], 8, max_steps=16)
    mean_length = torch.tensor([sum(LENGTHS[row] for row in step) / 8 for step in one_window])
    order = torch.arange(16.0)
    assert torch.corrcoef(torch.stack((mean_length, order)))[0, 1].abs() < 0.6  # 2.4 standard errors of 16


def test_rows_that_do_not_fill_a_step_are_not_the_longest() -> None:
    lengths = list(range(1, 101))  # 100 rows: 12 steps of 8 and 4 rows over
    last = [lengths[row] for seed in range(50) for row in plan(lengths, 8, max_steps=13, seed=seed)[-1]]
    assert len(last) == 200
    assert 40 < sum(last) / len(last) < 61  # 50.5; the standard error is 2


def test_plan_without_rows_or_limit_is_refused() -> None:
    for lengths in ([], [3, 0]):
        with pytest.raises(DataError, match="rows of at least one token"):
            plan(lengths, 2, max_steps=1)
    with pytest.raises(DataError, match="are both null"):
        plan([1], 2)


@given(lengths=lengths_lists, size=st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_micro_batches_hold_the_step_longest_first(lengths: list[int], size: int) -> None:
    step = list(range(len(lengths)))
    micro_batches = split_micro_batches(step, lengths, size)
    rows = [row for batch in micro_batches for row in batch]
    assert sorted(rows) == step
    assert [lengths[row] for row in rows] == sorted(lengths, reverse=True)
    assert all(len(batch) == size for batch in micro_batches[:-1])
    assert padding_share(micro_batches, lengths) <= padding_share([step], lengths) + 1e-9


def example(ids: list[int], target_start: int, loss_start: int | None = None) -> Example:
    start = target_start if loss_start is None else loss_start
    return Example(array("i", ids), target_start, start, key="k", family=None, target_bytes=1)


def test_collate_labels_by_position_even_where_pad_is_eos() -> None:
    eos = 2
    batch = collate([example([5, eos, 7, eos], 2), example([5, 6, eos], 1), example([8, eos], 1)], pad_id=eos)
    expected = {
        "input_ids": [[5, eos, 7, eos], [5, 6, eos, eos], [8, eos, eos, eos]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]],
        "labels": [[-100, -100, 7, eos], [-100, 6, eos, -100], [-100, eos, -100, -100]],
    }
    assert batch.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(batch[name], torch.tensor(values))


def test_collate_with_loss_on_everything() -> None:
    batch = collate([example([5, 6, 7, 2], 3, loss_start=1)], pad_id=0)
    assert batch["labels"].tolist() == [[-100, 6, 7, 2]]


def test_left_pad_ends_every_prompt_at_the_right() -> None:
    batch = left_pad([[5, 6, 7], array("i", [8])], pad_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [2, 2, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
