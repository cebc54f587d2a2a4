"""Files of ratings and answers, found and told apart: this project's layout, and that of the QLoRA study's release."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qlora_lab.errors import DataError, unknown_name
from qlora_lab.ratings.answers import Answer, Question, read_answers, read_questions
from qlora_lab.ratings.judgments import Judgment, RatingsWarning, json_rows, latest, read_judgments
from qlora_lab.ratings.released import (
    answer_systems,
    is_released,
    is_released_scores,
    read_released,
    read_released_scores,
)
from qlora_lab.ratings.released_people import read_people, text_key
from qlora_lab.ratings.scores import ScoredPair, latest_scores, read_scores


@dataclass(frozen=True)
class AnswerFiles:
    """Answers of systems, their questions by id, and the systems of the ids that the study's release gives answers."""

    answers: list[Answer] = field(default_factory=list)
    questions: dict[str, Question] = field(default_factory=dict)
    systems_of_ids: dict[str, set[str]] = field(default_factory=dict)

    def systems(self) -> list[str]:
        return sorted({answer.system for answer in self.answers})

    def lengths(self) -> dict[tuple[str, str], int]:
        """Return the number of characters of each answer, by system and question."""
        return {(answer.system, answer.question): len(answer.answer) for answer in self.answers}


@dataclass(frozen=True)
class RatingFiles:
    """Judgments and scores of pairs, of any number of judges; of what one judge said twice, the last."""

    judgments: list[Judgment]
    scores: list[ScoredPair]


def files_in(paths: Iterable[Path], *suffixes: str) -> list[Path]:
    """Return the files given, and those of the folders given that end so.

    Raises:
        DataError: a path does not exist, or a folder has no such file.
    """
    files: list[Path] = []
    for path in paths:
        found = sorted(file for file in path.glob("*") if file.suffix in suffixes) if path.is_dir() else [path]
        if not found:
            raise DataError(f"{path} must be a file, or a folder with {' or '.join(suffixes)} files; it has none")
        files += found
    return files


def load_answers(paths: Iterable[Path], questions: Path | None = None) -> AnswerFiles:
    """Read files and folders of answers, and the file of their questions where there is one.

    An answer that stands in two files is one.

    Raises:
        DataError: a file is missing or has a line that is no answer (names file and line), or a system answers a
            question otherwise in another file.
    """
    asked = {} if questions is None else read_questions(questions)
    files = files_in(paths, ".jsonl")
    found: dict[tuple[str, str], tuple[Answer, Path]] = {}
    for file in files:
        for answer in read_answers(file, asked):
            before, its_file = found.setdefault((answer.system, answer.question), (answer, file))
            if before.answer != answer.answer:
                raise DataError(
                    f"{answer.system} answers question {answer.question} otherwise in {its_file} than in {file}; give "
                    "only one of the files"
                )
    answers = [answer for answer, _ in found.values()]
    for answer in answers:
        if answer.prompt:
            asked.setdefault(answer.question, Question(answer.question, answer.category, answer.prompt))
    return AnswerFiles(answers, asked, answer_systems(files))


def load_ratings(paths: Iterable[Path], known: AnswerFiles) -> RatingFiles:
    """Read files and folders of judgments and scores.

    Args:
        known: the answers that were judged; without them, systems are taken as they come, and the order shown in the
            study's files as their names state it, with a RatingsWarning.

    Raises:
        DataError: a line is none, or of a system that has no answers (names the file), or two judges share a name.
    """
    files = files_in(paths, ".jsonl", ".csv")
    released = [file for file in files if is_released(file) or is_released_scores(file)]
    if released and not known.systems_of_ids:
        warnings.warn(
            f"the order shown in {len(released)} files of the release is taken from their names, which may state it "
            "backwards; give the answers that were judged with --answers",
            RatingsWarning,
            stacklevel=2,
        )
    judgments: list[Judgment] = []
    scores: list[ScoredPair] = []
    asked: dict[str, tuple[object, Path]] = {}
    for file in files:
        found = read_ratings(file, known)
        for judge, identity in _judges_in(file, found):
            before, its_file = asked.setdefault(judge, (identity, file))
            if before != identity:
                raise DataError(
                    f"{its_file} and {file} are of two judges that are both called {judge} (other models, endpoints or "
                    "sources); rate by them apart"
                )
        judgments += [rating for rating in found if isinstance(rating, Judgment)]
        scores += [rating for rating in found if isinstance(rating, ScoredPair)]
    return RatingFiles(latest(judgments), latest_scores(scores))


def read_ratings(file: Path, known: AnswerFiles) -> Sequence[Judgment | ScoredPair]:
    """Read one file of judgments or scores, line by line; see `load_ratings`.

    Raises:
        DataError: a line is none, or of a system that has no answers; names the file.
    """
    found: Sequence[Judgment | ScoredPair]
    if is_released(file):
        found = read_released(file, known.systems_of_ids)
    elif is_released_scores(file):
        found = read_released_scores(file, known.systems_of_ids)
    elif file.suffix == ".csv":
        found = read_people(file, {text_key(asked.prompt): asked.question for asked in known.questions.values()})
    else:
        found = read_scores(file) if _starts_with_scores(file) else read_judgments(file)
    _check_systems(found, known.systems(), file)
    return found


def _judges_in(file: Path, ratings: Sequence[Judgment | ScoredPair]) -> set[tuple[str, object]]:
    """Return the judges of a file by name, with what tells models of one name apart where the file says it."""
    if file.suffix == ".csv" or is_released(file) or is_released_scores(file):
        return {(rating.judge, None) for rating in ratings}
    return {(str(row["judge"]), row.get("judge_sha256")) for row, _ in json_rows(file)}


def _starts_with_scores(file: Path) -> bool:
    first: Mapping[str, object] = next((row for row, _ in json_rows(file)), {})
    return "first_score" in first


def _check_systems(ratings: Iterable[Judgment | ScoredPair], known: Sequence[str], file: Path) -> None:
    for rating in ratings:
        for system in (rating.first, rating.second) if known else ():
            if system not in known:
                raise DataError(unknown_name(f"{file}: a system", system, known) + ", of which there are answers")
