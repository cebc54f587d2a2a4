"""Which metrics the runs of a plan will report, so that a study that is decided by none of them is refused at once."""

from collections.abc import Iterable

from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import ConfigError, unknown_name

OF_A_SET = ("loss", "bits_per_byte", "target_tokens", "rows")
EXACT_MATCH = "exact_match"  # of sets whose targets are the only right answers
OF_TRAINING = ("tokens", "target_tokens", "steps", "rows_seen", "epochs", "time_s", "peak_rss_bytes")
OTHERS = ("eval/time_s", "run/time_s", "memory/peak_rss_bytes")
ON_CUDA = ("train/peak_cuda_bytes", "memory/peak_cuda_bytes")


def metric_names(config: RunConfig) -> list[str]:
    """Return the names in a finished run's result.json, for a resolved configuration."""
    sets = config.evaluation.sets
    of_sets = {f"eval/{name}": chosen.exact_match for name, chosen in sets.items()}
    # without sets of their own, runs are evaluated on rows held out of their data
    has_exact_match = {"eval": any(of_sets.values()) if sets else config.data.exact_match} | of_sets
    return [
        *(f"{place}/{EXACT_MATCH}" for place, has in has_exact_match.items() if has),
        *(f"{place}/{name}" for place in has_exact_match for name in OF_A_SET),
        *(metric for name, chosen in config.evaluation.benchmarks.items() for metric in chosen.metric_names(name)),
        *(f"train/{name}" for name in OF_TRAINING),
        *OTHERS,
        *(ON_CUDA if config.trainer.device == "cuda" else ()),
    ]


def check_metric(configs: Iterable[RunConfig]) -> None:
    """Refuse a study that is decided by a metric which none of its runs will report.

    Raises:
        ConfigError: with the nearest name that they will.
    """
    configs = list(configs)
    metric = configs[0].study.metric
    names = dict.fromkeys(name for config in configs for name in metric_names(config))
    if metric in names:
        return
    if metric.startswith("eval/") and metric.endswith(f"/{EXACT_MATCH}"):
        raise ConfigError(
            f"study.metric is '{metric}', but no run of the study reports it: data.exact_match (or that of "
            "evaluation.sets) is false; try study.metric=eval/loss, or set it where a target is the only right answer"
        )
    raise ConfigError(unknown_name("study.metric", metric, names))
