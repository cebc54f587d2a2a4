"""On a GPU: panels decoded on a second stream, and the ops on any stream of torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_lab.ops.blockwise.op import dequantize_weight, quantize_absmax, quantize_blockwise, quantized_linear
from qlora_lab.ops.blockwise.weight import PackedWeight
from qlora_lab.ops.lora.op import lora_linear
from qlora_lab.ops.native.cuda_plan import plan_grad_input, plan_product
from qlora_lab.ops.registry import CUDA_KERNELS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA_KERNELS.library is None, reason=f"no GPU kernels: {CUDA_KERNELS.reason}"),
]
ROWS, OUT, IN = 2048, 22016, 4096  # more panels than one on every GPU


def random_weight(out_features: int, in_features: int) -> PackedWeight:
    dense = torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16) * 0.02
    packed, absmax = quantize_blockwise(dense, "nf4", 64)
    return PackedWeight(packed, *quantize_absmax(absmax, 256), "nf4", 64, 256, out_features, in_features)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def test_products_in_panels_do_not_race() -> None:
    assert CUDA_KERNELS.library is not None
    device = CUDA_KERNELS.library.device(0)
    assert len(plan_product(ROWS, OUT, IN, 2, 4, device).panels) > 1
    assert len(plan_grad_input(ROWS, OUT, IN, 2, device).panels) > 1
    weight = random_weight(OUT, IN)
    x = torch.randn(ROWS, IN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(ROWS, OUT, device="cuda", dtype=torch.bfloat16)
    dense = dequantize_weight(weight, torch.bfloat16)
    expected, expected_grad = F.linear(x.detach(), dense), gradient @ dense
    for _ in range(5):
        out = quantized_linear(x, weight)
        (grad_x,) = torch.autograd.grad(out, x, gradient)
        # both sum in float32 and round once; the order of the sums may differ
        assert relative_error(out, expected) < 4e-3
        assert relative_error(grad_x, expected_grad) < 4e-3


@pytest.mark.parametrize("rows", [1, 8, 64, 300])
def test_the_ops_follow_torchs_current_stream(rows: int) -> None:
    weight = random_weight(512, 1024)
    A, B = torch.randn(8, 1024, device="cuda"), torch.randn(512, 8, device="cuda")
    x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
    expected = lora_linear(x, weight, None, A, B, scaling=0.5)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whoever did not wait would read zeros
        late = torch.zeros_like(x).copy_(x)
        out = lora_linear(late, weight, None, A, B, scaling=0.5)
    stream.synchronize()
    # dense products may be split in another way where another stream has another workspace
    assert relative_error(out, expected) < 4e-3
