"""Made-up answers and studies of them."""

from datetime import UTC, datetime
from pathlib import Path

from qlora_lab.annotation.schedule import asked, comparisons
from qlora_lab.annotation.store import Store
from qlora_lab.ratings.answers import Answer

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def made_up(questions: int = 5, systems: str = "abc") -> list[Answer]:
    return [
        Answer(str(question), "generic", f"What is {question}?", f"It is {question} of {system}.", f"system-{system}")
        for question in range(questions)
        for system in systems
    ]


def new_study(
    file: Path, *names: str, questions: int = 5, systems: str = "ab", repeat: float = 0.0, answers: list | None = None
) -> Store:
    """Begin a study, or open the same one again."""
    answers = answers or made_up(questions, systems)
    store = Store.create(file, asked(answers), answers, comparisons(answers), repeat=repeat, seed=0)
    store.add_annotators(names)
    return store
