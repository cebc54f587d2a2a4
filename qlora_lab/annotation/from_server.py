"""Answers that people compare, asked of the models of an OpenAI-compatible server, such as qlora_lab.serve."""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TextIO

from qlora_lab.errors import DataError, unknown_name
from qlora_lab.ratings.answers import Answer, Question, answer_line, read_answers
from qlora_lab.runs.files import to_json, whole_lines
from qlora_lab.runs.progress import progress_bar

TOKEN_VARIABLE = "QLORA_LAB_TOKEN"  # as the server's own
NO_TOKEN = "none"  # the package wants one
AT_A_TIME = 16  # requests, which our server answers in one batch
TIMEOUT_S = 600.0


def ask_server(
    address: str, systems: Sequence[str], questions: Mapping[str, Question], file: Path, stop: threading.Event
) -> None:
    """Let each system of a server answer each question, at temperature 0; answers that `file` has are kept.

    Args:
        address: such as http://127.0.0.1:8000/v1.
        systems: names of its models; empty: all that it has.
        file: gets a line for each answer as it comes, so that a command that was stopped goes on.
        stop: once it is set, answers under way are waited for and no others are asked for; as when one fails.

    Raises:
        DataError: the server cannot be reached, refuses, or has no such model; the `openai` package is missing.
    """
    try:
        import openai
    except ImportError as error:
        raise DataError("asking a server needs the openai package; pip install 'qlora_lab[judge]'") from error
    key = os.environ.get(TOKEN_VARIABLE) or NO_TOKEN
    # the same command goes on; a client that asks again by itself would not end when it is stopped
    client: Any = openai.OpenAI(base_url=address, api_key=key, timeout=TIMEOUT_S, max_retries=0)

    failed = threading.Event()

    def answer(system: str, one: Question) -> dict[str, Any] | None:
        """Return what the file gets, or nothing where nothing more is asked."""
        if stop.is_set() or failed.is_set():
            return None
        asked = [{"role": "user", "content": one.prompt}]
        try:
            choice = client.chat.completions.create(model=system, messages=asked, temperature=0).choices[0]
        except Exception:
            failed.set()
            raise
        told = Answer(one.question, one.category, one.prompt, choice.message.content or "", system)
        return {**answer_line(told), "stop_reason": choice.finish_reason, "temperature": 0}

    try:
        known = [model.id for model in client.models.list()]
        for system in systems:
            if system not in known:
                raise DataError(unknown_name("--systems", system, known))
        systems = list(dict.fromkeys(systems or known))
        there = _answered(file, systems, questions)
        wanted = [(system, one) for one in questions.values() for system in systems]
        missing = [(system, one) for system, one in wanted if (system, one.question) not in there]
        pool = ThreadPoolExecutor(AT_A_TIME)
        try:
            answers = [pool.submit(answer, *one) for one in missing]
            bar = progress_bar(len(wanted), done=len(wanted) - len(missing), what="asking the server", unit="answer")
            with bar, file.open("a", encoding="utf-8") as opened:
                _write(answers, opened, bar.update)
        finally:
            failed.set()
            pool.shutdown(cancel_futures=True)
    except openai.OpenAIError as error:
        raise DataError(f"{address} does not answer as it should ({_said(error)}); the same command goes on") from error
    except OSError as error:
        raise DataError(f"{file} cannot be written: {error.strerror}") from error


def _write(answers: "Sequence[Future[dict[str, Any] | None]]", file: TextIO, update: Callable[[], object]) -> None:
    """Write a line for each answer as it comes; raise what one of them failed of, once all others have ended."""
    failure: BaseException | None = None
    for done in as_completed(answers):
        failure = failure or done.exception()
        if done.exception() is None and (line := done.result()) is not None:
            file.write(to_json(line) + "\n")
            file.flush()
            update()
    if failure is not None:
        raise failure


def _answered(file: Path, systems: Sequence[str], questions: Mapping[str, Question]) -> set[tuple[str, str]]:
    """Return (system, question) of the answers in a file; half of one that a killed process left is cut off.

    Raises:
        DataError: it has an answer that is not asked for, such as to a prompt that has been changed since.
    """
    if not file.exists():
        return set()
    torn = whole_lines(file)[1]
    if torn:
        os.truncate(file, file.stat().st_size - len(torn))
    answers = read_answers(file)
    for one in answers:
        asked = questions.get(one.question)
        if one.system not in systems or asked is None or one.prompt != asked.prompt:
            raise DataError(
                f"{file} has an answer of {one.system} to question {one.question} that is not asked for now; remove "
                "the file, or give another --db"
            )
    return {(one.system, one.question) for one in answers}


def _said(error: Any) -> str:
    body = getattr(error, "body", None)
    return str(body.get("message") if isinstance(body, dict) else error.__cause__ or error)
