"""What the command says: the plan with its cost before anything is sent, and what came of it."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from qlora_lab.judging.cost import estimate
from qlora_lab.judging.pairs import one_sided
from qlora_lab.judging.settings import ENDPOINT, JudgeConfig
from qlora_lab.judging.work import Outcome, Request

GIVE_PRICE = "give it with --set price_per_million.prompt=... price_per_million.completion=... in US dollars"
SHOWN = 3


def plan(config: JudgeConfig, requests: Sequence[Request], task: str, cached: Collection[str]) -> str:
    """Say what is to be judged, what is answered in the cache, and what the rest will cost."""
    asked = [request.messages for request in requests if request.key not in cached]
    compared = [request.comparison for request in requests]
    systems = {answer.system for comparison in compared for answer in (comparison.first, comparison.second)}
    questions = {comparison.question for comparison in compared}
    lines = [
        f"{config.judge}: {len(requests)} comparisons ({task}) of {len(systems)} systems on {len(questions)} questions"
        f"; {len(requests) - len(asked)} answered in the cache, {len(asked)} to ask"
    ]
    if config.kind != ENDPOINT or not asked:
        return "\n".join(lines)
    expected = estimate(asked, config.price, config.max_tokens)
    tokens = f"expected: {expected.prompt_tokens:,} tokens of prompts and {expected.completion_tokens:,} of replies"
    price = config.price
    if price is None or expected.most is None:
        lines.append(f"{tokens}; the price of {config.model} is not known, so their cost is not: {GIVE_PRICE}")
    else:
        day = f" on {price.date}" if price.date else ""
        lines.append(
            f"{tokens}, ${expected.cost:.2f}; at most ${expected.most:.2f} (${price.prompt:g} and ${price.completion:g}"
            f" a million{day}; replies that cannot be read cost a reminder more)"
        )
    return "\n".join(lines)


def end(config: JudgeConfig, outcome: Outcome, comparisons: int, spent: float, out: Path) -> str:
    """Say what was judged, read and paid."""
    judged = outcome.judged
    unread = [item for item in judged if item.reading is None]
    lines = [f"judged {len(judged)} of {comparisons} comparisons, {outcome.asked} requests answered now: {out}"]
    if unread:
        lines.append(
            f"{len(unread)} replies could not be read, also after a reminder (null in the file): "
            + "; ".join(f"{item.comparison}: '...{item.response.text[-60:].strip()}'" for item in unread[:SHOWN])
            + ("; ..." if len(unread) > SHOWN else "")
        )
    alone = one_sided(item.comparison.identity for item in judged)
    if alone and len(judged) < comparisons:
        lines.append(f"{alone} of them are judged in one order only so far")
    if config.kind == ENDPOINT:
        if config.price is None:
            lines.append("the price is not known, and so the cost; the tokens used are in the file")
        else:
            lines.append(f"cost: ${outcome.paid:.4f} now, ${spent:.4f} for these comparisons in all")
    return "\n".join(lines)


def unanswered(outcome: Outcome) -> str:
    """Say which comparisons got no reply, and why."""
    told = "; ".join(f"{comparison}: {why}" for comparison, why in outcome.unanswered[:SHOWN])
    more = "; ..." if len(outcome.unanswered) > SHOWN else ""
    return f"{len(outcome.unanswered)} comparisons got no reply ({told}{more})"


def replayed(config: JudgeConfig, rows: Sequence[dict[str, Any]], task: str, missing: int) -> str:
    """Say what published ratings hold."""
    unread = sum(row.get("verdict", row.get("first_score")) is None for row in rows)
    judges = ", ".join(sorted({row["judge"] for row in rows}))
    identities = [(row["question"], row["first"], row["second"]) for row in rows]
    alone, again = one_sided(identities), len(identities) - len(set(identities))
    return (
        f"replayed {len(rows)} {task} of {judges or 'nobody'} ({unread} could not be read)"
        + (f"; {again} are about a comparison that comes again, and the last one counts" if again else "")
        + (f"; {alone} are in one order only" if alone else "")
        + (f"; {missing} of the comparisons have no published rating" if missing else "")
    )
