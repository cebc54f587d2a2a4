"""The class that a classifier chooses for each text."""

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from qlora_lab.data.batching import pad_right
from qlora_lab.evaluation.batches import budget_batches
from qlora_lab.models.loss import class_logits
from qlora_lab.models.tasks import class_names


@torch.inference_mode()
def classify(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    *,
    pad_id: int,
    batch_tokens: int,
    device: torch.device,
    advance: Callable[[int], object] = lambda texts: None,
) -> list[str]:
    """Return the name of the likeliest class of each text, in the order of `texts`.

    Args:
        texts: token ids; none is empty.
        pad_id: the token that fills up short texts.
        batch_tokens: most tokens in a batch, padding included.
        advance: told, batch by batch, how many more texts have their class.
    """
    names = class_names(model.config)
    chosen = [""] * len(texts)
    for batch in budget_batches([len(text) for text in texts], batch_tokens):
        tensors = pad_right([texts[row] for row in batch], pad_id)
        logits = class_logits(model, {name: tensor.to(device) for name, tensor in tensors.items()})
        for row, number in zip(batch, logits.argmax(1).tolist(), strict=True):
            chosen[row] = names[number]
        advance(len(batch))
    return chosen
