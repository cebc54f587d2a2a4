"""The journal of submissions is read whatever its last line, or a message in it, looks like."""

from pathlib import Path

from qlora_lab.sweep.journal import INTENT, REFUSED, SUBMITTED, Journal


def test_line_breaks_of_other_kinds_are_part_of_a_message(tmp_path: Path) -> None:
    Journal(tmp_path).append(REFUSED, "a", message="one\u2028two\x85three")
    assert Journal(tmp_path).entries()["a"]["message"] == "one\u2028two\x85three"


def test_a_line_that_is_torn_inside_a_character_was_not_written(tmp_path: Path) -> None:
    Journal(tmp_path).append(INTENT, "a")
    file = tmp_path / "journal.jsonl"
    whole = file.read_bytes()
    Journal(tmp_path).append(SUBMITTED, "b", partition="größer")
    file.write_bytes(file.read_bytes()[: len(whole) + file.read_bytes()[len(whole) :].index("ö".encode()) + 1])
    assert list(Journal(tmp_path).entries()) == ["a"]
    Journal(tmp_path).append(SUBMITTED, "c")
    assert list(Journal(tmp_path).entries()) == ["a", "c"]
