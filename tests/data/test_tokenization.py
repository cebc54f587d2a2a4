import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from qlora_lab.data.prompts import data_ids, find_prompt_format
from qlora_lab.data.report import SetReport
from qlora_lab.data.rows import Row
from qlora_lab.data.tokenization import Example, Limits, encode_rows, whole_characters, without_middle
from qlora_lab.errors import DataError

BYTES = ByT5Tokenizer()
CHATML = find_prompt_format("chatml", BYTES)
MARKUP = CHATML.overhead_tokens


def encode(
    rows: list[Row], max_source: int, max_target: int, loss_on: str = "target"
) -> tuple[list[Example], SetReport]:
    counts = SetReport()
    encoded = encode_rows(
        rows, CHATML, BYTES, Limits(max_source, max_target), loss_on=loss_on, set_name="set", counts=counts
    )
    return [example for _, example in encoded], counts


def decoded(ids: object) -> str:
    return str(BYTES.decode(list(ids)))  # type: ignore[call-overload]


@given(
    source=st.text(max_size=60),
    target=st.text(max_size=60),
    room=st.integers(1, 40),
    max_target=st.integers(2, 40),
    loss_on=st.sampled_from(["target", "everything"]),
)
@settings(max_examples=120, deadline=None)
def test_eos_is_last_and_limits_hold(source: str, target: str, room: int, max_target: int, loss_on: str) -> None:
    try:
        [example], counts = encode([Row(source, target)], MARKUP + room, max_target, loss_on)
    except DataError:
        # only white space is left, or a part of one character
        assert not target.encode()[: max_target - 1].decode(errors="ignore").strip()
        return
    ids = list(example.input_ids)
    assert ids[-1] == BYTES.eos_token_id
    assert 1 <= example.target_start <= MARKUP + room
    assert 2 <= example.target_tokens <= max_target
    assert example.loss_start == (example.target_start if loss_on == "target" else 1)
    kept = bytes(token - 3 for token in ids[example.target_start : -1])  # ByT5: byte b is token b + 3
    assert target.encode().startswith(kept)
    assert (kept == target.encode()) == (counts.targets_truncated == 0)
    if source.strip():
        prompt = decoded(ids[: example.target_start])
        assert prompt.startswith(CHATML.before) and prompt.endswith(CHATML.after)
    else:
        assert ids[: example.target_start] == [BYTES.eos_token_id]


def test_long_source_loses_its_middle_and_nothing_else() -> None:
    [example], counts = encode([Row("Instruction: " + "x" * 50 + " Why?", "ok")], MARKUP + 20, 10)
    assert decoded(example.input_ids[: example.target_start]) == CHATML.before + "Instructioxxxxx Why?" + CHATML.after
    assert (counts.sources_truncated, counts.targets_truncated) == (1, 0)


@pytest.mark.parametrize("room", [1, 2, 5, 9])
def test_without_middle_keeps_both_ends(room: int) -> None:
    kept = without_middle(list(range(10)), room)
    assert len(kept) == room
    assert kept[0] == 0
    assert room == 1 or kept[-1] == 9


def test_target_bytes_are_those_kept() -> None:
    [whole, cut], counts = encode([Row("q", "für"), Row("q2", "abcdefgh")], 100, 6)
    assert (whole.target_bytes, whole.target_tokens) == (4, 5)
    assert (cut.target_bytes, cut.target_tokens) == (5, 6)
    assert decoded(cut.input_ids[cut.target_start :]) == "abcde</s>"
    assert counts.targets_truncated == 1


@pytest.mark.parametrize("which", ["bytes that decode to nothing", "bytes that decode to a mark"])
@pytest.mark.parametrize("text", ["aébé日本語🙂🙂x", "🙂é\ufffd日\ufffd\ufffdé", "日本"])
def test_a_cut_never_splits_a_character(which: str, text: str, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    """One token a byte for these texts in both tokenizers, so that what is kept can be counted by hand."""
    tokenizer = BYTES if which.endswith("nothing") else chat_tokenizer
    ids = data_ids([text], tokenizer)[0]
    assert len(ids) == len(text.encode())
    # of whole characters; one that looks like the mark of a split one is left out at the cut
    ends = {len(text[: place + 1].encode()) for place, character in enumerate(text) if character != "\ufffd"}
    for room in range(1, len(ids)):
        whole = max((end for end in ends if end <= room), default=0)
        kept, kept_text = whole_characters(text, ids, room, tokenizer)
        assert (kept, kept_text) == (ids[:whole], text.encode()[:whole].decode())


def test_bytes_and_tokens_of_a_cut_target_are_of_the_same_text() -> None:
    [cut], _ = encode([Row("q", "ééééé")], 100, 6)  # room for five bytes: two characters and a half
    assert (cut.target_bytes, cut.target_tokens) == (4, 5)
    assert decoded(cut.input_ids[cut.target_start :]) == "éé</s>"


def test_pad_equal_to_eos_and_forged_eos_do_not_matter(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    assert chat_tokenizer.pad_token_id == chat_tokenizer.eos_token_id
    counts = SetReport()
    chatml = find_prompt_format("chatml", chat_tokenizer)
    rows = [Row("the cat", "sat<|im_end|>still")]
    [(_, example)] = encode_rows(
        rows, chatml, chat_tokenizer, Limits(64, 32), loss_on="target", set_name="set", counts=counts
    )
    target = list(example.input_ids[example.target_start :])
    assert target.index(chat_tokenizer.eos_token_id) == len(target) - 1
    assert chat_tokenizer.decode(target[:-1]) == "sat<|im_end|>still"


def test_rows_without_a_target_are_dropped_and_counted() -> None:
    rows = [Row("a", " \n"), Row("b", "    far away"), Row("c", "yes")]
    examples, counts = encode(rows, 100, 4)
    assert [example.key for example in examples] == [rows[2].key]
    assert (counts.empty_targets, counts.targets_truncated_away, counts.rows) == (1, 1, 1)
    assert counts.target_tokens == 4
    assert counts.tokens == counts.longest_row_tokens == MARKUP + 5


def test_set_without_any_target_left_is_refused() -> None:
    with pytest.raises(DataError, match=r"of 2 rows 1 have an empty target and 1 one truncated away .*=3"):
        encode([Row("a", " "), Row("b", "   late")], 100, 3)


def test_limit_without_room_for_a_source_is_refused() -> None:
    with pytest.raises(DataError, match=rf"leaves no room for a source: prompt format 'chatml' takes {MARKUP}"):
        encode([Row("a", "b")], MARKUP, 8)
    encode([Row("", "b")], 1, 8)  # a text without a source has no markup


def test_more_rows_than_one_tokenizer_call() -> None:
    rows = [Row(f"question {index}", str(index)) for index in range(2300)]
    examples, _ = encode(rows, 100, 8)
    assert [decoded(example.input_ids[example.target_start : -1]) for example in examples] == [
        row.target for row in rows
    ]
    assert [example.key for example in examples] == [row.key for row in rows]
