"""Training rows that hold a run of words of an evaluation row.

Questions of evaluation sets that are asked again as a whole are found by their key (`held_out.overlap`), however short
they are; here are rows that quote a part. Both texts are normalised, and their punctuation is left out. Benchmarks and
further sets are texts of any columns: also short ones of theirs are found where a row asks nothing else.

Source: Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C (13 words).
"""

import hashlib
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from qlora_lab.data.rows import Row, content_key, normalise

WORD = re.compile(r"\w+")
FEWEST_WORDS = 4  # of a text that is compared as a whole: answers and names of subjects are shorter
HASH_BYTES = 8  # of 100 million runs and as many words of a pool, one pair collides with a chance of 1 in 1,800
Texts = Mapping[str, Iterable[str]]  # by the name of their set


def word_runs(text: str, length: int) -> Iterator[int]:
    """Yield a hash of every run of `length` words of a text; of a shorter one none."""
    words = WORD.findall(normalise(text))
    for start in range(len(words) - length + 1):
        run = " ".join(words[start : start + length])
        yield int.from_bytes(hashlib.blake2b(run.encode(), digest_size=HASH_BYTES).digest())


class EvaluationText:
    """The runs of words of the evaluation sets, in eight bytes each.

    Args:
        words: in a run.
        others: texts of benchmarks and further sets, each read once.
    """

    def __init__(self, held_out: Mapping[str, Sequence[Row]], words: int, others: Texts | None = None) -> None:
        self._words = words
        runs: dict[str, array[int]] = {}
        whole: dict[str, array[int]] = {}
        for name, rows in held_out.items():
            found = runs.setdefault(name, array("Q"))
            for row in rows:
                for text in row.texts:
                    found.extend(word_runs(text, words))
        for name, texts in (others or {}).items():
            found, asked = runs.setdefault(name, array("Q")), whole.setdefault(name, array("Q"))
            for text in texts:
                found.extend(word_runs(text, words))
                if len(WORD.findall(text)) >= FEWEST_WORDS:
                    asked.append(int(content_key(text), 16))
        self._runs = {name: np.unique(np.frombuffer(found, dtype=np.uint64)) for name, found in runs.items()}
        self._whole = {name: np.unique(np.frombuffer(asked, dtype=np.uint64)) for name, asked in whole.items()}

    def set_quoted_by(self, row: Row) -> str | None:
        """Return a set whose words a row has in a run, or whose text is all that it asks; None if there is none."""
        asked = np.array([int(row.source_key, 16)], dtype=np.uint64)
        runs = np.fromiter((run for text in row.texts for run in word_runs(text, self._words)), dtype=np.uint64)
        for hashes, sets in ((asked, self._whole), (runs, self._runs)):
            for name, known in sets.items():
                if _any_in(hashes, known):
                    return name
        return None


def _any_in(hashes: np.ndarray, known: np.ndarray) -> bool:
    """Say whether one of some hashes is among those in order."""
    if not len(known):
        return False
    places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    return bool((known[places] == hashes).any())
