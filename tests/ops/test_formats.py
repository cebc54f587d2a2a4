"""Every table is derived here from its definition, and compared with bitsandbytes' where there is one."""

import bitsandbytes.functional
import pytest
import torch

from qlora_lab.config.schema import QUANT_FORMATS
from qlora_lab.errors import ConfigError
from qlora_lab.ops.formats import FORMATS, Format, dynamic_map_levels, format_named

every_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())


def value_of(fmt: Format, code: int) -> float:
    return fmt.values_by_code()[code]


def test_the_configuration_offers_these_formats_and_none() -> None:
    assert ("none", *FORMATS) == QUANT_FORMATS


@every_format
def test_levels_ascend_from_minus_one_to_one_with_distinct_codes(fmt: Format) -> None:
    assert list(fmt.levels) == sorted(fmt.levels)
    assert (fmt.levels[0], fmt.levels[-1]) == (-1.0, 1.0)
    assert len(set(fmt.codes)) == len(fmt.codes) == len(fmt.levels)
    assert all(0 <= code < 2**fmt.bits for code in fmt.codes)


@every_format
def test_levels_are_float32_or_round_to_it_without_meeting(fmt: Format) -> None:
    distinct = torch.tensor(fmt.levels, dtype=torch.float32).unique().numel()
    assert distinct == len(set(fmt.levels))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_nf_k_holds_normal_quantiles(k: int) -> None:
    # 2^k levels cannot be symmetric around an exact zero: 2^(k-1) quantiles lie above it and one less below. Both
    # tails end at the probability that leaves half a bin outside, averaged over bins of 1/2^k and 1/(2^k - 1).
    tail = 1 - (1 / 2 ** (k + 1) + 1 / (2 * (2**k - 1))) / 2
    above = torch.special.ndtri(torch.linspace(tail, 0.5, 2 ** (k - 1) + 1, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(tail, 0.5, 2 ** (k - 1), dtype=torch.float64)[:-1])
    levels = torch.cat((below, torch.zeros(1, dtype=torch.float64), above)).sort().values
    expected = levels / levels.max()
    actual = torch.tensor(FORMATS[f"nf{k}"].levels, dtype=torch.float64)
    # The published NF4 starts from the tail rounded to 0.9677083 in float32: a few 1e-8. Ours are rounded once.
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-7 if k == 4 else 2**-25)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_nf_k_is_stored_in_a_nibble_in_the_order_of_its_levels(k: int) -> None:
    fmt = FORMATS[f"nf{k}"]
    assert fmt.bits == 4
    assert fmt.packed_bytes(64) == 32  # as much memory as NF4, for fewer levels
    assert fmt.codes == tuple(range(2**k))


def test_fp4_e2m1_is_sign_exponent_mantissa() -> None:
    for code in range(16):
        sign = -1.0 if code & 0b1000 else 1.0
        exponent, mantissa = (code >> 1) & 0b11, code & 1
        if exponent == 0:
            magnitude = mantissa / 16  # subnormal
        else:
            magnitude = (1 + mantissa / 2) * 2.0 ** (4 - exponent)
        assert value_of(FORMATS["fp4_e2m1"], code) == pytest.approx(sign * magnitude / 12, rel=1e-15, abs=0)


def test_fp4_e3m0_is_sign_and_exponent() -> None:
    for code in range(16):
        sign = -1.0 if code & 0b1000 else 1.0
        exponent = code & 0b111
        magnitude = 2.0 ** (exponent - 7) if exponent else 0.0
        assert value_of(FORMATS["fp4_e3m0"], code) == sign * magnitude


@pytest.mark.parametrize(("name", "bits"), [("int4", 4), ("int8", 8)])
def test_integers_are_twos_complement_over_the_largest(name: str, bits: int) -> None:
    largest = 2 ** (bits - 1) - 1
    fmt = FORMATS[name]
    assert len(fmt.levels) == 2 * largest + 1
    for code in fmt.codes:
        integer = code - 2**bits if code >= 2 ** (bits - 1) else code
        assert value_of(fmt, code) == integer / largest


@pytest.mark.parametrize(("name", "theirs"), [("nf4", "nf4"), ("fp4_e2m1", "fp4")])
def test_codes_mean_what_they_mean_to_bitsandbytes(name: str, theirs: str) -> None:
    expected = bitsandbytes.functional.get_4bit_type(theirs, device="cpu")
    assert torch.equal(torch.tensor(FORMATS[name].values_by_code()), expected)


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_equals_that_of_bitsandbytes(signed: bool) -> None:
    levels = torch.tensor(dynamic_map_levels(signed=signed), dtype=torch.float64)
    assert torch.equal(levels.float().double(), levels), "not float32 values"
    assert torch.equal(levels.float(), bitsandbytes.functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize(("name", "numel", "expected"), [("nf4", 64, 32), ("nf4", 65, 33), ("int8", 65, 65)])
def test_packed_bytes(name: str, numel: int, expected: int) -> None:
    assert FORMATS[name].packed_bytes(numel) == expected


def test_unknown_format_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="got 'nf5'; did you mean 'nf4'"):
        format_named("nf5")
