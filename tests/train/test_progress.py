import io
from collections.abc import Callable

from qlora_lab.train.progress import Progress, ProgressBar, ProgressLines, progress_for


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def metrics(loss: float) -> dict[str, float]:
    return {"train/loss": loss, "train/learning_rate": 2e-4, "train/tokens_per_s": 150.0}


def run(progress: Progress, clock: Callable[[], float], total: int, done: int = 0) -> None:
    progress.start(total, done)
    for step in range(done + 1, total + 1):
        progress.update(step, metrics(1 / step))
    progress.close()


def test_a_log_gets_the_first_and_last_line_and_one_in_15_seconds_between() -> None:
    ticks = iter(range(0, 1000, 4))  # start, then a step every 4 s
    stream = io.StringIO()
    progress = ProgressLines(stream, lambda: float(next(ticks)))
    run(progress, lambda: 0.0, total=10)
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "5/10", "9/10", "10/10"]
    assert lines[1] == "step 5/10  loss 0.200  rate 2.00e-04  150 tokens/s  0:20 left"


def test_a_resumed_run_reckons_the_time_left_from_its_own_steps() -> None:
    ticks = iter([0.0, 60.0])
    stream = io.StringIO()
    progress = ProgressLines(stream, lambda: next(ticks))
    progress.start(100, 39)
    progress.update(40, metrics(0.5))
    assert stream.getvalue().endswith("1:00:00 left\n")


def test_a_terminal_gets_a_bar_and_a_log_gets_lines() -> None:
    terminal = Terminal()
    bar = progress_for(terminal, lambda: 0.0)
    assert isinstance(bar, ProgressBar)
    run(bar, lambda: 0.0, total=3, done=1)
    assert "3/3" in terminal.getvalue() and "loss=0.333" in terminal.getvalue()
    assert isinstance(progress_for(io.StringIO(), lambda: 0.0), ProgressLines)
