"""Super-NaturalInstructions (Wang et al. 2022): ROUGE-L and exact match of what a model writes, greedily.

Rows that ask the same are one prompt with several references, of which the best match counts. Both metrics are those
of Tk-Instruct's evaluation, from 0 to 1: ROUGE-L with stemming, through the package rouge-score; exact match after
case, punctuation and extra white space are dropped. ROUGE-L's words are those of English.
"""

import string
from collections.abc import Callable
from functools import partial
from typing import Any

from qlora_lab.config.schema import BenchmarkConfig
from qlora_lab.data.templates import natural_instructions as to_rows
from qlora_lab.errors import ConfigError
from qlora_lab.evaluation.benchmarks.answers import first_row, prompts_of, written_answers
from qlora_lab.evaluation.benchmarks.examinee import Examinee
from qlora_lab.evaluation.benchmarks.items import BenchmarkScores, ItemReader, Ready, spread
from qlora_lab.evaluation.benchmarks.likelihood import Advance

WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def natural_instructions(examinee: Examinee, config: BenchmarkConfig, reader: ItemReader) -> Ready:
    """Make every prompt ready.

    Raises:
        ConfigError: the package rouge-score is missing.
        DataError: rows of another schema, or a prompt that does not fit.
    """
    rouge_l = rouge_l_scorer()
    read = reader.read(config, partial(first_row, to_rows))
    references: dict[str, list[str]] = {}
    for row in read:
        references.setdefault(row.source, []).append(row.target)
    first = {row.source: row for row in reversed(read)}  # of the rows that ask the same
    rows = spread([first[source] for source in references], config.rows)
    prompts = prompts_of(examinee, config, reader.place, rows)

    def score(advance: Advance) -> BenchmarkScores:
        answers = written_answers(examinee, config, prompts, advance)
        items: list[dict[str, Any]] = [
            {
                "item": number,
                "family": row.family,
                "references": references[row.source],
                "answer": answer.text,
                "stop_reason": answer.stop_reason,
                "rouge_l": max(rouge_l(reference, answer.text) for reference in references[row.source]),
                "exact_match": any(same(reference, answer.text) for reference in references[row.source]),
            }
            for (number, row), answer in zip(rows.items(), answers, strict=True)
        ]
        means = {name: sum(item[name] for item in items) / len(items) for name in ("rouge_l", "exact_match")}
        return BenchmarkScores({**means, "prompts": len(items)}, items)

    return Ready(len(prompts), score)


def rouge_l_scorer() -> Callable[[str, str], float]:
    """Return a function from a reference and an answer to the F1 of their longest common subsequence of words.

    Raises:
        ConfigError: the package rouge-score is missing.
    """
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise ConfigError(
            "ROUGE-L needs the package rouge-score; install it with pip install 'qlora_lab[evaluation]'"
        ) from error
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    return lambda reference, answer: float(scorer.score(reference, answer)["rougeL"].fmeasure)


def same(reference: str, answer: str) -> bool:
    return _normalised(reference) == _normalised(answer)


def _normalised(text: str) -> str:
    return " ".join(text.lower().translate(WITHOUT_PUNCTUATION).split())
