from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lab.config.schema import DataConfig, FilterConfig, MixPartConfig, SourceConfig
from qlora_lab.data.mixing import rows_of_parts
from qlora_lab.errors import ConfigError, DataError
from qlora_lab.runs.identity import run_id
from tests.helpers import composed

weights_of_parts = st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 100), min_size=1)


@given(weights=weights_of_parts, total=st.integers(1, 5000))
@settings(max_examples=60, deadline=None)
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
PART = "+data.mix={more: {kind: file, path: %s, template: question_answer, content_sha256: abc}}"


def test_a_mix_is_an_axis_like_any_other() -> None:
    config, moved, heavier = (
        composed(*FILE, PART % path, f"data.mix.more.weight={weight}")
        for path, weight in [("more.jsonl", 0.5), ("moved.jsonl", 0.5), ("more.jsonl", 2)]
    )
    assert [part.weight for part in (config.data.mix["more"], heavier.data.mix["more"])] == [0.5, 2.0]
    assert run_id(config) == run_id(moved)  # the content counts, not where it lies
    others = [replace(config.data, filter=FilterConfig(duplicates="near")), replace(config.data, packing=True)]
    ids = [run_id(config), run_id(heavier), *(run_id(replace(config, data=data)) for data in others)]
    assert len(set(ids)) == len(ids)


def part(**values: Any) -> MixPartConfig:
    return MixPartConfig(**{"kind": "file", "path": "a.jsonl", "template": "alpaca", **values})


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"source": part()}, "must not name a part 'source'"),
        ({"a": part(weight=0.0)}, r"data\.mix\.a\.weight must be a finite number above 0"),
        ({"a": part(path=None)}, r"data\.mix\.a\.path is needed"),
        ({"a": part(kind="procedural", template="procedural")}, r"data\.mix\.a\.kind is 'procedural'"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(mix: dict[str, MixPartConfig], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(name="mixed", source=part(), mix=mix)


def test_procedural_rows_are_not_filtered() -> None:
    procedural = SourceConfig(kind="procedural", template="procedural")
    with pytest.raises(ConfigError, match=r"data\.source\.kind is 'procedural'"):
        DataConfig(name="tasks", source=procedural, rows=9, filter=FilterConfig(duplicates="exact"))
