"""Learning rates worked out by hand."""

import itertools
import math

import pytest

from qlora_lab.errors import ConfigError
from qlora_lab.train.schedule import count_warmup_steps, scale


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1]),
        ("constant", 2, [1 / 3, 2 / 3, 1, 1, 1]),
        ("linear", 0, [1, 0.8, 0.6, 0.4, 0.2]),
        ("linear", 1, [1 / 2, 1, 3 / 4, 1 / 2, 1 / 4]),
        ("cosine", 1, [1 / 2, 1, (1 + math.sqrt(0.5)) / 2, 1 / 2, (1 - math.sqrt(0.5)) / 2]),
        ("linear", 5, [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6]),
    ],
)
def test_scale_follows_the_numbers_worked_out_by_hand(schedule: str, warmup_steps: int, expected: list[float]) -> None:
    actual = [scale(step, 5, warmup_steps, schedule) for step in range(5)]
    assert actual == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 3, 30])
def test_every_step_has_a_rate_and_only_the_warm_up_grows(schedule: str, warmup_steps: int) -> None:
    factors = [scale(step, 30, warmup_steps, schedule) for step in range(30)]
    assert all(0 < factor <= 1 for factor in factors)
    assert sum(later > earlier for earlier, later in itertools.pairwise(factors)) == min(warmup_steps, 29)


@pytest.mark.parametrize(
    ("total_steps", "share", "expected"), [(100, 0.03, 3), (100, 0.07, 7), (30, 0.03, 1), (10, 0.0, 0), (4, 1.0, 4)]
)
def test_warm_up_steps_are_rounded_up(total_steps: int, share: float, expected: int) -> None:
    assert count_warmup_steps(total_steps, share) == expected


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        scale(0, 10, 0, "cosin")
