"""What the command lines over ratings share: where ratings and answers are, whose they are, how odd ones are told."""

import argparse
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from qlora_lab.errors import DataError, QloraLabError, unknown_name
from qlora_lab.ratings.files import AnswerFiles, RatingFiles, load_answers, load_ratings
from qlora_lab.ratings.judgments import HUMAN, Judgment, RatingsWarning
from qlora_lab.ratings.scores import ScoredPair

Rating = TypeVar("Rating", bound=Judgment | ScoredPair)


def add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE_OR_FOLDER", help="of judgments and scores")
    parser.add_argument(
        "--answers", nargs="+", type=Path, default=[], metavar="FILE_OR_FOLDER", help="the answers that were judged"
    )
    parser.add_argument("--questions", type=Path, help="file of the questions, where the answers do not tell them")
    parser.add_argument("--systems", nargs="+", default=[], metavar="NAME", help="rate only these")
    parser.add_argument("--draws", type=count, default=1000, help="of questions, for intervals; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def count(text: str) -> int:
    """Read how many of something there are to be, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more; got {text}")
    return int(text)


def load_sources(options: argparse.Namespace) -> tuple[RatingFiles, AnswerFiles]:
    """Read what `add_sources` names.

    Raises:
        DataError: something is missing or is not what it should be.
    """
    known = load_answers(options.answers, options.questions)
    found = load_ratings(options.paths, known)
    systems = systems_of([*found.judgments, *found.scores])
    for system in options.systems:
        if system not in systems:
            raise DataError(unknown_name("--systems", system, systems))
    chosen = options.systems or systems
    return RatingFiles(_between(found.judgments, chosen), _between(found.scores, chosen)), known


def systems_of(ratings: Iterable[Judgment | ScoredPair]) -> list[str]:
    return sorted({system for rating in ratings for system in (rating.first, rating.second)})


def judges_of(ratings: Iterable[Judgment | ScoredPair]) -> list[str]:
    """Return the judges; people are one, the majority of them."""
    return sorted({HUMAN if is_person(rating.judge) else rating.judge for rating in ratings})


def is_person(judge: str) -> bool:
    return judge.startswith(f"{HUMAN}:")


def run(work: Callable[[], str]) -> None:
    """Print what `work` returns, and before it what was odd about the ratings; end with status 2 where it cannot."""
    with warnings.catch_warnings(record=True) as odd:
        warnings.simplefilter("always", RatingsWarning)
        try:
            said = work()
        except QloraLabError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        finally:
            for sentence in dict.fromkeys(str(one.message) for one in odd if one.category is RatingsWarning):
                print(f"warning: {sentence}", file=sys.stderr)
    print(said)


def _between(ratings: Sequence[Rating], systems: Sequence[str]) -> list[Rating]:
    return [rating for rating in ratings if rating.first in systems and rating.second in systems]
