"""Whether an answer to a probe is right, by rules that can be stated in a line."""

import re
from dataclasses import dataclass

from qlora_lab.data.rows import SYSTEM, Turn

WORD = re.compile(r"\d+\.\d+|[^\W_]+(?:'[^\W_]+)*")  # quotes and the underscores of Markdown stand around words


@dataclass(frozen=True)
class Probe:
    """A prompt with a rule.

    An answer is right that has at least one of the words of `has`, where there are any, and none of `lacks`. Case and
    what stands between words do not count, nor do commas inside numbers; a word is found as a whole word.

    Attributes:
        name: its id.
        system: a system's turn before the prompt; "" for none.
    """

    name: str
    category: str
    prompt: str
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    system: str = ""

    @property
    def history(self) -> tuple[Turn, ...]:
        return (Turn(SYSTEM, self.system),) if self.system else ()

    def is_right(self, answer: str) -> bool:
        """Say whether an answer keeps the rule; one that is empty never does."""
        words = _words(answer)
        if not words.strip():
            return False
        has = not self.has or any(_words(word) in words for word in self.has)
        return has and not any(_words(word) in words for word in self.lacks)


def _words(text: str) -> str:
    """Return the words of a text, each with a space before and after it."""
    plain = text.casefold().replace("’", "'")
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", plain)
    return " " + " ".join(WORD.findall(plain)) + " "
