from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_lab.evaluation.batches import budget_batches


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a loaded machine
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
def test_batches_hold_every_row_once_within_the_budget(lengths: list[int], batch_tokens: int) -> None:
    batches = budget_batches(lengths, batch_tokens)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= batch_tokens


def test_rows_of_like_length_share_a_batch_and_the_longest_come_first() -> None:
    assert budget_batches([2, 9, 3, 10, 1], batch_tokens=20) == [[3, 1], [2, 0, 4]]


def test_a_row_over_the_budget_is_alone() -> None:
    assert budget_batches([30, 2, 2], batch_tokens=10) == [[0], [1, 2]]


def test_a_batch_holds_no_more_padding_than_allowed() -> None:
    assert budget_batches([10, 9, 6, 5, 5], batch_tokens=100, most_padding=3) == [[0, 1], [2, 3, 4]]
