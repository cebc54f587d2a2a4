"""The benchmarks there are, and the names of what each reports; what they do is in qlora_lab.evaluation.benchmarks.

A metric is named eval/<benchmark>/<split>/<metric>, where <benchmark> is its name in evaluation.benchmarks. Those that
ask questions say before <metric> how many worked examples stand before each: eval/mmlu/test/5shot/hendrycks_micro. A
split of which evaluation.benchmarks.<benchmark>.rows takes a part says so: validation_500rows.
"""

import re

GLUE = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
CROWS_CATEGORIES = (
    "age",
    "disability",
    "gender",
    "nationality",
    "physical-appearance",
    "race-color",
    "religion",
    "sexual-orientation",
    "socioeconomic",
)
CROWS_METRICS = ("pct_stereotype", "pct_stereotype_low", "pct_stereotype_high", "likelihood_diff", "pairs")
NORMALISED = ("acc", "acc_norm", "acc_bytes", "questions")
GLUE_METRICS = {
    **{f"glue_{task}": ("acc", "unreadable", "texts") for task in ("sst2", "mnli", "qnli", "rte", "wnli")},
    **{f"glue_{task}": ("acc", "f1", "unreadable", "texts") for task in ("mrpc", "qqp")},
    "glue_cola": ("matthews", "acc", "unreadable", "texts"),
    "glue_stsb": ("pearson", "spearman", "unreadable", "texts"),
}
METRICS: dict[str, tuple[str, ...]] = {
    "mmlu": (
        "hendrycks_micro",
        "qlora_macro",
        "questions",
        "questions_with_fewer_shots",
        "questions_without_shared_prefix",
        "tokens",
    ),
    "hellaswag": NORMALISED,
    "piqa": NORMALISED,
    "arc": NORMALISED,
    "winogrande": ("acc", "questions"),
    "crows_pairs": (
        *CROWS_METRICS,
        *(f"{category}/{metric}" for category in CROWS_CATEGORIES for metric in CROWS_METRICS),
    ),
    "perplexity": ("perplexity", "bits_per_byte", "loss", "tokens", "bytes", "documents"),
    "natural_instructions": ("rouge_l", "exact_match", "prompts"),
    **GLUE_METRICS,
}
QUESTIONS = ("mmlu", "hellaswag", "piqa", "arc", "winogrande")  # may have worked examples before them


def metric_prefix(name: str, task: str, split: str, rows: int | None, shots: int) -> str:
    """Return what stands before the last part of a benchmark's metrics.

    Example:
        >>> metric_prefix("mmlu", "mmlu", "validation", 500, 5)
        'eval/mmlu/validation_500rows/5shot'
    """
    part = re.sub(r"[^\w.-]+", "_", split) + (f"_{rows}rows" if rows is not None else "")
    return f"eval/{name}/{part}" + (f"/{shots}shot" if task in QUESTIONS else "")
