"""A study's evidence as a folder to publish: python -m qlora_lab.release OUT FILE_OR_FOLDER...

All answers, ratings and settings in this project's layout, and manifest.json with the SHA-256 of each file, versions
and commands. `--verify` checks a folder; a tournament on it gives the same table. Nothing private goes in: settings and
commands lose the folders of their paths, people their names, fields of tokens and hosts are left out, and a folder that
still names this machine, its user or a secret of the environment is refused.
"""

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from analysis.study.plan import planned_folders, read_plan, runs_folder
from qlora_lab.errors import DataError
from qlora_lab.publishing.manifest import publish, verify
from qlora_lab.publishing.public import command_line, paths_in, public, slug
from qlora_lab.ratings.answers import Answer, Question, read_answers
from qlora_lab.ratings.command import is_person, run
from qlora_lab.ratings.files import AnswerFiles, files_in, load_answers, read_ratings
from qlora_lab.ratings.judgments import HUMAN, Judgment, json_rows
from qlora_lab.ratings.scores import ScoredPair
from qlora_lab.runs.files import read_json, write_json, write_json_lines
from qlora_lab.runs.folder import RunFolder
from qlora_lab.runs.identity import of_the_result

README = "README.md"
CONFIG, ANSWERS = "config.yaml", "answers.jsonl"  # of runs and evaluations
FORMAT = "qlora_lab.release 1"
OF_THE_LAYOUT = {  # fields that are told by this project's own
    *("question", "question_id", "message_id", "category", "prompt", "answer", "system", "answer_id", "model_id"),
    *("generation", "generation_truncated", "first", "second", "verdict", "judge", "first_score", "second_score"),
    *("answer1_id", "answer2_id", "reviewer_id", "review_id", "score", "metadata"),
}
WRITTEN_BY_JUDGES = ("text", "unread_text")
HOW_TO = """# Evidence of a study

`answers/` has what each system said, `ratings/` and `scores/` what each judge said of pairs of them, `runs/` the
settings of the runs, `evaluations/` those of the answers with what came out, `manifest.json` the SHA-256 of every file.
With qlora_lab:

    python -m qlora_lab.release --verify .
"""


def write_release(out: Path, sources: Sequence[Path], questions: Path | None, *, names: bool, command: str) -> None:
    """Write the folder `out`; until it is whole it has another name.

    Args:
        sources: files and folders of answers and ratings, run folders, studies' folders, folders of base models and of
            evaluations, and folders of run folders.
        names: publish the names of people who judged; otherwise they are numbers.

    Raises:
        DataError: `out` is there already, a source is none, or something private would be published.
    """
    publish(
        out, lambda folder: _write_evidence(folder, sources, questions, names=names), layout=FORMAT, command=command
    )


def _write_evidence(folder: Path, sources: Sequence[Path], questions: Path | None, *, names: bool) -> dict[str, Any]:
    subjects = [its for source in sources for its in _subjects(source)]
    others = [source for source in sources if not _subjects(source)]
    given = files_in([its / ANSWERS if _is_evaluation(its) else its for its in others], ".jsonl", ".csv")
    evaluations = [its for subject in subjects for its in sorted(subject.glob("evaluations/*")) if _is_evaluation(its)]
    evaluations += [file.parent for file in given if _is_evaluation(file.parent)]
    of_evaluations = [its / ANSWERS for its in evaluations if (its / ANSWERS).is_file() and its / ANSWERS not in given]
    kinds = {file: _kind(file) for file in given + of_evaluations}
    unknown = [str(file) for file in given if kinds[file] is None]
    if unknown:
        raise DataError(f"these files hold neither answers nor ratings: {', '.join(unknown)}")
    of_answers, of_ratings = (
        [file for file, kind in kinds.items() if kind == which] for which in ("answers", "ratings")
    )
    known = load_answers(of_answers, questions)
    answers = _once(row for file in of_answers for row in _answer_rows(file, known.questions))
    ratings = _latest(pair for file in of_ratings for pair in _rating_rows(file, known))
    people = sorted({rating.judge for rating, _ in ratings if is_person(rating.judge)})
    numbers = {} if names else {name: f"{HUMAN}:{number}" for number, name in enumerate(people, start=1)}
    rows = [(type(rating), {**row, "judge": numbers.get(rating.judge, rating.judge)}) for rating, row in ratings]
    _by_name(folder / "answers", "system", answers)
    _by_name(folder / "ratings", "judge", [row for kind, row in rows if kind is Judgment])
    _by_name(folder / "scores", "judge", [row for kind, row in rows if kind is ScoredPair])
    if known.questions:
        write_json_lines(folder / "questions.jsonl", [asdict(asked) for asked in known.questions.values()])
    runs = [its for its in subjects if (its / CONFIG).is_file()]
    for its in runs:
        write_json(folder / "runs" / f"{its.name}.json", _settings(RunFolder(its)))
    for its in evaluations:
        write_json(folder / "evaluations" / its.absolute().parents[1].name / f"{its.name}.json", _evaluation(its))
    (folder / README).write_text(HOW_TO + "".join(f"    {line}\n" for line in _commands(rows, known)))
    return {
        "systems": known.systems(),
        "judges": sorted({str(row["judge"]) for _, row in rows}),
        "questions": len(known.questions),
        "answers": len(answers),
        "ratings": len(rows),
        "runs": [its.name for its in runs],
    }


def _subjects(source: Path) -> list[Path]:
    """Return the run or base model whose folder a source is, the runs of the study that it is, or those inside it."""
    if _is_subject(source):
        return [source]
    studies = planned_folders(source)
    if studies:
        runs = [runs_folder(study) / run_id for study in studies for run_id in read_plan(study).places]
        return [its for its in dict.fromkeys(runs) if (its / CONFIG).is_file()]
    return [its for its in sorted(source.iterdir()) if _is_subject(its)] if source.is_dir() else []


def _is_subject(folder: Path) -> bool:
    is_run = (folder / CONFIG).is_file() and not _is_evaluation(folder)
    return is_run or (folder / "evaluations").is_dir()


def _is_evaluation(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and folder.absolute().parent.name == "evaluations"


def _once(answers: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep one of answers that stand in two files, which say the same (`load_answers` refuses others)."""
    kept: dict[tuple[str, str], dict[str, Any]] = {}
    for row in answers:
        kept.setdefault((row["system"], row["question"]), row)
    return list(kept.values())


def _commands(ratings: Sequence[tuple[type, dict[str, Any]]], known: AnswerFiles) -> Iterator[str]:
    """Yield the commands that rate by each judge of a release and compare the judges."""
    answered = (" --answers answers" if known.answers else "") + (
        " --questions questions.jsonl" if known.questions else ""
    )
    verdicts, scores = ([row for kind, row in ratings if kind is which] for which in (Judgment, ScoredPair))
    for judge in _judges(verdicts):
        yield f"python -m qlora_lab.tournament ratings{answered} --judge {shlex.quote(judge)}"
    for judge in _judges(scores):
        compared = Counter(row[shown] for row in scores for shown in ("first", "second"))
        reference = shlex.quote(compared.most_common(1)[0][0])  # it is in every pair
        yield f"python -m qlora_lab.tournament scores{answered} --judge {shlex.quote(judge)} --reference {reference}"
    if verdicts:
        yield f"python -m qlora_lab.agreement ratings{answered}"


def _judges(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the judges of ratings; people are one."""
    return sorted({HUMAN if is_person(row["judge"]) else row["judge"] for row in rows})


def _kind(file: Path) -> str | None:
    row: dict[str, object] = {} if file.suffix == ".csv" else next((row for row, _ in json_rows(file)), {})
    if file.suffix == ".csv" or {"verdict", "first_score", "answer1_id"} & row.keys():
        return "ratings"
    return "answers" if {"answer", "generation", "answer_id"} & row.keys() else None


def _answer_rows(file: Path, questions: dict[str, Question]) -> list[dict[str, Any]]:
    answers: list[Answer] = read_answers(file, questions)
    rows = [row for row, _ in json_rows(file)]
    return [asdict(answer) | _other_fields(row) for answer, row in zip(answers, rows, strict=True)]


def _rating_rows(file: Path, known: AnswerFiles) -> list[tuple[Judgment | ScoredPair, dict[str, Any]]]:
    ratings = read_ratings(file, known)
    rows = [{} for _ in ratings] if file.suffix == ".csv" else [row for row, _ in json_rows(file)]
    return [
        (rating, asdict(rating) | _other_fields(row, *WRITTEN_BY_JUDGES))
        for rating, row in zip(ratings, rows, strict=True)
    ]


def _other_fields(row: dict[str, object], *written: str) -> dict[str, Any]:
    """Return fields that are not of the layout, without what is private; what a judge has `written` is left alone."""
    others = {name: value for name, value in row.items() if name not in (*OF_THE_LAYOUT, *WRITTEN_BY_JUDGES)}
    texts = {name: row[name] for name in written if name in row}
    return {**public(others), **texts}


def _latest(
    ratings: Iterable[tuple[Judgment | ScoredPair, dict[str, Any]]],
) -> list[tuple[Judgment | ScoredPair, dict[str, Any]]]:
    kept = {(type(its), its.judge, its.question, its.first, its.second): (its, row) for its, row in ratings}
    return list(kept.values())


def _by_name(folder: Path, field: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows into one file a name in `field`, in the order of questions."""
    for name in sorted({slug(row[field]) for row in rows}):
        its = [row for row in rows if slug(row[field]) == name]
        write_json_lines(folder / f"{name}.jsonl", sorted(its, key=lambda row: str(row["question"])))


def _settings(folder: RunFolder) -> dict[str, Any]:
    environment = folder.environment() or {}
    kept = {name: environment.get(name) for name in ("packages", "python", "git_commit", "command")}
    config = folder.config()
    paths = paths_in(asdict(config))
    return {"config": public(of_the_result(config), paths), "environment": public(kept, paths)}


def _evaluation(folder: Path) -> dict[str, Any]:
    """Return an evaluation's settings and result; None of one that was interrupted, of which there may be answers."""
    result = folder / "result.json"
    return {
        "config": public(OmegaConf.to_container(OmegaConf.load(folder / CONFIG))),
        "result": public(read_json(result)) if result.is_file() else None,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m qlora_lab.release", description="Write a study's evidence.")
    parser.add_argument("out", type=Path, help="the folder to write; with --verify, to check")
    parser.add_argument("sources", nargs="*", type=Path, help="answers, ratings, run folders, folders of any of these")
    parser.add_argument("--questions", type=Path, help="file of the questions, where the answers do not tell them")
    parser.add_argument("--names", action="store_true", help="publish the names of people who judged")
    parser.add_argument("--verify", action="store_true", help="check that a folder is as it was released")
    options = parser.parse_args(arguments)
    run(lambda: _work(options, sys.argv[1:] if arguments is None else arguments))


def _work(options: argparse.Namespace, arguments: Sequence[str]) -> str:
    if options.verify:
        return verify(options.out)
    if not options.sources:
        raise DataError("a release needs answers, ratings or run folders to publish; name some")
    command = command_line("qlora_lab.release", arguments)
    write_release(options.out, options.sources, options.questions, names=options.names, command=command)
    return verify(options.out)


if __name__ == "__main__":
    main()
