import io

from qlora_lab.evaluation.progress import item_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end() -> None:
    stream, times = io.StringIO(), iter([0.0, 0.0, 4.0, 10.0, 14.0, 16.0])
    with item_progress("mmlu", stream, clock=lambda: next(times), interval_s=8.0) as progress:
        advance = progress(20)
        for more in (2, 8, 4, 6):
            advance(more)
    assert stream.getvalue() == "mmlu: 10/20 items, 10 s left\nmmlu: 20/20 items, 0 s left\n"


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with item_progress("mmlu", stream) as progress:
        progress(3)(3)
    assert "mmlu: 100%" in stream.getvalue() and "3/3" in stream.getvalue()
