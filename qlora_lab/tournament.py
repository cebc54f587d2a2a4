"""Ratings of systems from judged pairs: python -m qlora_lab.tournament FILE_OR_FOLDER...

Bradley-Terry ratings with intervals over questions are what to conclude from; Elo as the QLoRA study reports it stands
beside them, with how often each system wins, what the verdicts owe to the order in which answers were shown and to
their length, and scores relative to a reference system.
"""

import argparse
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qlora_lab.errors import DataError, unknown_name
from qlora_lab.ratings.bias import order_bias, win_rates
from qlora_lab.ratings.bradley_terry import bradley_terry, length_differences
from qlora_lab.ratings.command import Rating, add_sources, count, is_person, judges_of, load_sources, run
from qlora_lab.ratings.elo import elo, elo_question_std
from qlora_lab.ratings.files import AnswerFiles
from qlora_lab.ratings.judgments import HUMAN, Judgment, RatingsWarning, majority
from qlora_lab.ratings.matches import matches_of
from qlora_lab.ratings.relative import relative_scores
from qlora_lab.ratings.tables import relative_table, tournament_table
from qlora_lab.runs.files import to_json


@dataclass(frozen=True)
class Settings:
    """`sampled` matches are played in each order, None plays all; `length` takes the effect of length out."""

    draws: int = 1000
    orders: int = 10_000
    k: float = 32.0
    start: float = 1000.0
    sampled: int | None = None
    seed: int = 0
    length: bool = False


def one_judge(ratings: Sequence[Rating], asked: str | None) -> list[Rating]:
    """Return the ratings of one judge: of different ones they must not be mixed in one table.

    Raises:
        DataError: there are several and none is asked for, or there is none of the name.
    """
    judges = judges_of(ratings)
    people = sorted({rating.judge for rating in ratings} - set(judges))
    if asked is None and len(judges) != 1:
        raise DataError(f"the ratings are of {len(judges)} judges ({', '.join(judges)}); choose one with --judge")
    name = asked or judges[0]
    if name not in (*judges, *people):
        raise DataError(unknown_name("--judge", name, [*judges, *people]))
    return [rating for rating in ratings if rating.judge == name or (name == HUMAN and is_person(rating.judge))]


def warn_of_lopsided(judgments: Iterable[Judgment], *, first_advantage: bool) -> None:
    """Warn of the pairs that were not shown equally often in both orders.

    Args:
        first_advantage: whether the ratings allow for it.
    """
    shown = Counter((judgment.first, judgment.second) for judgment in judgments)
    pairs = sorted({(min(pair), max(pair)) for pair in shown})
    uneven = [f"{one} and {other}" for one, other in pairs if shown[one, other] != shown[other, one]]
    if not first_advantage:
        warnings.warn(
            "no pair was shown in both orders: what being shown first is worth cannot be told, and is part of the "
            "ratings",
            RatingsWarning,
            stacklevel=2,
        )
    elif uneven:
        sentence = f"not shown equally often in both orders, which the ratings allow for: {'; '.join(uneven)}"
        warnings.warn(sentence, RatingsWarning, stacklevel=2)


def tournament(judgments: Sequence[Judgment], settings: Settings, known: AnswerFiles) -> dict[str, Any]:
    """Return everything the tables say, as plain values; systems from best to worst.

    Of several people, the majority on a question and a pair is one match, whichever was shown first.

    Raises:
        DataError: no finite ratings exist, or the effect of length is asked for and a length is not known.
    """
    of_people = is_person(judgments[0].judge) and len({judgment.judge for judgment in judgments}) > 1
    matches = matches_of(majority(judgments, HUMAN) if of_people else judgments)
    first_advantage = not of_people and matches.in_both_orders()
    if not of_people:
        warn_of_lopsided(judgments, first_advantage=first_advantage)
    longer = length_differences(matches, known.lengths()) if settings.length else None
    rated = bradley_terry(
        matches, draws=settings.draws, seed=settings.seed, first_advantage=first_advantage, longer=longer
    )
    played = elo(
        matches,
        k=settings.k,
        start=settings.start,
        orders=settings.orders,
        sampled=settings.sampled,
        seed=settings.seed,
    )
    question_std = elo_question_std(matches, k=settings.k, start=settings.start, seed=settings.seed)
    rates = win_rates(matches)
    systems = [
        {
            "system": matches.systems[index],
            "rating": float(rated.rating[index]),
            "rating_low": float(rated.low[index]),
            "rating_high": float(rated.high[index]),
            "rank_best": int(rated.best_rank[index]),
            "rank_worst": int(rated.worst_rank[index]),
            "win_rate": float(np.nanmean(rates[index])),
            "controlled_win_rate": [float(value) for value in rated.win_rate[index]],
            "elo": float(played.mean[index]),
            "elo_mean_half_width": float(played.mean_half_width[index]),
            "elo_order_std": float(played.order_std[index]),
            "elo_question_std": float(question_std[index]),
        }
        for index in np.argsort(-rated.rating)
    ]
    return {
        "judge": HUMAN if of_people else judgments[0].judge,
        "matches": len(matches),
        "questions": len(matches.questions),
        "first_advantage": rated.first_advantage,
        "length_effect": rated.length_effect,
        "order": asdict(order_bias(judgments)),
        "settings": asdict(settings),
        "systems": systems,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m qlora_lab.tournament", description="Rate systems by judged pairs.")
    add_sources(parser)
    parser.add_argument("--judge", help=f"the judge to rate by, where there are several; {HUMAN}: most people's votes")
    parser.add_argument("--reference", help="the system whose scores are 100 %%, where pairs have scores")
    parser.add_argument("--length", action="store_true", help="take the effect of length out; needs --answers")
    parser.add_argument("--k", type=float, default=32.0, help="of Elo; default: %(default)s")
    parser.add_argument("--start", type=float, default=1000.0, help="of Elo; default: %(default)s")
    parser.add_argument("--sampled", type=count, help="matches played in an order of Elo; default: all")
    parser.add_argument("--orders", type=count, default=10_000, help="of Elo; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    run(lambda: _tables(options))


def _tables(options: argparse.Namespace) -> str:
    found, known = load_sources(options)
    if not found.judgments and options.reference is None:
        raise DataError("there are scores and no verdicts; name the system to compare with, --reference")
    told: dict[str, Any] = {}
    if found.judgments:
        settings = Settings(**{name: getattr(options, name) for name in Settings.__dataclass_fields__})
        told = tournament(one_judge(found.judgments, options.judge), settings, known)
    if options.reference is not None:
        scores = relative_scores(
            one_judge(found.scores, options.judge), options.reference, draws=options.draws, seed=options.seed
        )
        told |= {"reference": options.reference, "relative": [asdict(score) for score in scores]}
    if options.json:
        return to_json(told, indent=1)
    tables = ([tournament_table(told)] if found.judgments else []) + (
        [relative_table(told)] if "relative" in told else []
    )
    return "\n\n".join(tables)


if __name__ == "__main__":
    main()
