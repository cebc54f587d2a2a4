"""What each metric is called, its unit, how it is written, and how held-out rows make it."""

import math
from dataclasses import dataclass

BITS_PER_NAT = 1 / math.log(2)


@dataclass(frozen=True)
class Metric:
    """A metric's place in tables and figures.

    `numerator` and `denominator` are columns of `load_rows`; the metric of a set is the sum of one over the sum of the
    other, times `row_scale`. Both None: no rows stand behind the metric.
    """

    name: str
    short: str  # a column heading
    unit: str  # of a value: "nats per token"
    difference_unit: str  # of a difference: "nats"
    kind: str = "number"  # number | share | count | seconds | bytes
    decimals: int = 3
    numerator: str | None = None
    denominator: str | None = None
    row_scale: float = 1.0


BY_LAST_NAME = {
    "loss": ("loss", "nats per token", "nats", "number", 3, "loss_sum", "target_tokens", 1.0),
    "bits_per_byte": (
        "bits/byte",
        "bits per byte",
        "bits per byte",
        "number",
        3,
        "loss_sum",
        "target_bytes",
        BITS_PER_NAT,
    ),
    "exact_match": ("exact", "share of rows", "percentage points", "share", 1, "exact_match", "rows", 1.0),
    "perplexity": ("perplexity", "perplexity", "", "number", 2, None, None, 1.0),
    "tokens": ("tokens", "tokens", "tokens", "count", 0, None, None, 1.0),
    "target_tokens": ("targets", "target tokens", "tokens", "count", 0, None, None, 1.0),
    "rows_seen": ("rows seen", "rows", "rows", "count", 0, None, None, 1.0),
    "epochs": ("epochs", "epochs", "epochs", "number", 2, None, None, 1.0),
    "steps": ("steps", "steps", "steps", "count", 0, None, None, 1.0),
    "time_s": ("time", "seconds", "s", "seconds", 0, None, None, 1.0),
    "peak_rss_bytes": ("memory", "bytes", "bytes", "bytes", 0, None, None, 1.0),
    "peak_cuda_bytes": ("GPU memory", "bytes", "bytes", "bytes", 0, None, None, 1.0),
}


def describe(name: str) -> Metric:
    """Return what is known of a metric by its last name: `eval/loss` and `eval/held_out/loss` are both a loss."""
    last = name.rsplit("/", 1)[-1]
    if last not in BY_LAST_NAME:
        return Metric(name=name, short=last, unit="", difference_unit="")
    short, unit, difference_unit, kind, decimals, numerator, denominator, scale = BY_LAST_NAME[last]
    if not name.startswith("eval/"):  # training has no rows
        numerator = denominator = None
    if last == "time_s":
        short = {"train/time_s": "training", "eval/time_s": "scoring"}.get(name, short)
    parts = name.split("/")
    if len(parts) > 2:
        short = f"{'/'.join(parts[1:-1])} {short}"
    return Metric(name, short, unit, difference_unit, kind, decimals, numerator, denominator, scale)


def counted_in(name: str) -> tuple[str, ...]:
    """Return the columns of `load_rows` in which two runs must agree on a row for the metric to mean the same.

    A loss a token differs with the tokenizer alone, and a loss of any kind where targets are cut elsewhere.
    """
    by_denominator = {"target_tokens": ("target_tokens", "target_bytes"), "target_bytes": ("target_bytes",)}
    return by_denominator.get(describe(name).denominator or "", ())


def format_value(metric: Metric, value: float) -> str:
    """Write one value as a person reads it: 0.433, 45.8 %, 7,217, 3 min 20 s, 1.2 GB; a missing one is a dash."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return str(value)
    if metric.kind == "share":
        return f"{100 * value:.{metric.decimals}f} %"
    if metric.kind == "count":
        return f"{value:,.0f}"
    if metric.kind == "seconds":
        return format_seconds(value)
    if metric.kind == "bytes":
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
    # a metric that is not known may have any size
    return f"{value:.{metric.decimals}f}" if metric.unit else f"{value:.4g}"


def format_seconds(seconds: float) -> str:
    """Write a duration: 0.4 s, 46 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {rest:02d} s"


def format_differences(metric: Metric, values: list[float], half_width: float) -> list[str]:
    """Write a difference and its bounds with as many decimals as two digits of the interval's half width need."""
    scale = 100.0 if metric.kind == "share" else 1.0
    decimals = 2
    if math.isfinite(half_width) and half_width > 0:
        decimals = min(6, max(0, 1 - math.floor(math.log10(half_width * scale))))
    return [f"{round(value * scale, decimals) + 0.0:,.{decimals}f}" for value in values]
