"""People compare answers of systems, side by side and without their names, on a page of this machine.

python -m qlora_lab.annotate ANSWERS... --annotators ann,bo --db study.sqlite    # begin; prints a link for each
python -m qlora_lab.annotate --server http://127.0.0.1:8000/v1 --questions FILE --annotators ann --db study.sqlite
python -m qlora_lab.annotate --db study.sqlite                                   # go on
python -m qlora_lab.annotate --db study.sqlite --status                          # how far they are and agree
python -m qlora_lab.annotate --db study.sqlite --export ratings.jsonl            # for qlora_lab.tournament
"""

import argparse
import importlib.util
import signal
import socket
import sys
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path

from qlora_lab.annotation.schedule import MOST_REPEATS, asked, comparisons, unanswered
from qlora_lab.annotation.store import Store
from qlora_lab.errors import DataError, QloraLabError
from qlora_lab.listening import is_loopback, listen
from qlora_lab.ratings.answers import read_questions
from qlora_lab.ratings.files import load_answers
from qlora_lab.ratings.stopping import stopping
from qlora_lab.runs.files import write_json_lines

PACKAGES = ("fastapi", "uvicorn", "jinja2", "markdown_it")  # of the extra `annotate`


def begin(options: argparse.Namespace) -> Store:
    """Open the study in options.db, a new one of options.answers or options.server where they are named."""
    if options.systems and options.server is None:
        raise DataError("--systems names models of a --server, and none is given")
    if not options.answers and options.server is None:
        for name in ("questions", "against", "limit", "repeat"):
            if getattr(options, name):
                raise DataError(f"--{name} is chosen when a study begins, together with the files of answers")
        return Store.open(options.db)
    if options.limit is not None and options.limit < 1:
        raise DataError(f"--limit must be 1 or more; got {options.limit}")
    if not 0 <= options.repeat <= MOST_REPEATS:
        raise DataError(f"--repeat must be a share from 0 to {MOST_REPEATS:g}; got {options.repeat:g}")
    if options.server is not None:
        options.answers = [*options.answers, asked_of_server(options)]
    answers = load_answers(options.answers, options.questions).answers
    chosen = comparisons(answers, against=options.against, limit=options.limit, seed=options.seed)
    for line in unanswered(answers):
        print(f"note: {line}; pairs need both answers", file=sys.stderr)
    return Store.create(options.db, asked(answers), answers, chosen, repeat=options.repeat, seed=options.seed)


def asked_of_server(options: argparse.Namespace) -> Path:
    """Ask a server's models; return the file of their answers, which lies beside the study.

    Raises:
        DataError: there is nothing to ask, or the server does not answer.
        SystemExit: on Ctrl-C and SIGTERM, once the answers under way are in the file.
    """
    from qlora_lab.annotation.from_server import ask_server

    if options.questions is None:
        raise DataError("--server needs --questions FILE: the prompts that its models are to answer")
    file: Path = options.db.with_name(f"{options.db.name}.answers.jsonl")
    systems = [name.strip() for name in options.systems.split(",") if name.strip()]
    with stopping("answers") as stop:
        try:
            ask_server(options.server, systems, read_questions(options.questions), file, stop.event)
        except DataError as error:  # as when the signal went to the server too
            if stop.signal is None:
                raise
            print(error, file=sys.stderr)
    if stop.signal is not None:
        print(f"this command was stopped; {file} has what was answered, and the same command goes on", file=sys.stderr)
        sys.exit(128 + stop.signal)
    return file


def export(store: Store, file: Path, *, repeats: bool) -> int:
    """Write the votes that count as judgments, the first showings or the repeats; return how many.

    Raises:
        DataError: the file cannot be written; what it held before is unchanged.
    """
    rows = [
        {
            **asdict(vote.judgment),
            "category": vote.category,
            "milliseconds": vote.milliseconds,
            "voted_at": vote.voted_at,
        }
        for vote in store.votes()
        if vote.repeat == repeats
    ]
    try:
        write_json_lines(file, rows)
    except OSError as error:
        raise DataError(f"{file} cannot be written: {error.strerror}; the votes are safe in the study") from error
    return len(rows)


def serve(store: Store, host: str, port: int) -> None:
    """Serve the page until Ctrl-C, or SIGTERM.

    Raises:
        DataError: a package is missing, or the address cannot be had.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise DataError(f"the page needs {', '.join(missing)}; install them with `pip install 'qlora_lab[annotate]'`")
    import uvicorn

    from qlora_lab.annotation.web import create_app

    annotators = store.annotators()
    if not annotators:
        raise DataError("this study has no annotators yet; name them with --annotators ann,bo")
    listening = listen(host, port)
    shown_host = socket.getfqdn() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    for annotator in annotators:
        progress = store.progress(annotator)
        link = f"http://{shown_host}:{listening.getsockname()[1]}/a/{annotator.token}"
        print(f"{annotator.name}: {link} ({progress.judged} of {progress.total} judged)")
    if not is_loopback(host):
        print(
            f"warning: {host} can be reached from other machines. A link's token is all that lets anyone vote, and it "
            "travels unencrypted: use it in a network you trust, or behind a server that adds TLS",
            file=sys.stderr,
        )
    print("Every vote is saved when it is given. Stop with Ctrl-C.", flush=True)
    # No access log: it would hold the tokens. No log_config: it would close the handlers of everybody else's logs.
    config = uvicorn.Config(create_app(store), log_config=None, access_log=False, server_header=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m qlora_lab.annotate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("answers", nargs="*", type=Path, metavar="ANSWERS", help="files or folders of answers")
    parser.add_argument("--db", type=Path, required=True, metavar="FILE", help="the study: made, or gone on with")
    parser.add_argument("--annotators", default="", metavar="NAME,NAME", help="who votes; more can be added later")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="prompts, where the files of answers lack them")
    parser.add_argument("--server", metavar="URL", help="ask this OpenAI-compatible server, such as qlora_lab.serve")
    parser.add_argument("--systems", default="", metavar="NAME,NAME", help="its models; default: all that it has")
    parser.add_argument("--against", metavar="SYSTEM", help="compare this system with each other one, and no others")
    parser.add_argument("--limit", type=int, metavar="N", help="compare N pairs, spread over the pairs of systems")
    parser.add_argument(
        "--repeat", type=float, default=0.0, metavar="SHARE", help="of the pairs, shown twice to measure self-agreement"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the orders; default: %(default)s")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on; default: %(default)s, this machine")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free; default: %(default)s")
    parser.add_argument("--status", action="store_true", help="print progress and agreement; do not serve")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the votes as judgments; do not serve")
    parser.add_argument("--export-repeats", type=Path, metavar="FILE", help="write the second votes on repeated pairs")
    options = parser.parse_args(arguments)
    try:
        with closing(begin(options)) as store:  # closed, a study is one file without SQLite's log beside it
            run(store, options)
    except QloraLabError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run(store: Store, options: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    if options.annotators:
        store.add_annotators([name.strip() for name in options.annotators.split(",")])
    for file, repeats in ((options.export, False), (options.export_repeats, True)):
        if file is not None:
            print(f"{export(store, file, repeats=repeats)} votes written to {file}")
    if options.status:
        from qlora_lab.annotation.status import status  # SciPy, which the page does without

        print(status(store))
    if not (options.status or options.export or options.export_repeats):
        serve(store, options.host, options.port)


if __name__ == "__main__":
    main()
