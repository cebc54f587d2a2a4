"""Native attention and its gradients are within a bound of those in float64, whatever the shape and the mask."""

import ctypes
from ctypes import byref, c_void_p
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.attention_calls import attention, check, masked, problem
from tests.kernels.linear_calls import BAD_DTYPE, BAD_SIZE, NULL_POINTER, OK, pointer
from tests.kernels.test_linear import DTYPES, dtypes, repeatable

# rows, heads, key heads, tokens, head size: one block of queries and several, tails of vectors and tiles, odd heads
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 4, 2, 37, 16),
    (1, 3, 1, 64, 64),
    (2, 6, 2, 65, 33),
    (1, 2, 2, 130, 80),
    (3, 2, 1, 16, 7),
    (1, 1, 1, 300, 128),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "everywhere"])
@dtypes
def test_results_are_within_the_bound(
    library: ctypes.CDLL, shape: tuple[int, ...], causal: bool, dtype: torch.dtype
) -> None:
    of = problem(*shape, dtype=dtype, causal=causal)
    check(of, attention(library, of))


@dtypes
def test_sequences_so_long_that_fewer_queries_are_taken_at_a_time(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    of = problem(1, 1, 1, 2600, 8, dtype=dtype)
    check(of, attention(library, of, threads=2))


@given(
    rows=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    tokens=st.integers(1, 140),
    size=st.integers(1, 90),
    causal=st.booleans(),
    seen=st.sampled_from([None, 0.1, 0.9]),
    shared=st.booleans(),
    threads=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
)
@repeatable
def test_any_shape_and_mask(
    library: ctypes.CDLL,
    rows: int,
    key_heads: int,
    group: int,
    tokens: int,
    size: int,
    causal: bool,
    seen: float | None,
    shared: bool,
    threads: int,
    dtype: torch.dtype,
) -> None:
    of = problem(rows, key_heads * group, key_heads, tokens, size, dtype=dtype, causal=causal)
    if seen is not None:
        generator = torch.Generator().manual_seed(tokens)
        mask = torch.rand(1 if shared else rows, tokens, tokens, generator=generator) < seen
        of = replace(of, mask=mask)
    check(of, attention(library, of, threads))


@dtypes
def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    of = problem(dtype=dtype)
    mask = torch.ones(1, 37, 37, dtype=torch.bool).tril()
    mask[:, 5] = False
    found = attention(library, masked(of, mask))
    assert not found.out[:, 5].any() and not found.grad_query[:, :, 5].any()
    assert (found.logsumexp[:, :, 5] == torch.inf).all()
    check(masked(of, mask), found)


@dtypes
def test_a_mask_of_earlier_keys_is_what_causal_means(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    of = problem(tokens=70, dtype=dtype)
    mask = torch.ones(1, 70, 70, dtype=torch.bool).tril()
    pairs = zip(attention(library, of).parts, attention(library, masked(of, mask)).parts, strict=True)
    assert all(torch.allclose(causal.float(), by_mask.float(), rtol=0.02, atol=1e-5) for causal, by_mask in pairs)


@dtypes
def test_threads_do_not_change_results(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    of = problem(2, 6, 2, 140, 24, dtype=dtype)
    alone = attention(library, of).parts
    for threads in (2, 3):
        assert all(map(torch.equal, alone, attention(library, of, threads).parts))


@dtypes
def test_inputs_may_lie_anywhere(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    of = problem(tokens=20, dtype=dtype)
    spread = [torch.cat((part, part), dim=3)[..., : part.shape[3]] for part in of.inputs]
    by_heads = [part.contiguous() for part in of.inputs]
    for inputs in (spread, by_heads):
        moved = replace(of, **dict(zip(("query", "key", "value"), inputs, strict=True)))
        assert all(map(torch.equal, attention(library, of).parts, attention(library, moved).parts))


@dtypes
def test_scores_of_any_size_are_normalized(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    of = problem(dtype=dtype)
    # far apart: the largest score of a query takes it all, and the others vanish
    sharp = attention(library, replace(of, scale=1e4))
    best = (of.query @ of.key.repeat_interleave(2, 1).mT).float().masked_fill(~of.seen, -torch.inf).argmax(-1)
    value = of.value.repeat_interleave(2, 1)
    taken = value.gather(2, best[..., None].expand_as(value)).transpose(1, 2)
    near = torch.isclose(sharp.out.float(), taken.float(), rtol=0.01, atol=1e-3).all(-1)
    assert near.float().mean() > 0.9 and sharp.out.isfinite().all()
    # and equal: the mean of what is seen
    flat = attention(library, replace(of, scale=0.0))
    means = value.float().cumsum(2) / torch.arange(1, 38)[:, None]
    torch.testing.assert_close(flat.out.float(), means.transpose(1, 2), rtol=0.01, atol=0.01)


@dtypes
def test_what_is_not_finite_is_not_hidden(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    of = problem(1, 2, 2, 9, 8, dtype=dtype)
    of.query[0, 0, 4, 3] = float("nan")
    found = attention(library, of)
    assert found.out[0, 4, 0].isnan().all() and found.grad_query[0, 0, 4].isnan().all()
    assert found.out[0, :, 1].isfinite().all() and found.grad_key[0, 1].isfinite().all()
    others = torch.arange(9) != 4
    assert found.out[0, others, 0].isfinite().all() and found.grad_query[0, 0, others].isfinite().all()
    assert found.grad_key[0, 0].isnan().any() and found.grad_value[0, 0].isnan().any()


def test_attention_of_nothing(library: ctypes.CDLL) -> None:
    for shape in ((0, 2, 1, 5, 4), (2, 2, 1, 0, 4)):
        of = problem(*shape)
        assert library.qlk_cpu_attention(byref(of.view), None, None, 1) == OK
        assert library.qlk_cpu_attention_backward(byref(of.view), *[None] * 6, 1) == OK


def test_bad_arguments_are_refused(library: ctypes.CDLL) -> None:
    of = problem(1, 4, 2, 3, 8)
    outputs = [torch.full((1, 3, 4, 8), 5.0) for _ in range(6)]

    def statuses(missing: int | None = None, **changes: Any) -> list[int]:
        view = of.view
        for name, value in changes.items():
            setattr(view, name, value)
        pointers = [c_void_p(None if index == missing else pointer(out)) for index, out in enumerate(outputs)]
        forward = library.qlk_cpu_attention(byref(view), *pointers[:2], 1)
        return [forward, library.qlk_cpu_attention_backward(byref(view), *pointers, 1)]

    for name in ("query", "key", "value"):
        assert statuses(**{name: None}) == [NULL_POINTER] * 2
    for dtype in (2, 3, -1):
        assert statuses(dtype=dtype) == [BAD_DTYPE] * 2
    for name in ("rows", "heads", "key_heads", "tokens", "head_size"):
        for size in (-1, -(2**63), 2**62):
            assert statuses(**{name: size}) == [BAD_SIZE] * 2
    for name, size in (("heads", 0), ("key_heads", 0), ("head_size", 0), ("key_heads", 3)):
        assert statuses(**{name: size}) == [BAD_SIZE] * 2
    assert all(out.unique().tolist() == [5.0] for out in outputs)
    assert [statuses(missing)[missing > 1] for missing in range(6)] == [NULL_POINTER] * 6
    assert library.qlk_cpu_attention(None, None, None, 1) == NULL_POINTER
