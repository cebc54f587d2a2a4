"""Chunked cross-entropy against torch's own, and the loss of a batch against that of transformers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from qlora_lab.data.batching import collate
from qlora_lab.errors import ModelError, ShapeError
from qlora_lab.models.cross_entropy import chunked_cross_entropy
from qlora_lab.models.loss import check_output_head, count_target_tokens, row_losses, target_loss

ROWS, HIDDEN, VOCAB = 13, 8, 31


def random_problem(
    dtype: torch.dtype, *, with_bias: bool, ignored: int = 4
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=dtype)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=dtype)
    bias = torch.randn(VOCAB, generator=generator, dtype=dtype) if with_bias else None
    labels = torch.randint(VOCAB, (ROWS,), generator=generator)
    labels[torch.randperm(ROWS, generator=generator)[:ignored]] = -100
    return hidden, weight, bias, labels


def plain_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None
) -> Tensor:
    logits = functional.linear(hidden, weight, bias).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 5, 512])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_chunked_cross_entropy_equals_the_plain_one(chunk_tokens: int, softcap: float | None, with_bias: bool) -> None:
    problem = random_problem(torch.float32, with_bias=with_bias)
    labels = problem[3]
    ours = [tensor.clone().requires_grad_() for tensor in problem[:3] if tensor is not None]
    plain = [tensor.clone().requires_grad_() for tensor in problem[:3] if tensor is not None]
    bias = ours[2] if with_bias else None
    loss = chunked_cross_entropy(ours[0], ours[1], bias, labels, chunk_tokens, softcap)
    expected = plain_cross_entropy(plain[0], plain[1], plain[2] if with_bias else None, labels, softcap)
    torch.testing.assert_close(loss, expected)
    (0.5 * loss).backward()
    (0.5 * expected).backward()
    for actual, reference in zip(ours, plain, strict=True):
        torch.testing.assert_close(actual.grad, reference.grad)  # float32 sums in another order


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_chunked_cross_entropy_passes_gradcheck(softcap: float | None) -> None:
    hidden, weight, bias, labels = random_problem(torch.float64, with_bias=True)
    assert bias is not None
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda hidden, weight, bias: chunked_cross_entropy(hidden, weight, bias, labels, 4, softcap), inputs
    )


def test_bfloat16_states_give_the_plain_loss_and_gradient() -> None:
    hidden, weight, _, labels = random_problem(torch.bfloat16, with_bias=False)
    ours, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = chunked_cross_entropy(ours, weight, None, labels, 4)
    expected = plain_cross_entropy(plain, weight, None, labels, None)
    assert loss.dtype == torch.float32
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)  # logits with 8 bits, or more where that is faster
    torch.testing.assert_close(ours.grad, plain.grad, rtol=0.02, atol=0.02)  # 8 bits of mantissa


def test_a_frozen_head_gets_no_gradient_and_ignored_positions_none_either() -> None:
    hidden, weight, _, labels = random_problem(torch.float32, with_bias=False)
    hidden.requires_grad_()
    chunked_cross_entropy(hidden, weight, None, labels, 4).backward()
    assert weight.grad is None
    assert hidden.grad is not None
    moved = hidden.grad.abs().sum(1) > 0
    assert torch.equal(moved, labels != -100)


def test_no_target_gives_a_loss_of_zero() -> None:
    hidden, weight, _, labels = random_problem(torch.float32, with_bias=False, ignored=ROWS)
    hidden.requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, None, labels, 4)
    loss.backward()
    assert loss.item() == 0 and hidden.grad is not None and hidden.grad.abs().max() == 0


class Shapes(TorchDispatchMode):
    """Remembers the shape of every matrix that an operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.ndim == 2:
            self.seen.add(tuple(output.shape))
        return output


@pytest.mark.parametrize("with_gradient", [True, False])
def test_neither_all_logits_nor_a_gradient_of_a_frozen_head_ever_exist(with_gradient: bool) -> None:
    hidden, weight, _, labels = random_problem(torch.float32, with_bias=False)
    hidden.requires_grad_(with_gradient)
    with Shapes() as shapes, torch.set_grad_enabled(with_gradient):
        loss = chunked_cross_entropy(hidden, weight, None, labels, chunk_tokens=3)
        if with_gradient:
            loss.backward()
    transposed_weight = (HIDDEN, VOCAB)
    assert max(rows for rows, width in shapes.seen - {transposed_weight} if width == VOCAB) == 3
    assert (VOCAB, HIDDEN) not in shapes.seen


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    hidden, weight, _, labels = random_problem(torch.float32, with_bias=False)
    with pytest.raises(ShapeError, match="labels"):
        chunked_cross_entropy(hidden, weight, None, labels[1:], 4)


@pytest.mark.parametrize("tied", [False, True])
def test_target_loss_equals_that_of_transformers(make_model: Any, examples: Any, tied: bool) -> None:
    batch = collate(examples[:5], 0)
    ours, theirs = (make_model(trainable=None, tie_word_embeddings=tied) for _ in range(2))
    loss, tokens = target_loss(ours, batch, chunk_tokens=3)
    assert tokens == sum(example.target_tokens for example in examples[:5])
    (loss / tokens).backward()
    expected = theirs(**batch).loss
    expected.backward()
    torch.testing.assert_close(loss / tokens, expected)
    for (name, actual), reference in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(actual.grad, reference.grad, rtol=1e-4, atol=1e-6), name


def test_a_label_at_the_first_position_is_no_target(make_model: Any, examples: Any) -> None:
    batch = collate(examples[:2], 0)
    without = row_losses(make_model(), batch, 512)
    batch["labels"][:, 0] = 5
    with_first = row_losses(make_model(), batch, 512)
    assert count_target_tokens(batch["labels"]) == int(without[1].sum())
    assert torch.equal(with_first[0], without[0]) and torch.equal(with_first[1], without[1])


def test_row_losses_are_the_rows_parts_of_the_target_loss(make_model: Any, examples: Any) -> None:
    model = make_model()
    batch = collate(examples[:6], 0)
    sums, counts = row_losses(model, batch, chunk_tokens=4)
    total, tokens = target_loss(model, batch, chunk_tokens=4)
    torch.testing.assert_close(sums.sum().float(), total.detach())
    assert counts.tolist() == [example.target_tokens for example in examples[:6]] and tokens == int(counts.sum())
    alone, _ = row_losses(model, collate([examples[3]], 0), chunk_tokens=4)
    torch.testing.assert_close(sums[3], alone[0], rtol=1e-5, atol=1e-5)  # padding changes the kernels used


def small_numbers() -> dict[str, Any]:
    return {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.5,
    }


def test_the_logit_cap_of_gemma_2_is_obeyed(examples: Any) -> None:
    torch.manual_seed(0)
    own: dict[str, Any] = {"head_dim": 8, "final_logit_softcapping": 2.0, "attn_implementation": "eager"}
    model = Gemma2ForCausalLM(Gemma2Config(**small_numbers(), **own)).eval()
    batch = collate(examples[:3], 0)
    check_output_head(model, batch["input_ids"][:1])
    loss, tokens = target_loss(model, batch, chunk_tokens=4)
    torch.testing.assert_close(loss / tokens, model(**batch).loss)


def test_a_head_that_scales_its_logits_is_refused(make_model: Any, examples: Any) -> None:
    check_output_head(make_model(), collate(examples[:1], 0)["input_ids"])
    model = GraniteForCausalLM(GraniteConfig(**small_numbers(), logits_scaling=8.0)).eval()
    with pytest.raises(ModelError, match="GraniteForCausalLM does more than a linear layer"):
        check_output_head(model, collate(examples[:1], 0)["input_ids"])


def test_a_head_that_is_wrapped_is_refused(make_model: Any, examples: Any) -> None:
    model = make_model()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ModelError, match="plain linear layer; got Sequential"):
        target_loss(model, collate(examples[:1], 0), 4)
