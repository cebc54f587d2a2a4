"""The tables of a tournament, for a terminal."""

from typing import Any


def tournament_table(told: dict[str, Any]) -> str:
    """Lay out what `tournament` returns."""
    order, width = told["order"], max(len(row["system"]) for row in told["systems"])
    lines = [
        f"{told['matches']} matches on {told['questions']} questions, judged by {told['judge']}"
        f" ({order['unread']} verdicts could not be read)",
        "",
        f"{'':{width}}  rating   95 % over questions   rank    wins   Elo (std over orders, over questions)",
        *(
            f"{row['system']:{width}}  {row['rating']:6.0f}  {row['rating_low']:7.0f} to {row['rating_high']:5.0f}    "
            f"{row['rank_best']:3} to {row['rank_worst']:<2} {row['win_rate']:6.1%}  {row['elo']:5.0f} "
            f"({row['elo_order_std']:.0f}, {row['elo_question_std']:.0f})"
            for row in told["systems"]
        ),
        "",
    ]
    shares = f"shown first wins {order['first']:.1%}, second {order['second']:.1%}, ties {order['tie']:.1%}"
    if told["first_advantage"] is None:
        lines.append(shares)
    else:
        worth = "being first is worth {:.0f} points ({:.0f} to {:.0f}), taken out of the ratings"
        lines.append(f"{shares}: {worth.format(*told['first_advantage'])}")
    if order["swapped_pairs"]:
        lines.append(
            f"of {order['swapped_pairs']} pairs judged in both orders, {order['consistent']:.1%} got the same verdict "
            f"and {order['flipped']:.1%} the opposite one"
        )
    if told["length_effect"] is not None:
        lines.append(
            "an answer longer by a standard deviation is worth {:.0f} points ({:.0f} to {:.0f}), taken out of the "
            "ratings; wins without it:".format(*told["length_effect"])
        )
        lines += [
            "  {:{}}  {:6.1%}  ({:.1%} to {:.1%})".format(row["system"], width, *row["controlled_win_rate"])
            for row in told["systems"]
        ]
    return "\n".join([*lines, _method(told["settings"])])


def relative_table(told: dict[str, Any]) -> str:
    """Lay out what `relative_scores` returns."""
    rows, reference = told["relative"], told["reference"]
    width = max([len(row["system"]) for row in rows] + [6])
    return "\n".join(
        [
            f"scores as a part of {reference}'s; 95 % over questions",
            "",
            f"{'':{width}}   both orders               {reference} first   second   pairs (unread)",
            *(
                f"{row['system']:{width}}  {row['percent']:6.1f} %  {row['low']:6.1f} to {row['high']:5.1f}   "
                f"{row['reference_first']:{len(reference)}.1f} %  {row['system_first']:9.1f} %   "
                f"{row['pairs']} ({row['unread']})"
                for row in rows
            ),
        ]
    )


def _method(settings: dict[str, Any]) -> str:
    played = "all matches" if settings["sampled"] is None else f"{settings['sampled']} matches"
    return (
        f"rating: Bradley-Terry, ties half a win. Elo as in the QLoRA study: K {settings['k']:g}, start "
        f"{settings['start']:g}, mean of {settings['orders']} orders of {played}."
    )
