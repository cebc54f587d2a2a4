"""The section of a report about ratings: what `python -m qlora_lab.tournament --json` tells of a study's systems."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.report.figures.ratings import ratings_figure
from analysis.report.figures.style import to_svg
from analysis.report.page import figure, section
from analysis.report.tables import to_html
from qlora_lab.errors import DataError

COMMAND = "python -m qlora_lab.tournament RATINGS.jsonl --json > ratings.json"
OF_A_SYSTEM = ("system", "rating", "rating_low", "rating_high", "rank_best", "rank_worst", "win_rate", "elo")


def read_ratings(file: Path) -> dict[str, Any]:
    """Read what the tournament told.

    Raises:
        DataError: there is no such file, or it holds something else.
    """
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        complete = bool(told["systems"]) and all(key in row for row in told["systems"] for key in OF_A_SYSTEM)
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise DataError(f"{file} holds no ratings ({why}); write them with {COMMAND}") from error
    if not complete:
        raise DataError(f"{file} holds ratings that lack {' or '.join(OF_A_SYSTEM)}; write them with {COMMAND}")
    return dict(told)


def ratings(told: Mapping[str, Any] | None) -> str:
    """Draw the systems' ratings and list them; nothing where there are none."""
    if told is None:
        return ""
    rows = told["systems"]
    shown = pd.DataFrame(
        {
            "system": [row["system"] for row in rows],
            "rating": [f"{row['rating']:.0f}" for row in rows],
            "95 % interval": [f"{row['rating_low']:.0f} to {row['rating_high']:.0f}" for row in rows],
            "ranks": [f"{row['rank_best']} to {row['rank_worst']}" for row in rows],
            "win rate": [f"{row['win_rate']:.0%}" for row in rows],
            "Elo": [f"{row['elo']:.0f}" for row in rows],
        }
    )
    note = (
        f"{told['matches']:,} matches on {told['questions']:,} questions, judged by {told['judge']}. Intervals are "
        "over questions: other questions would have given other ratings. Ranks are those that the intervals allow."
    )
    return section("Ratings", figure(to_svg(ratings_figure(told), "Ratings of the systems"), note), to_html(shown))
