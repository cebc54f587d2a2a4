"""One (source, target) pair, and the names of its content that keep training and evaluation apart."""

import hashlib
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

KEY_HEX_DIGITS = 16  # 64 bits: two of 15 million rows collide with a chance of 1 in 100,000
FIELD_SEPARATOR = "\x1f"  # a control character that normalised text cannot hold

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    text: str


def normalise(text: str) -> str:
    """Return the text as it is compared: NFKC, no case, runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def content_key(*texts: str) -> str:
    """Return a short SHA-256 of the normalised texts; equal content has an equal key in every file."""
    joined = FIELD_SEPARATOR.join(normalise(text) for text in texts)
    return hashlib.sha256(joined.encode()).hexdigest()[:KEY_HEX_DIGITS]


@dataclass(frozen=True)
class Row:
    """A pair to train on or to score.

    Attributes:
        source: what the model is given; empty for a text that is trained on as a whole.
        target: what it should answer.
        family: rows of one family can swap answers and stay well-formed; None: all rows are one family.
        asked: what the user asked, free of a template's wording, where that is not `source`. It lets the
            same question be recognised in a prompt, in a chat turn and inside a whole dialogue.
        language: its code, such as "en", where the data say it.
        history: the turns of a conversation before `source`, which is then the user's latest.
    """

    source: str
    target: str
    family: str | None = None
    asked: str | None = None
    language: str | None = None
    history: tuple[Turn, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """What is read or written: the turns before, source and target."""
        return (*(turn.text for turn in self.history), self.source, self.target)

    @cached_property
    def key(self) -> str:
        """Name of the whole pair."""
        return content_key(*(part for turn in self.history for part in turn), self.source, self.target)

    @cached_property
    def source_key(self) -> str:
        """Name of the question alone; the target's where there is no question."""
        return content_key(self.asked or self.source or self.target)
