"""Self-written rows of multiple choice in the schemas of the hub sets."""

import random
from typing import Any

TEXT = "the cat sat on a warm mat and looked at two red birds near an old tree in winter"
WORDS = TEXT.split()


def words(rng: random.Random, most: int = 8) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(2, most)))


def hellaswag_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "activity_label": f"Task {number}",
            "ctx_a": f"[header] {words(rng)} [title] {words(rng)}.",
            "ctx_b": words(rng),
            "endings": [f"[step] {words(rng)}  é." for _ in range(4)],
            "label": str(rng.randrange(4)),
        }
        for number in range(count)
    ]


def piqa_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {"goal": words(rng), "sol1": words(rng), "sol2": words(rng, 14), "label": rng.randrange(2)}
        for _ in range(count)
    ]


def arc_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        labels = rng.choice([list("ABCD"), list("1234"), list("ABC")])
        rows.append(
            {
                "id": f"item {number}",
                "question": f"{words(rng)}?",
                "choices": {"text": [words(rng) for _ in labels], "label": labels},
                "answerKey": rng.choice(labels),
            }
        )
    return rows


def winogrande_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "sentence": f"{words(rng)} because the _ {words(rng)}.",
            "option1": "cat",
            "option2": "old tree",
            "answer": rng.choice(["1", "2"]),
        }
        for _ in range(count)
    ]
