"""Training rows that hold a run of words of an evaluation row.

Questions that are asked again as a whole are found by their key (`held_out.overlap`), however short they are; here are
rows that quote a part. Both texts are normalised, and their punctuation is left out.

Source: Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C (13 words).
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from qlora_lab.data.rows import Row, normalise

WORD = re.compile(r"\w+")


def word_runs(text: str, length: int) -> Iterator[str]:
    """Yield every run of `length` words of a text; of a shorter one none."""
    words = WORD.findall(normalise(text))
    return (" ".join(words[start : start + length]) for start in range(len(words) - length + 1))


class EvaluationText:
    """The runs of words of the evaluation sets.

    Args:
        words: in a run.
    """

    def __init__(self, held_out: Mapping[str, Sequence[Row]], words: int) -> None:
        self._words = words
        self._sets: dict[str, str] = {}
        for name, rows in held_out.items():
            for row in rows:
                for text in (row.source, row.target):
                    self._sets.update(dict.fromkeys(word_runs(text, words), name))

    def set_quoted_by(self, row: Row) -> str | None:
        """Return an evaluation set whose words a row has in a run; None if there is none."""
        for text in (row.source, row.target):
            for run in word_runs(text, self._words):
                if run in self._sets:
                    return self._sets[run]
        return None
