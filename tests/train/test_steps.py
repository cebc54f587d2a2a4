import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from qlora_lab.data.tokenization import Example
from qlora_lab.errors import DataError
from qlora_lab.models.cross_entropy import IGNORE_INDEX
from qlora_lab.train import steps as train_steps
from qlora_lab.train.steps import GROUPS_AHEAD, THREAD, StepBatch, StepDataset, step_loader

PLAN = [[0, 1, 2], [3, 4], [5, 6, 7, 8]]
CPU = torch.device("cpu")
A_LONG_TIME_S = 60


def served(steps: Any) -> list[Any]:
    with step_loader(steps, CPU) as batches:
        assert len(batches) == len(steps)
        return list(batches)


class SlowSteps:
    """Six steps that say when they begin to be made, and are made when they are let."""

    def __init__(self, broken: int | None = None) -> None:
        self.begun = [threading.Event() for _ in range(6)]
        self.let = [threading.Event() for _ in range(6)]
        self.broken = broken

    def __len__(self) -> int:
        return len(self.begun)

    def groups(self) -> Iterator[list[int]]:
        for index in range(len(self)):
            self.begun[index].set()
            assert self.let[index].wait(A_LONG_TIME_S)
            if index == self.broken:
                raise DataError(f"row {index} cannot be read")
            yield [index]


def test_a_step_holds_its_rows_as_micro_batches(examples: Any) -> None:
    steps = StepDataset(examples, PLAN, first_step=0, micro_batch_size=3, pad_id=0)
    assert [len(batch.micro_batches) for batch in served(steps)] == [1, 1, 2]
    step = steps[2]
    rows = [examples[row] for row in PLAN[2]]
    assert step.tokens == sum(row.length for row in rows)
    assert step.tokens == sum(int(micro["attention_mask"].sum()) for micro in step.micro_batches)
    assert step.target_tokens == sum(row.target_tokens for row in rows)


def test_a_resumed_run_gets_the_steps_that_are_left(examples: Any) -> None:
    whole = served(StepDataset(examples, PLAN, 0, 2, 0))
    rest = served(StepDataset(examples, PLAN, 1, 2, 0))
    assert len(rest) == 2
    for expected, actual in zip(whole[1:], rest, strict=True):
        for left, right in zip(expected.micro_batches, actual.micro_batches, strict=True):
            assert all(torch.equal(left[name], right[name]) for name in left)


def test_serving_steps_draws_nothing_from_the_runs_generator(examples: Any) -> None:
    before = torch.get_rng_state()
    served(StepDataset(examples, PLAN, 0, 2, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_packed_steps_hold_the_same_rows_and_targets_in_fewer_positions(examples: Any) -> None:
    apart, packed = (StepDataset(examples, PLAN, 0, 4, 0, pack_tokens=tokens)[2] for tokens in (None, 40))
    assert (packed.tokens, packed.target_tokens) == (apart.tokens, apart.target_tokens)
    assert packed.bucket_target_tokens == apart.bucket_target_tokens
    shapes = [sum(micro["input_ids"].numel() for micro in step.micro_batches) for step in (apart, packed)]
    assert packed.tokens <= shapes[1] < shapes[0]
    assert all("attention_mask" not in micro for micro in packed.micro_batches)


@pytest.mark.parametrize("pack_tokens", [None, 40])
@pytest.mark.parametrize("group", [(2**15, 8), (60, 8), (2**15, 2), (1, 8)], ids=str)
def test_steps_made_at_once_are_those_made_one_by_one(
    examples: Any, monkeypatch: pytest.MonkeyPatch, pack_tokens: int | None, group: tuple[int, int]
) -> None:
    monkeypatch.setattr(train_steps, "GROUP_TOKENS", group[0])
    monkeypatch.setattr(train_steps, "GROUP_STEPS", group[1])
    plan = [*PLAN, [9], [0, 10, 11], [12, 13, 14, 15, 16]]
    steps = StepDataset(examples, plan, 0, 2, 0, pack_tokens)
    groups = list(steps.groups())
    made = [batch for batches in groups for batch in batches]
    assert len(made) == len(plan)
    for number, (batch, rows) in enumerate(zip(made, plan, strict=True)):
        alone = steps[number]
        assert batch[2:] == alone[2:]
        assert batch.tokens == sum(examples[row].length for row in rows)
        for actual, expected in zip(batch.micro_batches, alone.micro_batches, strict=True):
            assert actual.keys() == expected.keys()
            assert all(torch.equal(actual[name], expected[name]) for name in actual)
        assert all(map(torch.equal, batch.buckets, alone.buckets))
    for batches in groups:
        assert len(batches) <= group[1]
        assert len(batches) == 1 or len(batches) * batches[0].tokens <= group[0]
    assert (len(groups) == 1) == (group == (2**15, 8))


def test_labels_know_the_length_of_their_row() -> None:
    lengths = [30, 40, 130, 32, 70]
    rows = [Example(list(range(length)), 3, 3, key="k", family=None, target_bytes=1) for length in lengths]
    for pack_tokens in (None, 200):
        (batch,) = next(StepDataset(rows, [[0, 1, 2, 3, 4]], 0, 2, 0, pack_tokens).groups())
        assert batch.bucket_target_tokens == [27 + 29, 37, 67, 127, 0, 0, 0]
        assert batch.target_tokens == sum(batch.bucket_target_tokens)
        for bucket, expected in enumerate(batch.bucket_target_tokens):
            own = [
                (kinds[micro_batch["labels"] != IGNORE_INDEX] == bucket).sum()
                for micro_batch, kinds in zip(batch.micro_batches, batch.buckets, strict=True)
            ]
            assert sum(own) == expected


def test_steps_are_made_while_earlier_ones_are_trained_on() -> None:
    steps: Any = SlowSteps()
    with step_loader(steps, CPU) as batches:
        taken = iter(batches)
        for number in range(len(steps)):
            steps.let[number].set()
            assert next(taken) == number
            for let in steps.let[: number + 1 + GROUPS_AHEAD]:  # nobody has asked for the last two
                let.set()
            assert all(begun.wait(A_LONG_TIME_S) for begun in steps.begun[: number + 1 + GROUPS_AHEAD])
            assert not any(begun.is_set() for begun in steps.begun[number + 1 + GROUPS_AHEAD :])
        assert next(taken, None) is None


@pytest.mark.parametrize("ends_by", ["a broken row", "an interruption"])
def test_the_thread_ends_with_the_training_and_tells_what_went_wrong(ends_by: str) -> None:
    steps: Any = SlowSteps(broken=2 if ends_by == "a broken row" else None)
    for let in steps.let:
        let.set()
    taken = []

    def train() -> None:
        with step_loader(steps, CPU) as batches:
            for batch in batches:
                taken.append(batch)
                if ends_by == "an interruption" and len(taken) == 2:
                    raise KeyboardInterrupt

    with pytest.raises((DataError, KeyboardInterrupt)) as ended:
        train()
    assert taken == [0, 1]
    assert ended.match("row 2 cannot be read" if ends_by == "a broken row" else "")
    assert not any(thread.name.startswith(THREAD) for thread in threading.enumerate())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pins memory for a GPU, and torch sees none")
def test_a_batch_for_a_gpu_lies_in_pinned_memory(examples: Any) -> None:
    with step_loader(StepDataset(examples, PLAN, 0, 2, 0), torch.device("cuda", 0)) as batches:
        for batch in batches:
            tensors = [tensor for each in batch.micro_batches for tensor in each.values()]
            assert all(tensor.is_pinned() for tensor in [*tensors, *batch.buckets])
            assert isinstance(batch, StepBatch)
