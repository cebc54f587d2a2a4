"""The batches of a training plan: one item is one optimizer step, as micro-batches that fit in memory."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qlora_lab.config.schema import CAUSAL
from qlora_lab.data.batching import as_tensors, split_micro_batches
from qlora_lab.data.drawn_rows import lengths_of, rows_of
from qlora_lab.data.layout import lay_out
from qlora_lab.data.packing import pack
from qlora_lab.data.tokenization import Example

LONGEST_OF_BUCKET = (32, 64, 128, 256, 512, 1024)  # tokens of a row; longer ones are a bucket more
BUCKETS = len(LONGEST_OF_BUCKET) + 1
# Steps are made several at once, which costs little more than making one. A group is as many as fill these tokens, and
# no more than so many.
GROUP_TOKENS, GROUP_STEPS = 2**15, 8
GROUPS_AHEAD = 2  # that are made before they are asked for
THREAD = "steps"


class StepBatch(NamedTuple):
    """The rows of one optimizer step.

    A micro-batch holds input_ids, attention_mask and labels, each (rows, tokens); of packed rows position_ids in the
    place of the mask. The counts are made before the tensors go to the device, where reading them back would wait for
    it.
    """

    micro_batches: list[dict[str, Tensor]]
    buckets: list[Tensor]  # of each micro-batch: the length bucket of the row that a label is of, in the labels' shape
    tokens: int  # padding left out
    target_tokens: int
    bucket_target_tokens: list[int]


class StepDataset:
    """The steps of a plan from `first_step` on.

    Args:
        micro_batch_size: rows in memory at once, or packs.
        pack_tokens: tokens of a pack; None keeps every example in a row of its own.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        plan: Sequence[Sequence[int]],
        first_step: int,
        micro_batch_size: int,
        pad_id: int,
        pack_tokens: int | None = None,
    ) -> None:
        self._examples = examples
        self._steps = plan[first_step:]
        self._micro_batch_size = micro_batch_size
        self._pad_id = pad_id
        self._pack_tokens = pack_tokens

    def __len__(self) -> int:
        return len(self._steps)

    def groups(self) -> Iterator[list[StepBatch]]:
        """Yield all steps in order, some at a time."""
        first = 0
        while first < len(self._steps):
            tokens = int(lengths_of(self._examples, self._steps[first]).sum())
            last = first + max(1, min(GROUP_STEPS, GROUP_TOKENS // tokens))
            yield self._made(self._steps[first:last])
            first = last

    def __getitem__(self, index: int) -> StepBatch:
        (batch,) = self._made([self._steps[index]])
        return batch

    def _made(self, steps: Sequence[Sequence[int]]) -> list[StepBatch]:
        """Make several steps at once."""
        split = [self._micro_batches(step) for step in steps]
        every = [micro_batch for micro_batches in split for micro_batch in micro_batches]
        rows = rows_of(self._examples, [number for batch in every for examples in batch for number in examples])
        shares = [[len(examples) for examples in micro_batch] for micro_batch in every]
        buckets = np.searchsorted(LONGEST_OF_BUCKET, rows.lengths)
        task = self._examples[0].task
        laid_out = iter(lay_out(rows, buckets, shares, self._pad_id, task=task, packed=self._pack_tokens is not None))
        targets = np.maximum(0, rows.lengths - (rows.loss_starts if task == CAUSAL else rows.target_starts))
        batches: list[StepBatch] = []
        start = 0
        for step, micro_batches in zip(steps, split, strict=True):
            end = start + len(step)
            own = list(islice(laid_out, len(micro_batches)))
            counts = np.bincount(buckets[start:end], targets[start:end], BUCKETS).astype(np.int64).tolist()
            batches.append(
                StepBatch(
                    [as_tensors(micro_batch.inputs) for micro_batch in own],
                    [torch.from_numpy(micro_batch.kinds) for micro_batch in own],
                    tokens=int(rows.lengths[start:end].sum()),
                    target_tokens=sum(counts),
                    bucket_target_tokens=counts,
                )
            )
            start = end
        return batches

    def _micro_batches(self, step: Sequence[int]) -> list[list[list[int]]]:
        """Return the examples of each row of each micro-batch, the longest rows first."""
        lengths, size = lengths_of(self._examples, step).tolist(), self._micro_batch_size
        if self._pack_tokens is None:
            split = split_micro_batches(range(len(step)), lengths, size)
            return [[[step[place]] for place in places] for places in split]
        rows = [[step[place] for place in places] for places in pack(lengths, self._pack_tokens)]
        return [rows[start : start + size] for start in range(0, len(rows), size)]


def bucket_name(bucket: int) -> str:
    """Name a length bucket: len_le_128 holds the rows of 65 to 128 tokens."""
    longest = len(LONGEST_OF_BUCKET)
    return f"len_le_{LONGEST_OF_BUCKET[bucket]}" if bucket < longest else f"len_gt_{LONGEST_OF_BUCKET[-1]}"


class StepsAhead:
    """The steps in order, made by a thread while the ones before them are trained on."""

    def __init__(self, steps: StepDataset, worker: Executor, pinned: bool) -> None:
        self._steps = steps
        self._worker = worker
        self._pinned = pinned

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[StepBatch]:
        groups = self._steps.groups()
        waiting = deque(self._worker.submit(self._next, groups) for _ in range(GROUPS_AHEAD))
        while group := waiting.popleft().result():
            waiting.append(self._worker.submit(self._next, groups))
            yield from group

    def _next(self, groups: Iterator[list[StepBatch]]) -> list[StepBatch]:
        """Make a group; an empty one at the end."""
        group = next(groups, [])
        return [in_pinned_memory(batch) for batch in group] if self._pinned else group


@contextmanager
def step_loader(steps: StepDataset, device: torch.device) -> Iterator[StepsAhead]:
    """Serve the steps in order, so that none waits for its batch; collating is too little work for processes.

    Steps that are made and not taken are thrown away at the end: checkpoints count those that were trained on. Where
    making a group of them fails, taking its first does.

    Args:
        device: where the batches will go; on the way to a GPU they lie in pinned memory, which copies do not wait for.
    """
    on_gpu = device.type == "cuda"
    # pinning is the device's of the thread that does it
    worker = ThreadPoolExecutor(1, THREAD, initializer=partial(torch.cuda.set_device, device) if on_gpu else None)
    try:
        yield StepsAhead(steps, worker, pinned=on_gpu)
    finally:
        worker.shutdown(cancel_futures=True)


def in_pinned_memory(batch: StepBatch) -> StepBatch:
    """Copy the tensors of a step to where a GPU can read them by itself."""
    return batch._replace(
        micro_batches=[{name: tensor.pin_memory() for name, tensor in each.items()} for each in batch.micro_batches],
        buckets=[tensor.pin_memory() for tensor in batch.buckets],
    )
