"""Ratings of systems from judged pairs: python -m qlora_lab.tournament FILE_OR_FOLDER...

Bradley-Terry ratings with intervals over questions are what to conclude from; Elo as the QLoRA study reports it stands
beside them, with how often each system wins, and what the verdicts owe to the order in which answers were shown.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from qlora_lab.errors import DataError, QloraLabError, unknown_name
from qlora_lab.ratings.bias import order_bias, win_rates
from qlora_lab.ratings.bradley_terry import bradley_terry
from qlora_lab.ratings.elo import elo
from qlora_lab.ratings.judgments import Judgment, read_judgments
from qlora_lab.ratings.matches import matches_of
from qlora_lab.ratings.released import answer_systems, is_released, read_released


def load(paths: Iterable[Path], generations: Path | None) -> list[Judgment]:
    """Read files of judgments, and all of a folder's, in this project's layout or the study's release's.

    Raises:
        DataError: nothing is there, or something is not judgments of pairs.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found:
            raise DataError(f"{path} must be a file of judgments, or a folder with .jsonl files; it has none")
        files += found
    answers = {} if generations is None else answer_systems(sorted(generations.glob("*.jsonl")))
    return [
        judgment
        for file in files
        for judgment in (read_released(file, answers) if is_released(file) else read_judgments(file))
    ]


def one_judge(judgments: Sequence[Judgment], asked: str | None) -> list[Judgment]:
    """Return the judgments of one judge: of different ones they must not be mixed in one table.

    Raises:
        DataError: there are several and none is asked for, or there is none of the name.
    """
    judges = sorted({judgment.judge for judgment in judgments})
    if asked is None and len(judges) != 1:
        raise DataError(f"the judgments are of {len(judges)} judges ({', '.join(judges)}); choose one with --judge")
    if asked is not None and asked not in judges:
        raise DataError(unknown_name("--judge", asked, judges))
    return [judgment for judgment in judgments if asked in (None, judgment.judge)]


def lopsided(judgments: Iterable[Judgment]) -> list[str]:
    """Name the pairs that were not shown equally often in both orders."""
    shown = Counter((judgment.first, judgment.second) for judgment in judgments)
    pairs = sorted({judgment.pair for judgment in judgments})
    return [f"{one} and {other}" for one, other in pairs if shown[one, other] != shown[other, one]]


def tournament(judgments: Sequence[Judgment], *, draws: int, orders: int, k: float, seed: int) -> dict[str, Any]:
    """Return everything the tables say, as plain values; systems from best to worst."""
    matches = matches_of(judgments)
    rated = bradley_terry(matches, draws=draws, seed=seed)
    played = elo(matches, k=k, orders=orders, seed=seed)
    rates = win_rates(matches)
    best_first = np.argsort(-rated.rating)
    systems = [
        {
            "system": matches.systems[index],
            "rating": float(rated.rating[index]),
            "rating_low": float(rated.low[index]),
            "rating_high": float(rated.high[index]),
            "rank_best": int(rated.best_rank[index]),
            "rank_worst": int(rated.worst_rank[index]),
            "elo": float(played.mean[index]),
            "elo_order_std": float(played.order_std[index]),
            "win_rate": float(np.nanmean(rates[index])),
        }
        for index in best_first
    ]
    return {
        "judge": judgments[0].judge,
        "matches": len(matches),
        "questions": len(matches.questions),
        "first_advantage": rated.first_advantage,
        "order": asdict(order_bias(judgments)),
        "lopsided": lopsided(judgments),
        "elo_k": k,
        "elo_orders": orders,
        "seed": seed,
        "systems": systems,
    }


def report(result: dict[str, Any]) -> str:
    """Lay the result of `tournament` out for a terminal."""
    order, width = result["order"], max(len(row["system"]) for row in result["systems"])
    lines = [
        f"{result['matches']} matches on {result['questions']} questions, judged by {result['judge']}"
        f" ({order['unread']} verdicts could not be read)",
        "",
        f"{'':{width}}  rating   95 % over questions   rank    wins   Elo (order std)",
        *(
            f"{row['system']:{width}}  {row['rating']:6.0f}  {row['rating_low']:7.0f} to {row['rating_high']:5.0f}    "
            f"{row['rank_best']:3} to {row['rank_worst']:<2} {row['win_rate']:6.1%}  {row['elo']:5.0f} "
            f"({row['elo_order_std']:.0f})"
            for row in result["systems"]
        ),
        "",
        f"shown first wins {order['first']:.1%}, second {order['second']:.1%}, ties {order['tie']:.1%}: being first is "
        "worth {:.0f} points ({:.0f} to {:.0f}), taken out of the ratings".format(*result["first_advantage"]),
    ]
    if order["swapped_pairs"]:
        lines.append(
            f"of {order['swapped_pairs']} pairs judged in both orders, {order['consistent']:.1%} got the same verdict "
            f"and {order['flipped']:.1%} the opposite one"
        )
    if result["lopsided"]:
        lines.append(f"warning: not shown equally often in both orders: {'; '.join(result['lopsided'])}")
    lines.append(
        f"rating: Bradley-Terry, ties half a win. Elo: K {result['elo_k']:g}, mean of {result['elo_orders']} orders; "
        "its spread is over orders only."
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m qlora_lab.tournament", description="Rate systems by judged pairs.")
    parser.add_argument("paths", nargs="+", type=Path, metavar="FILE_OR_FOLDER", help="JSON lines of judgments")
    parser.add_argument("--generations", type=Path, help="folder of the released answers, whose ids tell their systems")
    parser.add_argument("--judge", help="the judge to rate by, where there are several")
    parser.add_argument("--k", type=float, default=32.0, help="of Elo; default: %(default)s")
    parser.add_argument("--orders", type=int, default=10_000, help="of Elo; default: %(default)s")
    parser.add_argument("--draws", type=int, default=1000, help="of questions, for intervals; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(arguments)
    try:
        judgments = one_judge(load(options.paths, options.generations), options.judge)
        result = tournament(judgments, draws=options.draws, orders=options.orders, k=options.k, seed=options.seed)
    except QloraLabError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(result, indent=1) if options.json else report(result))


if __name__ == "__main__":
    main()
