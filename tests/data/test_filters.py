import json
import random
from pathlib import Path

import numpy as np
import pytest

from qlora_lab.config.schema import FilterConfig
from qlora_lab.data.decontamination import EvaluationText
from qlora_lab.data.filters import MAX_LISTED, Removed, filter_rows
from qlora_lab.data.near_duplicates import duplicates_of, shingles, signatures
from qlora_lab.data.rows import Row
from qlora_lab.errors import ConfigError, DataError

HELD_OUT = {"exam": [Row("Who wrote the long book about the white whale and its captain?", "Herman Melville")]}


def filtered(rows: list[Row], **config: object) -> tuple[list[int], Removed]:
    removed = Removed()
    return filter_rows(rows, range(len(rows)), FilterConfig(**config), HELD_OUT, removed), removed  # type: ignore[arg-type]


def test_rows_of_other_languages_go() -> None:
    rows = [Row("a", "b", language="en"), Row("c", "d", language="de"), Row("e", "f", language="en")]
    kept, removed = filtered(rows, languages=["en"])
    assert kept == [0, 2]
    assert removed.counts == {"other language": 1}
    assert removed.listed == [{"reason": "other language", "because": "de", "key": rows[1].key, "row": "c"}]
    assert filtered(rows, languages=["en", "de"])[0] == [0, 1, 2]


def test_a_row_that_does_not_say_its_language_is_not_guessed_unasked() -> None:
    with pytest.raises(DataError, match=r"'c' does not; set data\.filter\.detect_language=true"):
        filtered([Row("a", "b", language="en"), Row("c", "d")], languages=["en"])


def test_language_is_guessed_where_asked_for() -> None:
    pytest.importorskip("py3langid")
    rows = [
        Row("Wie heißt die Hauptstadt von Frankreich?", "Die Hauptstadt von Frankreich heißt Paris."),
        Row("What is the capital of France?", "The capital of France is Paris."),
    ]
    assert filtered(rows, languages=["en"], detect_language=True)[0] == [1]


def test_guessing_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install py3langid"):
        filtered([Row("a", "b")], languages=["en"], detect_language=True)


def test_lengths_are_of_source_and_target_apart() -> None:
    rows = [Row("s" * source, "t" * target) for source, target in [(5, 5), (4, 5), (5, 9), (8, 8), (9, 5)]]
    kept, removed = filtered(rows, min_source_characters=5, max_source_characters=8, max_target_characters=8)
    assert kept == [0, 3]
    assert [entry["because"] for entry in removed.listed] == [
        "source of 4 characters", "target of 9 characters", "source of 9 characters",
    ]  # fmt: skip


def test_of_equal_rows_the_first_stays() -> None:
    rows = [Row("a b", "c"), Row("A  b", "C"), Row("a b", "d"), Row("a b", "c")]
    assert filtered(rows)[0] == [0, 1, 2, 3]
    kept, removed = filtered(rows, duplicates="exact")
    assert kept == [0, 2]
    assert removed.counts == {"duplicate": 2}


def sentences(count: int, words: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices([f"word{n}" for n in range(2000)], k=words)) for _ in range(count)]


def jaccard(first: str, second: str) -> float:
    one, other = set(shingles(first)), set(shingles(second))
    return len(one & other) / len(one | other)


def test_near_duplicates_are_those_whose_triples_overlap() -> None:
    texts = sentences(60, 60, seed=0)
    alike = [f"{text} word1" for text in texts[:20]]  # 58 of 59 triples
    half = [" ".join(text.split()[:30]) + " " + other for text, other in zip(texts, sentences(20, 30, 1), strict=False)]
    assert min(jaccard(*pair) for pair in zip(texts, alike, strict=False)) > 0.95
    assert max(jaccard(*pair) for pair in zip(texts, half, strict=False)) < 0.4
    found = duplicates_of(signatures([*texts, *alike, *half]), 0.8)
    assert found.tolist() == [-1] * 60 + list(range(20)) + [-1] * 20


def test_the_estimate_is_of_the_shared_triples() -> None:
    text = sentences(1, 200, seed=3)[0]
    for words in (20, 60, 100):
        other = " ".join([*text.split()[:-words], *sentences(1, words, seed=words)[0].split()])
        signed = signatures([text, other])
        estimate = float((signed[0] == signed[1]).mean())
        assert abs(estimate - jaccard(text, other)) < 0.15  # 128 hashes: a standard error of at most 0.044


def test_a_row_is_compared_with_rows_that_stay() -> None:
    signed = np.zeros((3, 128), dtype=np.uint32)
    signed[1, :20], signed[2, :40] = 1, 1  # 0.84 alike, then 0.84, but the ends only 0.69
    assert duplicates_of(signed, 0.8).tolist() == [-1, 0, -1]


def test_near_duplicates_are_filtered_and_name_what_stays() -> None:
    text = sentences(1, 40, seed=5)[0]
    rows = [Row(text, "yes"), Row("another thing", "no"), Row(f"{text} indeed", "yes")]
    kept, removed = filtered(rows, duplicates="near")
    assert kept == [0, 1]
    assert removed.listed[0]["because"] == f"row {rows[0].key} stays"


def test_rows_that_quote_an_evaluation_row_go() -> None:
    quote = Row("x", "They say: THE LONG book, about the white WHALE and its owner")
    rows = [quote, Row("the white whale and its captain", "swim"), Row("Herman Melville", "Herman Melville")]
    kept, removed = filtered(rows, contamination_words=8)
    assert kept == [1, 2]
    assert removed.listed[0]["because"] == "set 'exam'"
    assert filtered(rows, contamination_words=6)[0] == [2]
    assert EvaluationText(HELD_OUT, 13).set_quoted_by(quote) is None  # the question has 12 words


def test_counts_are_of_all_and_the_list_has_an_end() -> None:
    rows = [Row(f"q{number}", "same answer") for number in range(MAX_LISTED + 50)]
    removed = filtered(rows, max_target_characters=3)[1]
    assert removed.counts == {"length": MAX_LISTED + 50}
    assert len(removed.listed) == MAX_LISTED


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"duplicates": "all"}, r"data\.filter\.duplicates must be one of keep, exact, near; got 'all'"),
        ({"near_duplicate_similarity": 0.0}, r"near_duplicate_similarity must be above 0 and at most 1"),
        ({"contamination_words": 3}, r"contamination_words must be 4 or more; got 3"),
        ({"min_target_characters": 9, "max_target_characters": 8}, r"max_target_characters must be 9 or more; got 8"),
        ({"detect_language": True}, r"is of no use without data\.filter\.languages"),
    ],
)
def test_settings_out_of_range_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FilterConfig(**config)  # type: ignore[arg-type]


def test_declared_languages_come_from_the_rows(tmp_path: Path) -> None:
    from qlora_lab.config.schema import SourceConfig
    from qlora_lab.data.report import SetReport
    from qlora_lab.data.sources import load_rows

    records = [{"input": "a", "output": "b", "lang": "en"}, {"input": "c", "output": "d", "language": "de"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    source = SourceConfig(kind="file", template="input_output", path="rows.jsonl")
    rows = load_rows(source, cache_dir=tmp_path, data_dir=tmp_path, counts=SetReport())
    assert [row.language for row in rows] == ["en", "de"]
