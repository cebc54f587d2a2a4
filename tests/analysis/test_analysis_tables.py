"""Numbers as people read them, and tables that fit a terminal."""

import math

import numpy as np
import pandas as pd
import pytest

from analysis.report.tables import to_html, to_latex, to_markdown, to_text
from analysis.study.metrics import describe, format_differences, format_value
from analysis.study.row_ratios import row_ratios


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("eval/loss", 0.43317, "0.433"),
        ("eval/loss", 0.0002, "0.000"),
        ("eval/held_out/loss", 2.5, "2.500"),
        ("eval/exact_match", 0.4584, "45.8 %"),
        ("train/tokens", 7216.6, "7,217"),
        ("train/time_s", 4.25, "4.2 s"),
        ("train/time_s", 46.4, "46 s"),
        ("train/time_s", 200.0, "3 min 20 s"),
        ("train/time_s", 7500.0, "2 h 05 min"),
        ("memory/peak_rss_bytes", 1.45e9, "1.45 GB"),
        ("memory/peak_rss_bytes", 3.2e8, "320 MB"),
        ("eval/unheard_of", 123.456, "123.5"),
        ("eval/loss", math.nan, "–"),
    ],
)
def test_values_are_written_with_their_units(name: str, value: float, text: str) -> None:
    assert format_value(describe(name), value) == text


def test_differences_have_two_digits_of_their_uncertainty() -> None:
    loss, share = describe("eval/loss"), describe("eval/exact_match")
    assert format_differences(loss, [0.31234, 0.25, -0.00001], 0.06) == ["0.312", "0.250", "0.000"]
    assert format_differences(loss, [0.31234], 0.0061) == ["0.3123"]
    assert format_differences(share, [0.1762], 0.09) == ["17.6"]
    assert format_differences(describe("train/tokens"), [1234.5], 450.0) == ["1,234"]
    assert format_differences(loss, [0.31234], math.nan) == ["0.31"]


def test_rows_make_the_metric_and_equal_rows_count_together() -> None:
    rows = {
        "set": np.array(["b", "a", "a"], dtype=object),
        "key": np.array(["k", "k", "k"], dtype=object),
        "loss_sum": np.array([10.0, 1.0, 3.0]),
        "target_tokens": np.array([5.0, 2.0, 2.0]),
        "target_bytes": np.array([10.0, 4.0, 4.0]),
        "exact_match": np.array([0.0, 1.0, math.nan]),
    }
    loss = row_ratios(rows, "eval/loss", ["target_tokens"])
    assert loss is not None
    assert loss.index.tolist() == [("a", "k"), ("b", "k")]
    assert (loss.numerator.tolist(), loss.denominator.tolist()) == ([4.0, 10.0], [4.0, 5.0])
    assert loss.counts.tolist() == [[4.0], [5.0]]
    assert loss.value == pytest.approx((1.0 + 2.0) / 2), "the mean over sets"
    of_b = loss.at(loss.index[1:])
    assert (of_b.value, of_b.set_of.tolist()) == (2.0, [0])
    bits = row_ratios(rows, "eval/b/bits_per_byte")
    assert bits is not None
    assert bits.index.tolist() == [("b", "k")] and bits.numerator[0] == pytest.approx(10 / math.log(2))
    exact = row_ratios(rows, "eval/exact_match")
    assert exact is not None
    assert exact.denominator.tolist() == [1.0, 1.0], "the row without an exact match is no zero"
    for without_rows in ("train/loss", "eval/perplexity", "eval/mmlu/loss"):
        assert row_ratios(rows, without_rows) is None


def test_text_is_aligned() -> None:
    table = pd.DataFrame({"arm": ["a", "long name"], "loss": ["0.4", "10.4"]})
    assert to_text(table) == "arm        loss\na           0.4\nlong name  10.4"


def test_wide_tables_wrap_their_labels_then_lose_columns_and_say_so() -> None:
    table = pd.DataFrame({"arm": ["first_part, second_part, third"], **{f"column{i}": ["1234567"] for i in range(4)}})
    text = to_text(table, width=45)
    assert max(map(len, text.splitlines())) <= 45
    for part in ("first_part,", "second_part,", "third"):
        assert part in text
    assert text.splitlines()[-1] == "(not shown: column3)"
    assert text.splitlines()[1].split()[-3:] == ["1234567"] * 3


def test_html_is_escaped() -> None:
    assert "<td>&lt;b&gt;</td>" in to_html(pd.DataFrame({"a": ["<b>"]}))


def test_markdown_and_latex_are_escaped() -> None:
    table = pd.DataFrame({"arm": ["rank=4 | a_b & 50 % <x>"], "loss ±": ["−0.5"]})
    assert to_markdown(table).splitlines() == [
        "| arm | loss ± |",
        "| :-- | --: |",
        r"| rank=4 \| a_b & 50 % <x> | −0.5 |",
    ]
    lines = to_latex(table, "100 % of {it}", "tab:one").splitlines()
    assert r"\caption{100 \% of \{it\}}" in lines and r"\label{tab:one}" in lines
    assert r"\begin{tabular}{lr}" in lines and lines.count(r"\midrule") == 1
    assert r"rank=4 \textbar{} a\_b \& 50 \% \textless{}x\textgreater{} & $-$0.5 \\" in lines
    assert lines[lines.index(r"\toprule") + 1] == r"arm & loss $\pm$ \\"
