from qlora_lab.data.rows import Row, content_key, normalise


def test_normalise_ignores_case_spacing_and_unicode_form() -> None:
    assert normalise("  Cafe\u0301\n\tNOIR ") == normalise("caf\u00e9 noir") == "caf\u00e9 noir"


def test_key_is_that_of_the_pair_and_source_key_that_of_the_question() -> None:
    row = Row("What is 2 + 2?", "4")
    same = Row(" what is  2 + 2?\n", "4", family="sums")
    other_answer = Row("What is 2 + 2?", "5")
    assert row.key == same.key != other_answer.key
    assert row.source_key == other_answer.source_key
    assert len(row.key) == 16


def test_key_tells_where_the_source_ends() -> None:
    assert Row("a b", "c").key != Row("a", "b c").key
    assert content_key("a", "b") != content_key("a b")


def test_source_key_of_a_wrapped_question_and_of_a_text_without_one() -> None:
    assert Row("Instruction: sing", "la", asked="sing").source_key == Row("Sing", "la").source_key
    assert Row("", "a text").source_key != Row("", "another text").source_key
