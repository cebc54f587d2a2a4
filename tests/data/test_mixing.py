import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lab.data.mixing import rows_of_parts
from qlora_lab.errors import ConfigError, DataError
from qlora_lab.runs.identity import run_id
from tests.helpers import composed

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


FILE = ["model=tiny_random", "data=file", "data.source.path=rows.jsonl", "data.rows=20"]
PART = "+data.mix={more: {kind: file, path: %s, template: question_answer, weight: 0.5, content_sha256: abc}}"


def test_a_mix_is_an_axis_like_any_other() -> None:
    config = composed(*FILE, PART % "more.jsonl")
    assert config.data.mix["more"].weight == 0.5
    assert run_id(config) == run_id(composed(*FILE, PART % "moved.jsonl"))  # the content counts, not where it lies
    others = [["+data.mix.more.weight=2"], [], ["data.filter.duplicates=near"], ["data.packing=true"]]
    ids = [run_id(composed(*FILE, PART % "more.jsonl", *other)) for other in others]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+data.mix={source: {kind: file, path: a.jsonl, template: alpaca}}", "must not name a part 'source'"),
        ("+data.mix={a: {kind: file, path: a.jsonl, template: alpaca, weight: 0}}", r"data\.mix\.a\.weight must be a"),
        ("+data.mix={a: {kind: file, template: alpaca}}", r"data\.mix\.a\.path is needed"),
        ("+data.mix={a: {kind: procedural, template: procedural}}", r"data\.mix\.a\.kind is 'procedural'"),
        ("+data.mix={a: {kind: file, path: a.jsonl, template: alpaca, wight: 1}}", r"data\.mix\.a\.wight"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        composed(*FILE, override)


def test_procedural_rows_are_not_filtered() -> None:
    with pytest.raises(ConfigError, match=r"data\.source\.kind is 'procedural'"):
        composed("model=tiny_random", "data.filter.duplicates=exact")
