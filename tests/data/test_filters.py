import io
import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from qlora_lab.config.schema import FilterConfig, RowsConfig
from qlora_lab.data.decontamination import EvaluationText
from qlora_lab.data.filters import filter_rows
from qlora_lab.data.near_duplicates import duplicates_of, shingles, signatures
from qlora_lab.data.removed import Removed
from qlora_lab.data.rows import ASSISTANT, USER, Row, Turn
from qlora_lab.errors import ConfigError, DataError

HELD_OUT = {"exam": [Row("Who wrote the long book about the white whale and its captain?", "Herman Melville")]}


class Listed(Removed):
    """A list that is read back."""

    def __init__(self) -> None:
        self.text = io.StringIO()
        super().__init__(self.text)

    @property
    def listed(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.text.getvalue().rstrip("\n").split("\n")]


def filtered(rows: list[Row], **config: object) -> tuple[list[int], Listed]:
    removed = Listed()
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


def test_earlier_turns_of_a_chat_are_compared_too() -> None:
    earlier = "It was a bright cold day in April, and the clocks were striking thirteen"
    chat = Row("And then?", "He slipped in.", history=(Turn(USER, "How does it begin?"), Turn(ASSISTANT, earlier)))
    quote = Row("Continue: a bright cold day in April, and the clocks were striking", "thirteen")
    for held_out, row in ((chat, quote), (quote, chat)):
        assert EvaluationText({"exam": [held_out]}, 8).set_quoted_by(row) == "exam"
    assert EvaluationText({"exam": [chat]}, 8).set_quoted_by(Row("And then?", "He slipped in.")) is None


def test_rows_that_quote_a_benchmark_or_ask_its_short_question_go() -> None:
    others = {"quiz": ["How tall is Everest?", "A", "one two three four five six seven eight nine"]}
    rows = [
        Row("how  tall is EVEREST?", "8849 m"),
        Row("How tall is Everest? In feet.", "29,032"),
        Row("A", "a letter"),
        Row("count", "zero one two, three four five six"),
    ]
    config, removed = FilterConfig(contamination_words=6), Listed()
    assert filter_rows(rows, range(4), config, {}, removed, others) == [1, 2]
    assert [entry["because"] for entry in removed.listed] == ["set 'quiz'", "set 'quiz'"]


def test_benchmarks_are_read_once_and_take_little_memory() -> None:
    texts = (" ".join(f"word{number + place}" for place in range(100)) for number in range(0, 10_000, 100))
    EvaluationText({}, 8, {"small": ["what is loaded once"]})
    tracemalloc.start()
    evaluation = EvaluationText({}, 8, {"large": texts})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000 * 60  # eight bytes a run, while they are sorted some times that; words would take 150
    assert evaluation.set_quoted_by(Row("", " ".join(f"word{n}" for n in range(9_950, 9_960)))) == "large"
    assert evaluation.set_quoted_by(Row("", " ".join(f"word{n}" for n in range(9_995, 10_005)))) is None


def test_every_row_that_goes_is_listed() -> None:
    rows = [Row(f"q{number} \u2028 ä", "same answer") for number in range(1500)]
    removed = filtered(rows, max_target_characters=3)[1]
    assert removed.counts == {"length": 1500}
    assert [(line["key"], line["row"]) for line in removed.listed] == [(row.key, row.source) for row in rows]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"duplicates": "all"}, r"data\.filter\.duplicates must be one of keep, exact, near; got 'all'"),
        ({"near_duplicate_similarity": 0.0}, r"near_duplicate_similarity must be above 0 and at most 1"),
        ({"contamination_words": 3}, r"contamination_words must be 4 or more; got 3"),
        (
            {"contamination_sets": {"a": RowsConfig("file", "a.jsonl")}},
            r"of no use without data\.filter\.contamination_w",
        ),
        (
            {"contamination_words": 8, "contamination_sets": {"a": RowsConfig("file")}},
            r"data\.filter\.contamination_sets\.a\.path is needed",
        ),
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
