import math
import random
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from qlora_lab.errors import ModelError
from qlora_lab.evaluation.benchmarks.likelihood import Pair, log_likelihoods, next_token_logits
from tests.evaluation.benchmarks.conftest import random_llama

CHOICES = (3, 17, 40, 41)
# float32: sums of other lengths are rounded in another order
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NARROW = TINY | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": NARROW,
    "gemma2": NARROW | {"sliding_window": 12, "final_logit_softcapping": 3.0},
    "gemma3_text": NARROW | {"sliding_window": 12, "num_hidden_layers": 6},
    "mistral": NARROW | {"sliding_window": 12},
    "qwen3": NARROW,
    "gpt_neox": TINY | {"intermediate_size": 48},
    "opt": {key: TINY[key] for key in TINY if "size" in key or "num" in key}
    | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2},
}


def random_ids(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(3, 64) for _ in range(length)]


def logits_of(model: PreTrainedModel, prompts: list[list[int]], prefix: list[int], batch_tokens: int) -> torch.Tensor:
    return next_token_logits(
        model,
        prompts,
        CHOICES,
        prefix_ids=prefix,
        pad_id=0,
        batch_tokens=batch_tokens,
        device=torch.device("cpu"),
        advance=lambda rows: None,
    )


@torch.inference_mode()
def plainly(model: PreTrainedModel, prompts: list[list[int]], prefix: list[int]) -> torch.Tensor:
    """Run each whole prompt alone, without a cache, through the model's own head."""
    rows = [model(input_ids=torch.tensor([prefix + prompt]), use_cache=False).logits[0, -1] for prompt in prompts]
    return torch.stack(rows)[:, list(CHOICES)].float()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_shared_prefix_changes_nothing(model_type: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, **ARCHITECTURES[model_type])
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # much attention, so that a wrong mask or position is seen
        parameter.data.normal_(std=0.3)
    rng = random.Random(0)
    prefix, prompts = random_ids(rng, 23), [random_ids(rng, length) for length in (1, 9, 4, 9, 17)]
    expected = plainly(model, prompts, prefix)
    for batch_tokens in (1, 40, 1000):
        torch.testing.assert_close(logits_of(model, prompts, prefix, batch_tokens), expected, **TOLERANCE)
    torch.testing.assert_close(
        logits_of(model, [prefix + prompt for prompt in prompts], [], 100), expected, **TOLERANCE
    )


def test_batches_change_neither_logits_nor_the_choice() -> None:
    model, rng = random_llama(64), random.Random(1)
    prefix, prompts = random_ids(rng, 31), [random_ids(rng, rng.randint(1, 30)) for _ in range(40)]
    expected = plainly(model, prompts, prefix)
    for batch_tokens in (1, 33, 64, 200, 10_000):
        found = logits_of(model, prompts, prefix, batch_tokens)
        assert found.argmax(1).tolist() == expected.argmax(1).tolist()
        torch.testing.assert_close(found, expected, **TOLERANCE)


def test_scores_that_are_no_numbers_are_refused() -> None:
    model = random_llama(64)
    model.model.norm.weight.data[3] = math.nan
    with pytest.raises(ModelError, match="8 of 8 scores are not finite, so the model prefers nothing"):
        logits_of(model, [[5, 6], [7]], [], 100)


def test_log_likelihoods_are_those_of_the_continuation_alone() -> None:
    model, rng = random_llama(64), random.Random(2)
    pairs = [Pair(random_ids(rng, rng.randint(1, 12)), random_ids(rng, rng.randint(1, 6))) for _ in range(12)]
    expected = []
    for pair in pairs:
        ids = torch.tensor([[*pair.context_ids, *pair.continuation_ids]])
        with torch.inference_mode():
            scores = model(input_ids=ids).logits[0].log_softmax(-1)
        places = range(len(pair.context_ids) - 1, pair.tokens - 1)
        expected.append(sum(scores[place, ids[0, place + 1]].item() for place in places))
    for batch_tokens in (1, 50, 1000):
        done: list[int] = []
        found = log_likelihoods(
            model,
            pairs,
            pad_id=0,
            batch_tokens=batch_tokens,
            chunk_tokens=7,
            device=torch.device("cpu"),
            advance=done.append,
        )
        assert found == pytest.approx(expected, rel=1e-5)
        assert sum(done) == len(pairs)
