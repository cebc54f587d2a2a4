"""Which product runs on a GPU: pure functions of the shape and the device."""

import pytest

from qlora_lab.errors import KernelError
from qlora_lab.ops.native.cuda_library import check_driver, cuda_version
from qlora_lab.ops.native.cuda_plan import Device, plan_grad_input, plan_product, split_panels

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


def test_a_driver_of_an_older_major_version_is_refused() -> None:
    check_driver(driver=13000, runtime=13010)
    check_driver(driver=13020, runtime=12080)
    with pytest.raises(KernelError, match=r"driver knows CUDA 12\.8 and the kernels were built with 13\.0; update"):
        check_driver(driver=12080, runtime=13000)
    with pytest.raises(KernelError, match="no NVIDIA driver"):
        check_driver(driver=0, runtime=13000)
    assert cuda_version(12080) == "12.8"
