from typing import Any

import torch

from qlora_lab.train.steps import StepDataset, step_loader

PLAN = [[0, 1, 2], [3, 4], [5, 6, 7, 8]]


def test_a_step_holds_its_rows_as_micro_batches(examples: Any) -> None:
    steps = StepDataset(examples, PLAN, first_step=0, micro_batch_size=3, pad_id=0)
    assert [len(batch.micro_batches) for batch in step_loader(steps)] == [1, 1, 2]
    step = steps[2]
    rows = [examples[row] for row in PLAN[2]]
    assert step.tokens == sum(row.length for row in rows)
    assert step.tokens == sum(int(micro["attention_mask"].sum()) for micro in step.micro_batches)
    assert step.target_tokens == sum(row.target_tokens for row in rows)


def test_a_resumed_run_gets_the_steps_that_are_left(examples: Any) -> None:
    whole = list(step_loader(StepDataset(examples, PLAN, 0, 2, 0)))
    rest = list(step_loader(StepDataset(examples, PLAN, 1, 2, 0)))
    assert len(rest) == 2
    for expected, actual in zip(whole[1:], rest, strict=True):
        for left, right in zip(expected.micro_batches, actual.micro_batches, strict=True):
            assert all(torch.equal(left[name], right[name]) for name in left)


def test_serving_steps_draws_nothing_from_the_runs_generator(examples: Any) -> None:
    before = torch.get_rng_state()
    list(step_loader(StepDataset(examples, PLAN, 0, 2, 0)))
    assert torch.equal(torch.get_rng_state(), before)


def test_packed_steps_hold_the_same_rows_and_targets_in_fewer_positions(examples: Any) -> None:
    apart, packed = (StepDataset(examples, PLAN, 0, 4, 0, pack_tokens=tokens)[2] for tokens in (None, 40))
    assert (packed.tokens, packed.target_tokens) == (apart.tokens, apart.target_tokens)
    assert packed.bucket_target_tokens == apart.bucket_target_tokens
    shapes = [sum(micro["input_ids"].numel() for micro in step.micro_batches) for step in (apart, packed)]
    assert packed.tokens <= shapes[1] < shapes[0]
    assert all("attention_mask" not in micro for micro in packed.micro_batches)
