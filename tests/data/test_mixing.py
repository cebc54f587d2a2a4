import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lab.data.mixing import rows_of_parts
from qlora_lab.errors import DataError

weights_of_parts = st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 100), min_size=1)


@given(weights=weights_of_parts, total=st.integers(1, 5000))
@settings(max_examples=150, deadline=None)
def test_parts_add_up_and_are_off_their_share_by_less_than_a_row(weights: dict[str, float], total: int) -> None:
    counts = rows_of_parts(weights, dict.fromkeys(weights, 10_000), total, "mix")
    assert sum(counts.values()) == total
    for name, weight in weights.items():
        assert abs(counts[name] - total * weight / sum(weights.values())) < 1


def test_without_a_total_the_first_part_to_run_out_sets_it() -> None:
    available = {"source": 100, "more": 30}
    assert rows_of_parts({"source": 1.0, "more": 0.5}, available, None, "mix") == {"source": 60, "more": 30}
    assert rows_of_parts({"source": 1.0}, {"source": 77}, None, "alone") == {"source": 77}


def test_a_part_that_is_too_small_is_refused_with_what_would_do() -> None:
    with pytest.raises(DataError, match=r"asks for 90 rows, 45 of them of part 'more', but 30 .*try data\.rows=60"):
        rows_of_parts({"source": 1.0, "more": 1.0}, {"source": 100, "more": 30}, 90, "mix")
