"""The batches of a training plan: one item is one optimizer step, as micro-batches that fit in memory."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qlora_lab.data.batching import collate, split_micro_batches
from qlora_lab.data.tokenization import Example
from qlora_lab.models.loss import count_target_tokens


class StepBatch(NamedTuple):
    """The rows of one optimizer step.

    A micro-batch holds input_ids, attention_mask and labels, each (rows, tokens). The counts are made before
    the tensors go to the device, where reading them back would wait for it.
    """

    micro_batches: list[dict[str, Tensor]]
    tokens: int  # padding left out
    target_tokens: int


class StepDataset(Dataset[StepBatch]):
    """The steps of a plan from `first_step` on."""

    def __init__(
        self,
        examples: Sequence[Example],
        plan: Sequence[Sequence[int]],
        first_step: int,
        micro_batch_size: int,
        pad_id: int,
    ) -> None:
        self._examples = examples
        self._lengths = [example.length for example in examples]
        self._steps = plan[first_step:]
        self._micro_batch_size = micro_batch_size
        self._pad_id = pad_id

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: int) -> StepBatch:
        rows = list(self._steps[index])
        micro_batches = [
            collate([self._examples[row] for row in micro_batch], self._pad_id)
            for micro_batch in split_micro_batches(rows, self._lengths, self._micro_batch_size)
        ]
        return StepBatch(
            micro_batches,
            tokens=sum(self._lengths[row] for row in rows),
            target_tokens=sum(count_target_tokens(micro_batch["labels"]) for micro_batch in micro_batches),
        )


def step_loader(steps: StepDataset) -> DataLoader[StepBatch]:
    """Serve the steps in order; collating them is too little work for worker processes."""
    own_generator = torch.Generator()  # a loader draws a seed when it starts: not from the run's generator
    return DataLoader(steps, batch_size=None, shuffle=False, num_workers=0, generator=own_generator)
