"""Norms by native kernels: as transformers' own, with their input kept once."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qlora_lab.models import norms
from qlora_lab.models.norms import RMS_NORMS, use_fast_norms
from qlora_lab.ops.native.load import Kernels
from qlora_lab.ops.registry import KERNELS
from tests.tiny_models import LLAMA

pytestmark = pytest.mark.skipif(KERNELS.library is None, reason=f"no native kernels: {KERNELS.reason}")
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 0.02}
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def a_norm(dtype: torch.dtype) -> LlamaRMSNorm:
    norm = LlamaRMSNorm(40).to(dtype)
    norm.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    return norm.requires_grad_(False)


def model_of(norm: LlamaRMSNorm) -> Any:
    """Return a model around a norm, which runs the kernels from now on."""
    model = torch.nn.ModuleList([norm])
    use_fast_norms(model)  # type: ignore[arg-type]
    return model[0]


def result(norm: LlamaRMSNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output and the gradient of its input."""
    leaf = x.detach().requires_grad_()
    out = norm(leaf)
    (gradient,) = torch.autograd.grad(out, leaf, torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
    return out.detach(), gradient


@dtypes
def test_it_gives_what_transformers_gives(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = result(a_norm(dtype), x)
    norm = model_of(a_norm(dtype))
    tolerance = TOLERANCES[dtype]
    for given in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        for found, right in zip(result(norm, given), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=tolerance, atol=tolerance)


def test_the_gradient_in_bfloat16_is_closer_to_that_in_float32() -> None:
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    _, exact = result(a_norm(torch.bfloat16).float(), x.float())
    ours, theirs = (result(norm, x)[1] for norm in (model_of(a_norm(torch.bfloat16)), a_norm(torch.bfloat16)))
    assert (ours - exact).norm() < (theirs - exact).norm()


def test_its_input_is_all_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, kept = model_of(a_norm(torch.bfloat16)), []
    x = torch.randn(5, 40).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm(x)
    assert sorted(tensor.nbytes for tensor in kept) == sorted([x.nbytes, norm.weight.nbytes, 5 * 4])


@pytest.mark.parametrize("reason", ["trained", "other dtype", "no kernels"])
def test_otherwise_it_is_transformers_own(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    norm, x = model_of(a_norm(torch.bfloat16)), torch.randn(5, 40).bfloat16()
    if reason == "trained":
        norm.weight.requires_grad_(True)
    elif reason == "other dtype":
        x = x.float()
    else:
        monkeypatch.setattr(norms, "KERNELS", Kernels(None, "none", "a test"))
    monkeypatch.setattr(norms, "_RmsNorm", None)
    assert torch.equal(result(norm, x)[0], a_norm(torch.bfloat16)(x))


def test_whether_its_weight_is_frozen_makes_no_difference_without_gradients() -> None:
    norm, x = model_of(a_norm(torch.bfloat16)), torch.randn(5, 40).bfloat16()
    with torch.no_grad():
        frozen = norm(x)
        assert torch.equal(norm.requires_grad_(True)(x), frozen)


def test_a_model_keeps_its_names_and_its_kinds() -> None:
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    before = {name: type(module) for name, module in model.named_modules()}
    names = list(model.state_dict())
    use_fast_norms(model)
    assert list(model.state_dict()) == names
    changed = {kind for name, kind in before.items() if type(model.get_submodule(name)) is not kind}
    assert changed == {LlamaRMSNorm}
    assert all(isinstance(module, before[name]) for name, module in model.named_modules())


def test_every_class_is_there_and_computes_this() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 16, generator=generator)
    for path in RMS_NORMS:
        module, _, name = path.rpartition(".")
        kind = getattr(__import__(module, fromlist=[name]), name)
        norm = kind(16).requires_grad_(False)
        norm.weight.copy_(torch.randn(16, generator=generator))
        expected = norm(x)
        torch.testing.assert_close(model_of(norm)(x), expected, rtol=1e-6, atol=1e-6)
