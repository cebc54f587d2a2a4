"""Made-up judgments."""

import numpy as np

from qlora_lab.ratings.judgments import FIRST, SECOND, TIE, Judgment

STRENGTHS = {"good": 1.0, "fair": 0.2, "poor": -1.2}  # log odds


def played(questions: int = 40, *, first_advantage: float = 0.0, ties: float = 0.1, seed: int = 0) -> list[Judgment]:
    """Return judgments of every ordered pair on every question, by a judge who prefers what is shown first so much."""
    generator = np.random.default_rng(seed)
    judgments = []
    for question in range(questions):
        for first, its in STRENGTHS.items():
            for second, others in STRENGTHS.items():
                if first != second:
                    wins = generator.random() < 1 / (1 + np.exp(others - its - first_advantage))
                    verdict = TIE if generator.random() < ties else FIRST if wins else SECOND
                    judgments.append(Judgment(str(question), first, second, verdict, "made up"))
    return judgments
