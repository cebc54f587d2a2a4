"""The batches of a training plan: one item is one optimizer step, as micro-batches that fit in memory."""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from qlora_lab.data.batching import collate, split_micro_batches
from qlora_lab.data.packing import collate_packed, pack
from qlora_lab.data.tokenization import Example
from qlora_lab.models.cross_entropy import IGNORE_INDEX
from qlora_lab.models.loss import count_target_tokens

LONGEST_OF_BUCKET = (32, 64, 128, 256, 512, 1024)  # tokens of a row; longer ones are a bucket more
BUCKETS = len(LONGEST_OF_BUCKET) + 1
AHEAD = 2  # steps that are made before they are asked for
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

    def __getitem__(self, index: int) -> StepBatch:
        examples = [self._examples[row] for row in self._steps[index]]
        micro_batches: list[dict[str, Tensor]] = []
        buckets: list[Tensor] = []
        for rows in self._micro_batches(examples):
            if self._pack_tokens is None:
                micro_batches.append(collate([example for row in rows for example in row], self._pad_id))
            else:
                micro_batches.append(collate_packed(rows, self._pad_id))
            buckets.append(label_buckets(rows, micro_batches[-1]["labels"]))
        return StepBatch(
            micro_batches,
            buckets,
            tokens=sum(example.length for example in examples),
            target_tokens=sum(count_target_tokens(micro_batch["labels"]) for micro_batch in micro_batches),
            bucket_target_tokens=count_by_bucket(micro_batches, buckets),
        )

    def _micro_batches(self, examples: Sequence[Example]) -> list[list[list[Example]]]:
        """Return the examples of each row of each micro-batch, the longest rows first."""
        lengths = [example.length for example in examples]
        if self._pack_tokens is None:
            split = split_micro_batches(range(len(examples)), lengths, self._micro_batch_size)
            return [[[examples[number]] for number in numbers] for numbers in split]
        rows = [[examples[number] for number in numbers] for numbers in pack(lengths, self._pack_tokens)]
        return [rows[start : start + self._micro_batch_size] for start in range(0, len(rows), self._micro_batch_size)]


def label_buckets(rows: Sequence[Sequence[Example]], labels: Tensor) -> Tensor:
    """Return the length bucket of the example that each label is of, in the labels' shape; padding is of any."""
    buckets = torch.zeros(labels.shape, dtype=torch.long)
    for number, examples in enumerate(rows):
        start = 0
        for example in examples:
            buckets[number, start:] = bisect_left(LONGEST_OF_BUCKET, example.length)
            start += example.length
    return buckets


def count_by_bucket(micro_batches: Sequence[dict[str, Tensor]], buckets: Sequence[Tensor]) -> list[int]:
    """Return the target tokens of each length bucket."""
    counts = torch.zeros(BUCKETS, dtype=torch.long)
    for micro_batch, own in zip(micro_batches, buckets, strict=True):
        scored = micro_batch["labels"][:, 1:] != IGNORE_INDEX
        counts += torch.bincount(own[:, 1:][scored], minlength=BUCKETS)
    return counts.tolist()


def bucket_name(bucket: int) -> str:
    """Name a length bucket: len_le_128 holds the rows of 65 to 128 tokens."""
    longest = len(LONGEST_OF_BUCKET)
    return f"len_le_{LONGEST_OF_BUCKET[bucket]}" if bucket < longest else f"len_gt_{LONGEST_OF_BUCKET[-1]}"


class StepsAhead:
    """The steps in order, each made by a thread while the ones before it are trained on."""

    def __init__(self, steps: StepDataset, worker: Executor, pinned: bool) -> None:
        self._steps = steps
        self._worker = worker
        self._pinned = pinned

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[StepBatch]:
        waiting: deque[Future[StepBatch]] = deque()
        for number in range(len(self)):
            waiting.append(self._worker.submit(self._made, number))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _made(self, number: int) -> StepBatch:
        return in_pinned_memory(self._steps[number]) if self._pinned else self._steps[number]


@contextmanager
def step_loader(steps: StepDataset, device: torch.device) -> Iterator[StepsAhead]:
    """Serve the steps in order, so that none waits for its batch; collating is too little work for processes.

    Steps that are made and not taken are thrown away at the end: checkpoints count those that were trained on. Where
    making one fails, taking it does.

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
