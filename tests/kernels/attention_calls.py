"""Random inputs of attention, the C library called on them with NaN-filled, guarded outputs, and the exact results."""

import ctypes
from ctypes import byref, c_void_p
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_lab.ops.native.library import AttentionView
from tests.kernels.linear_calls import BFLOAT16_UNIT, DTYPE_NUMBER, OK, UNIT, Output, pointer

EXTRA_ROUNDINGS = 24  # of the exponential, the scaling, and the sums of blocks


@dataclass(frozen=True)
class Problem:
    """Query, key and value (rows, heads, tokens, head size); a gradient of the output (rows, tokens, heads, size)."""

    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor
    scale: float
    causal: bool = True
    mask: Tensor | None = None  # (rows or 1, tokens, tokens) bool

    @property
    def view(self) -> AttentionView:
        view = AttentionView(*(pointer(part) for part in self.inputs))
        for name, part in zip(("query", "key", "value"), self.inputs, strict=True):
            assert part.stride(3) == 1
            getattr(view, f"{name}_strides")[:] = part.stride()[:3]
        view.rows, view.heads, view.tokens, view.head_size = self.query.shape
        view.key_heads, view.scale, view.causal = self.key.shape[1], self.scale, self.causal
        view.dtype = DTYPE_NUMBER[self.query.dtype]
        if self.mask is not None:
            view.mask = pointer(self.mask)
            view.mask_strides[:] = (0 if len(self.mask) == 1 else self.mask.stride(0), self.mask.stride(1))
        return view

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    @property
    def seen(self) -> Tensor:
        """Return which keys each query sees, (rows, 1, tokens, tokens)."""
        rows, _, tokens, _ = self.query.shape
        seen = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool)
        if self.causal:
            seen = seen.tril()
        return seen if self.mask is None else seen & self.mask[:, None]


def problem(
    rows: int = 2,
    heads: int = 4,
    key_heads: int = 2,
    tokens: int = 37,
    size: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    causal: bool = True,
    seed: int = 0,
) -> Problem:
    """Return random inputs as a model lays them out: the heads of a token beside each other."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(rows, tokens, of, size, generator=generator).to(dtype).transpose(1, 2)
        for of in (heads, key_heads, key_heads)
    ]
    gradient = torch.randn(rows, tokens, heads, size, generator=generator).to(dtype)
    return Problem(*parts, gradient, scale=size**-0.5, causal=causal)


@dataclass(frozen=True)
class Results:
    """What attention gives: out as the gradient of a problem, logsumexp (rows, heads, tokens), and the gradients."""

    out: Tensor
    logsumexp: Tensor
    grad_query: Tensor
    grad_key: Tensor
    grad_value: Tensor

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.out, self.logsumexp, self.grad_query, self.grad_key, self.grad_value


def attention(library: ctypes.CDLL, of: Problem, threads: int = 1) -> Results:
    """Run both directions; the second on what the first gave."""
    dtype, view = of.query.dtype, of.view
    rows, heads, tokens, size = of.query.shape

    def output(shape: tuple[int, ...], of_dtype: torch.dtype = dtype) -> Output:
        return Output((shape[0] * shape[1] * shape[2], shape[3]), of_dtype)

    out, logsumexp = output((rows, tokens, heads, size)), output((rows, heads, tokens, 1), torch.float32)
    pointers = [c_void_p(pointer(each.matrix)) for each in (out, logsumexp)]
    assert library.qlk_cpu_attention(byref(view), *pointers, threads) == OK
    gradients = [output((rows, tokens, part.shape[1], size)) for part in of.inputs]
    pointers += [c_void_p(pointer(of.gradient))] + [c_void_p(pointer(each.matrix)) for each in gradients]
    assert library.qlk_cpu_attention_backward(byref(view), *pointers, threads) == OK
    found = [each.checked().view(rows, tokens, -1, size).transpose(1, 2) for each in gradients]
    return Results(out.checked().view(rows, tokens, heads, size), logsumexp.checked().view(rows, heads, tokens), *found)


def check(of: Problem, found: Results) -> None:
    """Compare with attention in float64, within a bound of what rounding to float32 and to bfloat16 can do.

    A score that is off by d makes a weight of the softmax off by the factor e^d, and the sum of the weights too, so
    that a weight is off by 2 d of itself at most. The gradient of a score is p (g - s), where p is a weight, g a sum of
    products and s = sum(out * gradient), of the out that was rounded.
    """
    query, gradient = of.query.double(), of.gradient.double().transpose(1, 2)
    key, value = (part.double().repeat_interleave(of.group, dim=1) for part in (of.key, of.value))
    tokens, size = query.shape[2:]
    short = of.query.dtype == torch.bfloat16
    scores = (query @ key.mT * of.scale).masked_fill(~of.seen, -torch.inf)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    of_score = query.norm(dim=-1).amax() * key.norm(dim=-1).amax() * of.scale
    off = UNIT * (2 * (size + 4) * of_score + tokens + EXTRA_ROUNDINGS)  # of a weight, relative
    assert off < 0.01, "the bound is of first order"

    def assert_within(name: str, exact: Tensor, bound: Tensor, actual: Tensor) -> None:
        bound = 1.02 * bound + (BFLOAT16_UNIT * (exact.abs() + bound) if short else 0.0) + 1e-30
        error = (actual.double() - exact).abs()
        assert (error <= bound).all(), f"{name}: {error.max():.3g}, beyond its bound by {(error - bound).max():.3g}"

    exact = weights @ value
    out_bound = (off + tokens * UNIT) * (weights @ value.abs())
    assert_within("out", exact, out_bound, found.out.transpose(1, 2))
    logsumexp = torch.logsumexp(scores, dim=-1)
    logsumexp = torch.where(logsumexp == -torch.inf, torch.inf, logsumexp)
    torch.testing.assert_close(found.logsumexp.double(), logsumexp, rtol=1e-6, atol=float(off) + 1e-6)

    shift = (gradient * exact).sum(-1, keepdim=True)
    out_off = out_bound + (BFLOAT16_UNIT * (exact.abs() + out_bound) if short else 0.0)
    shift_off = (gradient.abs() * (out_off + (size + 2) * UNIT * exact.abs())).sum(-1, keepdim=True)
    products, magnitudes = gradient @ value.mT, gradient.abs() @ value.abs().mT
    grad_scores = weights * (products - shift) * of.scale
    grad_off = weights * of.scale * (off * (magnitudes + shift.abs()) + (size + 2) * UNIT * magnitudes + shift_off)
    sums = tokens * of.group * UNIT

    def shared(tensor: Tensor) -> Tensor:
        return tensor.unflatten(1, (-1, of.group)).sum(2)

    assert_within(
        "gradient of query",
        grad_scores @ key,
        (grad_off + sums * grad_scores.abs()) @ key.abs(),
        found.grad_query,
    )
    key_bound = (grad_off + sums * grad_scores.abs()).mT @ query.abs()
    assert_within("gradient of key", shared(grad_scores.mT @ query), shared(key_bound), found.grad_key)
    value_bound = (off + sums) * (weights.mT @ gradient.abs())
    assert_within("gradient of value", shared(weights.mT @ gradient), shared(value_bound), found.grad_value)


def masked(of: Problem, mask: Tensor) -> Problem:
    return replace(of, mask=mask, causal=False)
