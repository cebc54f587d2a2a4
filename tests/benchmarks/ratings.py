"""Seconds of the ratings: 1,000 bootstraps of 20 systems, and 10,000 orders of 4,500 matches, beside evalica's.

    python tests/benchmarks/ratings.py

Made-up verdicts of 20 systems on 80 questions, every ordered pair once; Elo plays 4,500 matches of 8 systems. Each
figure is the median of five runs in one process, evalica's in between. evalica draws matches, not questions, and fits
neither the order shown nor many draws at once; its 1,000 bootstraps are 50 timed, times 20.
"""

import statistics
import time
from collections.abc import Callable

import evalica
import numpy as np

from qlora_lab.ratings.bradley_terry import bradley_terry
from qlora_lab.ratings.elo import elo
from qlora_lab.ratings.matches import Matches

RUNS = 5
EVALICA_SHARE = 20  # of its draws and orders, one in so many is timed


def made_up(systems: int, questions: int, matches: int | None = None) -> Matches:
    """Return verdicts on every ordered pair and question, or on so many of them."""
    generator = np.random.default_rng(0)
    question, first, second = (index.ravel() for index in np.indices((questions, systems, systems)))
    some = np.flatnonzero(first != second)[:matches]
    strength = generator.normal(0, 0.8, systems)
    chance = 1 / (1 + np.exp(strength[second[some]] - strength[first[some]] - 0.4))
    return Matches(
        tuple(f"system {index:02}" for index in range(systems)),
        tuple(str(index) for index in range(questions)),
        first[some],
        second[some],
        question[some],
        (generator.random(len(some)) < chance).astype(float),
    )


def median_s(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def for_evalica(matches: Matches, order: np.ndarray) -> tuple[list[str], list[str], list[evalica.Winner]]:
    winners = {1.0: evalica.Winner.X, 0.0: evalica.Winner.Y}
    first, second = ([matches.systems[index] for index in side[order]] for side in (matches.first, matches.second))
    return first, second, [winners[score] for score in matches.score[order]]


def main() -> None:
    many, study = made_up(20, 80), made_up(8, 81, 4500)
    generator = np.random.default_rng(1)
    resampled = [for_evalica(many, generator.integers(len(many), size=len(many))) for _ in range(1000 // EVALICA_SHARE)]
    orders = [for_evalica(study, generator.permutation(len(study))) for _ in range(10_000 // EVALICA_SHARE)]
    for what, ours, theirs in (
        (
            f"1,000 bootstraps of {len(many.systems)} systems, {len(many)} matches",
            lambda: bradley_terry(many, draws=1000, first_advantage=False),
            lambda: [evalica.bradley_terry(*drawn) for drawn in resampled],
        ),
        ("  with the order shown fitted", lambda: bradley_terry(many, draws=1000), None),
        (
            f"10,000 orders of {len(study)} matches",
            lambda: elo(study, orders=10_000),
            lambda: [evalica.elo(*order, initial=1000.0, k=32.0) for order in orders],
        ),
    ):
        beside = "" if theirs is None else f"; evalica {EVALICA_SHARE * median_s(theirs):.2f} s"
        print(f"{what}: {median_s(ours):.3f} s{beside}", flush=True)


if __name__ == "__main__":
    main()
