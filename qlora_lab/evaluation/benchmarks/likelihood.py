"""How likely a model finds continuations: of one token each after a prompt, or of any length after contexts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from qlora_lab.data.batching import pad_right
from qlora_lab.data.tokenization import Example
from qlora_lab.errors import ModelError
from qlora_lab.evaluation.batches import budget_batches
from qlora_lab.evaluation.benchmarks.shared_prefix import shared_prefix
from qlora_lab.evaluation.target_loss import score_examples
from qlora_lab.models.head_products import head_logits
from qlora_lab.models.loss import output_head
from qlora_lab.models.tasks import task_of

MOST_PADDING = 128  # tokens in a batch: about as many cost what one more batch costs
Advance = Callable[[int], object]  # told how many more items are done


@dataclass(frozen=True)
class Pair:
    """A continuation and what stands before it, in tokens; neither is empty."""

    context_ids: Sequence[int]
    continuation_ids: Sequence[int]

    @property
    def tokens(self) -> int:
        return len(self.context_ids) + len(self.continuation_ids)


@torch.inference_mode()
def next_token_logits(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    choice_ids: Sequence[int],
    *,
    prefix_ids: Sequence[int] = (),
    pad_id: int,
    batch_tokens: int,
    device: torch.device,
    advance: Advance,
) -> Tensor:
    """Return the logits of a few tokens after each prompt, in the order of `prompts`.

    Every prompt is run once, the output head at its last token alone and for these tokens alone. How prompts share
    batches changes the logits by rounding only.

    Args:
        model: a causal one.
        prompts: token ids after those of the prefix; none is empty.
        choice_ids: the tokens.
        prefix_ids: what stands before every prompt; run once.
        batch_tokens: most tokens in a batch, padding included, the prefix not.

    Returns:
        (prompts, choices) float32, on the CPU.

    Raises:
        ModelError: some are not finite.
    """
    head = output_head(model)
    chosen = torch.tensor(list(choice_ids), device=head.weight.device)
    weight, bias = head.weight[chosen], None if head.bias is None else head.bias[chosen]
    prefix = shared_prefix(model, prefix_ids, device) if prefix_ids else None
    found = torch.empty((len(prompts), len(choice_ids)))
    for batch in budget_batches([len(prompt) for prompt in prompts], batch_tokens, MOST_PADDING):
        inputs = pad_right([prompts[row] for row in batch], pad_id)
        mask = functional.pad(inputs["attention_mask"], (len(prefix_ids), 0), value=1)
        states = model.get_decoder()(
            input_ids=inputs["input_ids"].to(device),
            attention_mask=mask.to(device),
            past_key_values=prefix,
            use_cache=prefix is not None,
        ).last_hidden_state
        last = torch.tensor([len(prompts[row]) - 1 for row in batch], device=device)
        logits = head_logits(states[torch.arange(len(batch), device=device), last], weight, bias)
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        found[batch] = logits.float().cpu()
        advance(len(batch))
    check_finite(found.flatten().tolist())
    return found


def log_likelihoods(
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    *,
    pad_id: int,
    batch_tokens: int,
    chunk_tokens: int,
    device: torch.device,
    advance: Advance,
) -> list[float]:
    """Return how likely each continuation is after its context, in nats below 0, in the order of `pairs`.

    An encoder-decoder reads the context and writes the continuation.

    Args:
        batch_tokens: most tokens in a batch, padding included.
        chunk_tokens: rows of logits in memory at once.

    Raises:
        ModelError: some are not finite.
    """
    task = task_of(model)
    examples = [
        Example(
            [*pair.context_ids, *pair.continuation_ids],
            target_start=len(pair.context_ids),
            loss_start=len(pair.context_ids),
            key="",
            family=None,
            target_bytes=0,
            task=task,
        )
        for pair in pairs
    ]
    scores = score_examples(
        model,
        examples,
        pad_id=pad_id,
        batch_tokens=batch_tokens,
        chunk_tokens=chunk_tokens,
        device=device,
        advance=advance,
    )
    found = [-scored.loss_sum for scored in scores]
    check_finite(found)
    return found


def check_finite(scores: Sequence[float]) -> None:
    """Refuse scores among which there is nothing to choose.

    Raises:
        ModelError: some are infinite, or no numbers.
    """
    bad = sum(not math.isfinite(score) for score in scores)
    if bad:
        raise ModelError(
            f"{bad} of {len(scores)} scores are not finite, so the model prefers nothing; was its training stable? try "
            "trainer.compute_dtype=float32, or a lower optim.learning_rate"
        )
