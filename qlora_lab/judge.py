"""Ratings by a judge of pairs of answers: python -m qlora_lab.judge ANSWERS... --judge NAME --out FILE

Every pair of systems is judged on every question that both answered, in both orders. What it will cost is shown before
anything is sent (--plan sends nothing); what a judge wrote is kept in a cache, so that the same command goes on where
it stopped and nothing is asked twice. python -m qlora_lab.tournament rates the systems from the file.
"""

import argparse
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from qlora_lab.config.command import shipped
from qlora_lab.config.exit_status import FAILED, REFUSED
from qlora_lab.errors import ConfigError, JudgeError, QloraLabError
from qlora_lab.judging import report
from qlora_lab.judging.cache import ResponseCache
from qlora_lab.judging.endpoint import Endpoint
from qlora_lab.judging.pairs import BOTH, ORDERS, Comparison, comparisons
from qlora_lab.judging.prompts import SCORES, TASKS, VERDICTS
from qlora_lab.judging.ratings_file import check_ratings, merge_ratings, row_of
from qlora_lab.judging.replay import matching, published_rows
from qlora_lab.judging.settings import LOCAL, REPLAY, JudgeConfig, load_judge
from qlora_lab.judging.work import Asker, Outcome, Request, Work, first_request
from qlora_lab.ratings.files import AnswerFiles, load_answers
from qlora_lab.ratings.stopping import StopSignal, stopping
from qlora_lab.runs.progress import progress_bar
from qlora_lab.wheels import default_cache_dir

JUDGES = "evaluation/judge"


def judge(options: argparse.Namespace) -> int:
    """Do what the command line says and return the exit status.

    Raises:
        QloraLabError: nothing was judged; bad input is ConfigError or DataError.
    """
    config = load_judge(options.judge, options.set, shipped("conf") / JUDGES)
    if options.task == SCORES and options.reference is None and config.kind != REPLAY:
        raise ConfigError("--task scores needs --reference SYSTEM, the system that all others are scored beside")
    if options.out is None and not options.plan:
        raise ConfigError("--out FILE is needed, where the ratings go; or --plan, which sends nothing")
    known = load_answers(options.answers, options.questions)
    if config.kind == REPLAY:
        return _replay(config, known, options)
    chosen = _comparisons(known, options)
    config, asker_of = _asker(config)
    if options.max_cost is not None and config.price is None:
        raise ConfigError(f"--max-cost needs the price of {config.model}; {report.GIVE_PRICE}")
    if options.out is not None:
        check_ratings(options.out, config.judge, options.task, config.asked_sha256(), config.sampling())
    requests = [first_request(config, comparison, options.task) for comparison in chosen]
    file = options.cache or default_cache_dir() / "judge" / "responses.sqlite"
    print(report.plan(config, requests, options.task, _cached(file, requests)), flush=True)
    if options.plan:
        return 0
    with stopping("paid requests") as stop:
        asker = asker_of(stop.event)
        status = _judge(config, options, requests, asker, file, stop)
        if stop.signal is not None and not asker.paid:  # its thread may be at a batch for minutes
            sys.stdout.flush()
            os._exit(status)
        return status


def _judge(
    config: JudgeConfig,
    options: argparse.Namespace,
    requests: Sequence[Request],
    asker: Asker,
    file: Path,
    stop: StopSignal,
) -> int:
    cache = ResponseCache(file)
    try:
        with progress_bar(len(requests), what="judging", unit="pair") as bar:

            def show(outcome: Outcome) -> None:
                bar.set_postfix(asked=outcome.asked, paid=f"${outcome.paid:.3f}", refresh=False)
                bar.update(len(outcome.judged) - bar.n)

            work = Work(config, options.task, asker, cache, max_cost=options.max_cost, stop=stop.event, progress=show)
            outcome = work.judge(requests)
        spent = cache.spent()
    finally:
        cache.close()
    place = {request.comparison.identity: number for number, request in enumerate(requests)}
    outcome.judged.sort(key=lambda judged: place[judged.comparison.identity])
    outcome.unanswered.sort(key=lambda unanswered: place[unanswered[0].identity])
    rows = [row_of(judged, options.task, config) for judged in outcome.judged]
    if rows:
        merge_ratings(options.out, rows)
    print(report.end(config, outcome, len(requests), spent, options.out))
    return _status(outcome, len(requests), stop)


def _status(outcome: Outcome, comparisons: int, stop: StopSignal) -> int:
    """Return the exit status, with the sentence that says why it is not 0."""
    left = comparisons - len(outcome.judged)
    if outcome.halted is not None:
        print(f"error: {outcome.halted}", file=sys.stderr)
        return FAILED if isinstance(outcome.halted, JudgeError) else REFUSED
    if left and stop.signal is not None:
        print("this command was stopped; what is judged stays judged, and the same command goes on", file=sys.stderr)
        return 128 + stop.signal
    if left:
        print(f"error: {report.unanswered(outcome)}; the same command asks again", file=sys.stderr)
        return FAILED
    return 0


def _asker(config: JudgeConfig) -> tuple[JudgeConfig, Callable[[threading.Event], Asker]]:
    """Return the settings with the model named, and what makes whoever replies: it loads what that takes."""
    if config.kind == LOCAL:
        from qlora_lab.judging.local import LocalJudge, local_model

        local = local_model(config)
        named = local.named(config)
        return named, lambda stop: LocalJudge(named, local)
    return config, lambda stop: Endpoint(config, stop)


def _replay(config: JudgeConfig, known: AnswerFiles, options: argparse.Namespace) -> int:
    rows = published_rows(config, options.task, known.systems_of_ids)
    missing = 0
    if options.answers:
        rows, missing = matching(rows, _comparisons(known, options))
    print(report.replayed(config, rows, options.task, missing))
    if not options.plan:
        if rows:
            check_ratings(options.out, rows[0]["judge"], options.task, rows[0].get("judge_sha256"))
        merge_ratings(options.out, rows)
    return FAILED if missing else 0


def _comparisons(known: AnswerFiles, options: argparse.Namespace) -> list[Comparison]:
    chosen, warnings = comparisons(known.answers, reference=options.reference, orders=options.orders)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if options.limit is not None:
        first = list(dict.fromkeys(comparison.question for comparison in chosen))[: options.limit]
        chosen = [comparison for comparison in chosen if comparison.question in first]
    return chosen


def _cached(file: Path, requests: Sequence[Request]) -> set[str]:
    if not file.exists():
        return set()
    cache = ResponseCache(file)
    try:
        return {request.key for request in requests if cache.get(request.key) is not None}
    finally:
        cache.close()


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(
        prog="python -m qlora_lab.judge", description="Have pairs of answers judged, or replay published ratings."
    )
    add = described.add_argument
    add("answers", nargs="*", type=Path, metavar="ANSWERS", help="files or folders of answers, of two systems or more")
    add("--judge", required=True, help=f"a file of conf/{JUDGES} by name, or the path of one")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="settings other than the file's")
    add("--out", "-o", type=Path, metavar="FILE", help="the ratings; what the file has of other questions stays")
    add("--questions", type=Path, metavar="FILE", help="what was asked, where the answers do not say it")
    add("--task", choices=TASKS, default=VERDICTS, help="first, second or tie; or two scores from 1 to 10")
    add("--reference", metavar="SYSTEM", help="compare the other systems with this one only")
    add("--orders", choices=ORDERS, default=BOTH, help="show each pair in both orders, or in one drawn at random")
    add("--limit", type=int, metavar="N", help="the first N questions only")
    add("--max-cost", type=float, metavar="DOLLARS", help="of all these comparisons, those paid earlier included")
    add("--cache", type=Path, metavar="FILE", help="of responses; default: judge/responses.sqlite in the cache folder")
    add("--plan", action="store_true", help="say what there is to judge and what it costs, and send nothing")
    return described


def main(words: list[str] | None = None) -> None:
    options = parser().parse_args(words)
    try:
        status = judge(options)
    except QloraLabError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(FAILED if isinstance(error, JudgeError) else REFUSED)
    sys.exit(status)


if __name__ == "__main__":
    main()
