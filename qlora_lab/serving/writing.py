"""One answer as it is written: which token comes next, what of its text can be shown, and when it ends."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qlora_lab.evaluation.generate import Stops
from qlora_lab.evaluation.sampling import nucleus_draw

STOP, LENGTH = "stop", "length"
UNFINISHED_CHARACTER = "\ufffd"


@dataclass(frozen=True)
class Choice:
    """How the tokens of an answer are chosen.

    Attributes:
        temperature: logits are divided by it; 0: always the likeliest token.
        top_p: the likeliest tokens that together have this probability are drawn from.
        seed: the same one draws the same answer, whatever it shares a batch with; None: another each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(eq=False)
class Writing:
    """An answer in the making.

    Attributes:
        stops: what ends it besides the end-of-sequence token; it is not part of the text.
        max_tokens: most tokens to write, the one that ends it included.
        token_ids: those written so far.
        text: what can be shown so far; it only grows.
        finish_reason: "stop" or "length" once it has ended.
    """

    tokenizer: PreTrainedTokenizerBase
    choice: Choice
    stops: Stops
    max_tokens: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        seed = secrets.randbits(48) if self.choice.seed is None else self.choice.seed
        self._generator = torch.Generator().manual_seed(seed)
        self._ends = {self.tokenizer.eos_token_id, *self.stops.token_ids}
        self._held = ""  # decoded, but perhaps the beginning of a stop
        self._decoded_from = self._decoded_to = 0

    def uniform(self) -> float:
        """Draw the number that decides about the next token."""
        return torch.rand((), generator=self._generator, dtype=torch.float64).item()

    def add(self, token: int) -> str:
        """Take the next token; return what it adds to the text that can be shown."""
        self.token_ids.append(token)
        ended = token in self._ends
        last = ended or len(self.token_ids) == self.max_tokens
        self._held += self._decoded(self.token_ids[:-1] if ended else self.token_ids, last=last)
        place = min((at for stop in self.stops.texts if (at := self._held.find(stop)) >= 0), default=None)
        if place is not None or last:
            self.finish_reason = STOP if ended or place is not None else LENGTH
        shown = self._held[:place] if self.finish_reason else self._held[: len(self._held) - self._doubtful()]
        self._held = self._held[len(shown) :]
        self.text += shown
        return shown

    def _decoded(self, token_ids: Sequence[int], *, last: bool) -> str:
        """Return the text that is new; a character of which bytes are missing waits, unless nothing follows.

        Tokens are decoded after those that gave text before, since some tokenizers drop a space at the beginning.
        Missing bytes show as a replacement character, or as nothing.
        """
        before = self._text_of(token_ids[self._decoded_from : self._decoded_to])
        text = self._text_of(token_ids[self._decoded_from :])
        if (text.endswith(UNFINISHED_CHARACTER) or text == before) and not last:
            return ""
        self._decoded_from, self._decoded_to = self._decoded_to, len(token_ids)
        return text[len(before) :]

    def _text_of(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _doubtful(self) -> int:
        """Return how many of the last characters could be the beginning of a stop."""
        lengths = (
            length
            for stop in self.stops.texts
            for length in range(min(len(stop) - 1, len(self._held)), 0, -1)
            if self._held.endswith(stop[:length])
        )
        return max(lengths, default=0)


def next_tokens(logits: Tensor, writings: Sequence[Writing]) -> list[int]:
    """Choose the next token of each answer.

    Args:
        logits: (answers, vocabulary).
    """
    tokens: list[int] = logits.argmax(dim=1).tolist()
    alike: dict[tuple[float, float], list[int]] = {}
    for row, writing in enumerate(writings):
        if writing.choice.temperature > 0:
            alike.setdefault((writing.choice.temperature, writing.choice.top_p), []).append(row)
    for (temperature, top_p), rows in alike.items():
        uniforms = torch.tensor([writings[row].uniform() for row in rows], dtype=torch.float64)
        drawn = nucleus_draw(logits[rows], uniforms, temperature=temperature, top_p=top_p)
        for row, token in zip(rows, drawn.tolist(), strict=True):
            tokens[row] = token
    return tokens
