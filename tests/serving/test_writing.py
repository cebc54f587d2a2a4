"""What of an answer is shown, piece by piece: whole characters, and nothing of what ends it."""

import random

import pytest

from qlora_lab.evaluation.generate import Stops
from qlora_lab.models.byte_level import ByteLevelTokenizer
from qlora_lab.serving.writing import Choice, Writing

TOKENIZER = ByteLevelTokenizer()


def pieces(text: str, *stops: str, max_tokens: int = 1000, eos: bool = True) -> tuple[list[str], Writing]:
    writing = Writing(TOKENIZER, Choice(), Stops((), stops), max_tokens)
    shown = []
    for token in [*TOKENIZER(text, add_special_tokens=False)["input_ids"], *([TOKENIZER.eos_token_id] if eos else [])]:
        shown.append(writing.add(token))
        if writing.finish_reason is not None:
            break
    return shown, writing


def test_characters_are_shown_when_they_are_whole() -> None:
    shown, writing = pieces("aé€😀b")
    assert [piece for piece in shown if piece] == ["a", "é", "€", "😀", "b"]
    assert (writing.text, writing.finish_reason, len(writing.token_ids)) == ("aé€😀b", "stop", 12)


@pytest.mark.parametrize(
    ("text", "stops", "expected", "reason"),
    [
        ("one END two", ("END",), "one ", "stop"),
        ("one EN two", ("END",), "one EN two", "stop"),
        ("aab aaab", ("aaab",), "aab ", "stop"),
        ("x\n\ny", ("\n\n", "\ny"), "x", "stop"),
        ("abc", ("c", "bc"), "a", "stop"),
        ("é and ü", ("ü",), "é and ", "stop"),
        ("a EN", ("END",), "a EN", "stop"),
    ],
)
def test_a_stop_ends_an_answer_and_is_not_shown(text: str, stops: tuple[str, ...], expected: str, reason: str) -> None:
    shown, writing = pieces(text, *stops)
    assert ("".join(shown), writing.text, writing.finish_reason) == (expected, expected, reason)


def test_at_its_limit_everything_is_shown() -> None:
    shown, writing = pieces("abcEN", "END", max_tokens=5, eos=False)
    assert ("".join(shown), writing.finish_reason) == ("abcEN", "length")
    # This tokenizer shows nothing for half a character.
    shown, writing = pieces("a€", max_tokens=3, eos=False)
    assert ("".join(shown), writing.finish_reason) == (
        "a",
        "length",
    )  # this tokenizer shows nothing for half a character


def test_pieces_make_up_what_is_decoded_at_once() -> None:
    rng = random.Random(1)
    for _ in range(30):
        text = "".join(rng.choice("ab é€😀\n") for _ in range(40))
        assert "".join(pieces(text, "zz")[0]) == text
