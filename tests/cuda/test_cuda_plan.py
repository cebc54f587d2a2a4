"""Which product runs on a GPU: pure functions of the shape and the device."""

import pytest

from qlora_lab.errors import KernelError
from qlora_lab.ops.native.cuda_library import check_driver, cuda_version
from qlora_lab.ops.native.cuda_plan import (
    LEAST_SPLIT,
    Device,
    LowRankPlan,
    plan_grad_input,
    plan_low_rank,
    plan_product,
    split_panels,
)

H200 = Device(multiprocessors=132, l2_bytes=50 * 2**20, capability=90)
RTX_3060 = Device(multiprocessors=28, l2_bytes=3 * 2**20, capability=86)


@pytest.mark.parametrize(
    ("rows", "dtype_bytes", "bits", "in_features", "kernel"),
    [
        (1, 2, 4, 4096, "few_rows"),
        (4, 4, 8, 4096, "few_rows"),
        (5, 2, 4, 4096, "tiles"),
        (64, 2, 4, 4096, "tiles"),
        (65, 2, 4, 4096, "panels"),
        (16, 4, 4, 4096, "few_rows"),  # no tensor cores in float32
        (17, 4, 4, 4096, "panels"),
        (16, 2, 8, 4096, "few_rows"),
        (16, 2, 4, 100, "few_rows"),  # lanes take 32 weights of a row
        (32, 2, 4, 100, "panels"),
    ],
)
def test_the_kernel_follows_from_the_rows(
    rows: int, dtype_bytes: int, bits: int, in_features: int, kernel: str
) -> None:
    assert plan_product(rows, 4096, in_features, dtype_bytes, bits, H200).kernel == kernel


@pytest.mark.parametrize("device", [H200, RTX_3060], ids=["H200", "RTX 3060"])
@pytest.mark.parametrize("rows", [65, 512, 4096])
@pytest.mark.parametrize(
    ("out_features", "in_features"), [(4096, 4096), (11008, 4096), (22016, 8192), (100, 7), (1, 1)]
)
def test_panels_cover_the_weight_once(device: Device, rows: int, out_features: int, in_features: int) -> None:
    plans = (
        (plan_product(rows, out_features, in_features, 2, 4, device), out_features),
        (plan_grad_input(rows, out_features, in_features, 2, device), in_features),
    )
    for plan, count in plans:
        covered = [number for first, size in plan.panels for number in range(first, first + size)]
        assert covered == list(range(count))
        assert all(size % 128 == 0 for _, size in plan.panels[:-1])


def test_two_panels_stay_in_the_cache_unless_multiprocessors_would_idle() -> None:
    panels = split_panels(rows=4096, count=22016, bytes_each=2 * 8192, device=H200)
    assert len(panels) > 1
    assert 2 * panels[0][1] * 2 * 8192 <= 0.5 * H200.l2_bytes
    # 128 rows are one tile high: it takes 132 tiles side by side to occupy the GPU, and there are 172
    assert split_panels(rows=128, count=22016, bytes_each=2 * 8192, device=H200) == ((0, 22016),)
    assert split_panels(rows=4096, count=1024, bytes_each=2 * 4096, device=H200) == ((0, 1024),)


@pytest.mark.parametrize(
    ("rank", "dtype_bytes", "dropout", "kernel"),
    [
        (16, 2, 0.1, "fused"),
        (256, 2, 0.1, "fused"),
        (257, 2, 0.1, "torch"),  # the dropout would be worked out five times
        (16, 4, 0.1, "torch"),  # no tensor cores in float32
        (16, 2, 0.0, "torch"),  # nothing to drop: torch reads x once as it is
    ],
)
def test_dropout_goes_into_the_low_rank_products(rank: int, dtype_bytes: int, dropout: float, kernel: str) -> None:
    assert plan_low_rank(4096, 4096, rank, dtype_bytes, dropout, H200).kernel == kernel


def test_low_rank_products_are_split_until_the_gpu_is_occupied() -> None:
    # 128 blocks of 32 rows, and 64 of 64 columns, for 264 places
    assert plan_low_rank(4096, 4096, 16, 2, 0.1, H200) == LowRankPlan("fused", down_splits=3, grad_splits=5)
    assert plan_low_rank(4096, 4096, 64, 2, 0.1, H200).grad_splits == 3  # 128 of 32 columns
    assert plan_low_rank(4096, 4096, 16, 2, 0.1, RTX_3060) == LowRankPlan("fused", down_splits=1, grad_splits=1)
    assert plan_low_rank(65, 4096, 16, 2, 0.1, H200) == LowRankPlan("fused", 4096 // LEAST_SPLIT, 1)
    for rows, in_features in ((0, 64), (65, 0), (1, 1), (100_000, 11008)):
        plan = plan_low_rank(rows, in_features, 16, 2, 0.1, H200)
        assert 1 <= plan.down_splits <= max(in_features // LEAST_SPLIT, 1)
        assert 1 <= plan.grad_splits <= max(rows // LEAST_SPLIT, 1)


def test_a_driver_of_an_older_major_version_is_refused() -> None:
    check_driver(driver=13000, runtime=13010)
    check_driver(driver=13020, runtime=12080)
    with pytest.raises(KernelError, match=r"driver knows CUDA 12\.8 and the kernels were built with 13\.0; update"):
        check_driver(driver=12080, runtime=13000)
    with pytest.raises(KernelError, match="no NVIDIA driver"):
        check_driver(driver=0, runtime=13000)
    assert cuda_version(12080) == "12.8"
