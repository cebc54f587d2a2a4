"""Verdicts read from what judges write.

The protocol asks for a last line of 1, 2 or 3 (3 for a tie). Judges also write `[[A]]`, "I choose 3", or only a
sentence; what is read here is what states a choice, and anything else stays unread.
"""

import re

from qlora_lab.ratings.judgments import FIRST, SECOND, TIE

CODES = {"1": FIRST, "a": FIRST, "2": SECOND, "b": SECOND, "3": TIE, "c": TIE}
CODE_LINE = re.compile(r"^[\s*`\"'(\[]*([123])[\s*`\"')\].]*$")
BRACKETED = re.compile(r"\[\[\s*([abc123])\s*\]\]", re.IGNORECASE)
CHOSEN = re.compile(
    r"\b(?:choose|choice(?: is)?|chosen|verdict(?: is)?|answer is|select|pick|rating(?: is)?|decision(?: is)?)\s*:?\s*"
    r"(?:(?:option|number|assistant|answer)\s*)?[\"'*(\[]*([123])\b",
    re.IGNORECASE,
)
BETTER = re.compile(
    r"\b(?:assistant|answer|ai)\s*(1|2|a|b)(?:'s (?:answer|response))?\s+(?:is|was|gives|gave|provides|provided)\s+"
    r"(?:the\s+|a\s+)?(?:clearly\s+|slightly\s+|overall\s+|much\s+)?(?:better|superior|best)\b",
    re.IGNORECASE,
)
EQUAL = re.compile(
    r"\b(?:cannot choose between|equally (?:good|bad|helpful|correct|incorrect|well)|equivalent in"
    r"|(?:both|the two)(?: \w+){0,3} are (?:equal|equivalent|tied)|it is a tie|a draw)\b",
    re.IGNORECASE,
)


def three_class_verdict(text: str) -> str | None:
    """Return first, second or tie as a judge's text states it; None where it states none, or two.

    In this order: a last line that is a code, a bracketed code, a sentence that chooses a number, a sentence of the
    last paragraph that calls one answer better or both equal.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    line = CODE_LINE.match(lines[-1])
    if line:
        return CODES[line[1]]
    for pattern in (BRACKETED, CHOSEN):
        found = [CODES[code.lower()] for code in pattern.findall(text)]
        if found:
            return found[-1]
    stated = {CODES[code.lower()] for code in BETTER.findall(lines[-1])}
    if EQUAL.search(lines[-1]):
        stated.add(TIE)
    return stated.pop() if len(stated) == 1 else None
