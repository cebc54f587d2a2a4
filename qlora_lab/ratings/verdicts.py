"""Verdicts and scores read from what judges write.

The protocol of verdicts asks for a last line of 1, 2 or 3 (3 for a tie), that of scores for two numbers from 1 to 10.
Judges also write `[[A]]`, "I choose 3", "Assistant 1: 8/10", or only a sentence; what is read here is what states a
choice, and anything else stays unread: no verdict is better than a wrong one.
"""

import re
from collections.abc import Iterator

from qlora_lab.ratings.judgments import FIRST, SECOND, TIE
from qlora_lab.ratings.scores import HIGHEST, LOWEST

CODES = {"1": FIRST, "a": FIRST, "2": SECOND, "b": SECOND, "3": TIE, "c": TIE}
OTHER = {FIRST: SECOND, SECOND: FIRST}
LAST_LINES = 4  # of a review, in which a judge sums up

AROUND = r"[\s*_`\"'“”‘’()\[\]{}<>#.:!-]*"
NAME = r"(?:assistant|assistente?|asistente|answer|antwort|respuesta|response|model|option|choice|candidate|ai)"
VERDICT_WORD = (
    r"(?:final |overall |my )*(?:verdict|choice|decision|answer|winner|rating|judge?ment|evaluation|conclusion)"
)
CODE_LINE = re.compile(
    rf"{AROUND}(?:{VERDICT_WORD}(?: is)?{AROUND})?(?:{NAME}{AROUND})?([123]|(?-i:[ABC]))\b{AROUND}", re.IGNORECASE
)
TIE_LINE = re.compile(
    rf"{AROUND}(?:{VERDICT_WORD}(?: is)?{AROUND})?"
    rf"(?:it(?:'s| is) )?(?:an? )?(?:tie|draw|equal|equivalent|both|neither){AROUND}",
    re.IGNORECASE,
)
BRACKETED = re.compile(r"\[\[\s*(?:assistant )?([abc123])\s*\]\]|\\boxed\{\s*([abc123])\s*\}", re.IGNORECASE)
CHOSEN = re.compile(
    r"\b(?:choose|choice(?: is)?|chosen|verdict(?: is)?|select|pick|decision(?: is)?)[\s:*_]*"
    r"(?:(?:the )?(?:option|number|code)\s*)?[\"'*(\[]*([123])\b(?!\s*(?:/|out of|\.\d))",
    re.IGNORECASE,
)

SUBJECT = rf"{NAME}{AROUND}([12]|(?-i:[AB]))\b(?:['’]s)?"
PREFERRED = re.compile(
    rf"\b(?:choose|prefer|pick|select|favou?r|go with|lean towards?|preference (?:is|goes to)|winner(?: is)?)\W+"
    rf"(?:for |to )?(?:the )?(?:(?:answer|response) (?:of|from|by) )?{SUBJECT}"
    rf"|\b(?:better|best|superior|preferred|stronger|mejor|beste) (?:of the two )?"
    r"(?:one |answer |response |choice |respuesta )*"
    rf"(?:overall )?(?:(?:is|was|es|ist|comes?|to be)\W+)*(?:that of |the one |la del |from |by )*{SUBJECT}"
    rf"|\b{SUBJECT} (?:clearly |narrowly )?(?:wins|won|performed better|performs better)\b",
    re.IGNORECASE,
)
# "More detailed" describes and is no choice: judges who end so mean a tie in one case of ten.
COMPARED = re.compile(
    rf"\b{SUBJECT}[^.;]{{0,120}}?making it (?:the |a )?(?:slightly |overall )?"
    r"(?:better|stronger|superior|best|preferable)\b"
    rf"|\b(?:rate|consider)\W+{SUBJECT}(?: as)? (?:slightly |being |the )*(?:more|higher)\b"
    rf"|\b{SUBJECT}(?P<between>[^.;]{{0,60}}?)\b"
    r"(?:better|superior|best|higher(?! level)|preferable|more helpful|mejor|besser)\b(?! balance)"
    rf"|\b{SUBJECT}(?P<middle>[^.;]{{0,40}}?)\b(?P<less>worse|inferior|less helpful|weaker|lower)\b",
    re.IGNORECASE,
)
NEGATED = re.compile(
    r"\b(?:not|neither|nor|no|while|although|though|but|than|and|or|may|might|could|if)\b|n't\b", re.IGNORECASE
)
EQUAL = re.compile(
    r"\b(?:(?:cannot|can't|can not|unable to|hard to|difficult to) (?:choose|decide|differentiate|distinguish|pick)"
    r"|(?:are|were|as|is|be|both) (?:\w+ ){0,3}?(?:equally|equivalent|equal|tied|identical|comparable)"
    r"|equally (?:good|bad|poor|helpful|correct|incorrect|well|valid|useful|satisfactory|unsatisfactory)"
    r"|equivalent (?:in|quality)"
    r"|(?:it is|it's|call it|end(?:s)? in|result(?:s)? in|consider (?:it|this)) a (?:tie|draw)"
    r"|neither (?:answer|response|assistant|of them|one)? ?(?:is|was) (?:\w+ )?(?:better|superior|best))\b",
    re.IGNORECASE,
)

NUMBER = r"(10(?:\.0+)?|[1-9](?:\.\d+)?)"
OF_TEN = r"(?:\s*(?:/|out of)\s*10(?:\.0)?)?"
PAIR_LINE = re.compile(
    rf"{AROUND}(?:scores?|ratings?)?{AROUND}(?:{NAME}\W*)?{NUMBER}{OF_TEN}(?:\s*[,;/|&]\s*|\s+and\s+|\s*-\s+|\s+)"
    rf"{NUMBER}{OF_TEN}{AROUND}",
    re.IGNORECASE,
)
BRACKETED_SCORES = re.compile(rf"\[\[\s*{NUMBER}{OF_TEN}\s*(?:,\s*{NUMBER}{OF_TEN}\s*)?\]\]")
LABELLED = re.compile(
    rf"\b{NAME}{AROUND}([12]|(?-i:[AB]))\b(?:['’]s)?{AROUND}"
    rf"(?:(?:answer|response|overall|score|rating|total|gets?|receives?|deserves?|earns?|is|as|of|a|an|with|rated?){AROUND})*"
    rf"{NUMBER}(?:\s*(?:/|out of)\s*(\d+))?(?!\d|\.\d|\s*(?:/|out of|%))",
    re.IGNORECASE,
)
CONCEDED = re.compile(r"\b(?:while|although|though)\b[^,.]*,", re.IGNORECASE)


def three_class_verdict(text: str) -> str | None:
    """Return first, second or tie as a judge's text states it; None where it states none, or two.

    In this order: a last line that is a code, a bracketed code, a sentence that chooses a number, overall scores of
    both, the last sentence that prefers one answer or calls both equal, a first line that is a code.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    ending = lines[-LAST_LINES:]
    return (
        _code(lines[-1])
        or _last_code(BRACKETED, text)
        or _last_code(CHOSEN, text)
        or _by_scores(ending)
        or _in_words(ending)
        or _code(lines[0])
    )


def two_scores(text: str) -> tuple[float, float] | None:
    """Return the scores from 1 to 10 of the answers shown first and second; None where a judge's text states none.

    Either a line of two numbers, the last line if it is one, else the first that is; or one number each after the
    answers' names.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    for line in (*lines[-1:], *lines[:-1]):
        pair = PAIR_LINE.fullmatch(line)
        if pair:
            return _within(pair[1], pair[2])
    bracketed = [number for found in BRACKETED_SCORES.findall(text) for number in found if number]
    if len(bracketed) == 2:
        return _within(*bracketed)
    labelled = _labelled_scores(text)
    return labelled[:2] if labelled is not None and labelled[2] in ("", "10") else None


def _code(line: str) -> str | None:
    found = CODE_LINE.fullmatch(line)
    if found:
        return CODES[found[1].lower()]
    return TIE if TIE_LINE.fullmatch(line) else None


def _last_code(pattern: re.Pattern[str], text: str) -> str | None:
    found = [match.group(match.lastindex or 0) for match in pattern.finditer(text)]
    return CODES[found[-1].lower()] if found else None


def _by_scores(lines: list[str]) -> str | None:
    scores = _labelled_scores("\n".join(lines))
    if scores is None:
        return None
    return TIE if scores[0] == scores[1] else FIRST if scores[0] > scores[1] else SECOND


def _in_words(lines: list[str]) -> str | None:
    """Return what the last sentence that states something states, if it is one thing."""
    for line in reversed(lines):
        for sentence in reversed(re.split(r"(?<=[.!?])\s+", line)):
            stated = set(_stated(sentence))
            if stated:
                return stated.pop() if len(stated) == 1 else None
    return None


def _stated(sentence: str) -> Iterator[str]:
    sentence = CONCEDED.sub("", sentence)
    preferred = [match.group(match.lastindex or 0) for match in PREFERRED.finditer(sentence)]
    if preferred:
        yield from (CODES[code.lower()] for code in preferred)
        return
    if EQUAL.search(sentence):
        yield TIE
    for match in COMPARED.finditer(sentence):
        code = next(group for group in match.groups() if group and group.lower() in CODES)
        if not NEGATED.search(match["between"] or match["middle"] or ""):
            subject = CODES[code.lower()]
            yield OTHER[subject] if match["less"] else subject


def _labelled_scores(text: str) -> tuple[float, float, str] | None:
    """Return the last number after each answer's name, and the best there is ("" where it is not said)."""
    found = {CODES[code.lower()]: (number, best) for code, number, best in LABELLED.findall(text)}
    if len(found) < 2 or found[FIRST][1] != found[SECOND][1]:
        return None
    return float(found[FIRST][0]), float(found[SECOND][0]), found[FIRST][1]


def _within(first: str, second: str) -> tuple[float, float] | None:
    scores = float(first), float(second)
    return scores if all(LOWEST <= score <= HIGHEST for score in scores) else None
