"""Work by an asker that costs nothing but time."""

import threading
from collections.abc import Sequence
from pathlib import Path

from qlora_lab.judging.cache import Response, ResponseCache
from qlora_lab.judging.pairs import comparisons
from qlora_lab.judging.prompts import VERDICTS, Message
from qlora_lab.judging.settings import LOCAL, JudgeConfig
from qlora_lab.judging.work import Outcome, Unanswered, Work, first_request
from tests.judging.endpoint_stand_in import WAIT_S
from tests.judging.helpers import made_up

CONFIG = JudgeConfig(kind=LOCAL, model="slow")


class Slow:
    """Replies at once to the first conversations, and later not before it is let go."""

    workers, batch, paid = 1, 2, False

    def __init__(self) -> None:
        self.let_go, self.at_work = threading.Event(), threading.Event()
        self.asked = 0

    def ask(self, conversations: Sequence[list[Message]]) -> list[Response | Unanswered]:
        self.asked += len(conversations)
        if self.asked > self.batch:
            self.at_work.set()
            assert self.let_go.wait(WAIT_S)
        return [Response("1", "slow", "eos", 1, 1, 0.0, "now") for _ in conversations]


def test_what_is_not_paid_for_is_not_waited_for_at_the_end(tmp_path: Path) -> None:
    slow, stop, cache = Slow(), threading.Event(), ResponseCache(tmp_path / "r.sqlite")
    requests = [first_request(CONFIG, pair, VERDICTS) for pair in comparisons([*made_up("x"), *made_up("y")])[0]]
    stopper = threading.Thread(target=lambda: (slow.at_work.wait(WAIT_S), stop.set()))
    stopper.start()
    work = Work(CONFIG, VERDICTS, slow, cache, max_cost=None, stop=stop, progress=lambda outcome: None)
    outcome: Outcome = work.judge(requests)
    assert not slow.let_go.is_set() and len(outcome.judged) == 2 and slow.asked == 4
    slow.let_go.set()
    stopper.join()
    cache.close()
