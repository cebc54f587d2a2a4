"""A run's id: a hash of everything that can change its result, and of nothing else.

Threads and the micro-batch are not in it. They change how sums are rounded (with dropout, the micro-batch also which
elements are dropped), and they follow from how much of which machine a run gets: with them in the id, the same study
planned for another card would be other runs, and making one run fit would do all others again. A run that is resumed
keeps those it started with, so that it ends with the same bits; one that failed takes those it is now given.
"""

import hashlib
import json
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from qlora_lab.config.schema import RunConfig

ID_LENGTH = 12  # hex digits; a collision among a million runs has a chance of 2e-3
# Whole groups, and single keys, that change where and how a run happens but not what comes out.
NOT_IDENTITY = ("paths", "tracking", "launcher", "study", "sweep")
NOT_IDENTITY_KEYS = {
    "trainer": (
        *("threads", "micro_batch_size", "offload_activations"),
        *("checkpoint_every_steps", "keep_checkpoints", "log_every_steps"),
    ),
    "evaluation": ("prompts", "harness"),  # answered later, by other commands
}
DESCRIPTIONS_OF_A_SOURCE = ("licence", "published_rows")
GROUPS = [field.name for field in fields(RunConfig) if field.name not in NOT_IDENTITY]


def of_the_result(config: RunConfig) -> dict[str, Any]:
    """Return the groups and keys of a configuration that say what is run, not where and how."""
    return {group: group_of_the_result(group, getattr(config, group)) for group in GROUPS}


def group_of_the_result(group: str, value: Any) -> Any:
    """Return one of the groups of `of_the_result`, as plain values."""
    if not is_dataclass(value) or isinstance(value, type):
        return value
    left_out = NOT_IDENTITY_KEYS.get(group, ())
    values = {key: item for key, item in asdict(value).items() if key not in left_out}
    for source in _sources(group, values):
        for key in DESCRIPTIONS_OF_A_SOURCE:
            source.pop(key, None)
    return values


def identity(config: RunConfig) -> dict[str, Any]:
    """Return what the id is a hash of: nothing that cannot change the result. `config` must be resolved."""
    return {group: _identity_of(group, getattr(config, group)) for group in GROUPS}


def _identity_of(group: str, value: Any) -> Any:
    values = group_of_the_result(group, value)
    if group in ("model", "data"):
        del values["name"]
    if group == "quant" and value.format == "none":
        return {"format": "none"}
    if group == "quant" and not value.double_quant:
        del values["double_quant_block_size"]
    if group == "adapter" and value.kind == "none":
        return {"kind": "none"}
    if group == "model" and value.source == "random":
        for key in ("hub_id", "revision", "path", "wheel"):  # of the trained weights
            del values[key]
    if group == "evaluation" and not value.benchmarks:
        del values["benchmarks"]  # runs without any keep the ids they had before there were benchmarks
    if group == "data" and not value.filter.contamination_sets:
        del values["filter"]["contamination_sets"]  # likewise
    for source in _sources(group, values):
        if source["content_sha256"] is not None:
            source.pop("path", None)  # the content counts, not where it lies
    return values


def _sources(group: str, values: Any) -> list[dict[str, Any]]:
    if group == "evaluation":
        benchmarks = list(values.get("benchmarks", {}).values())
        return [*values["sets"].values(), *benchmarks, *(each["examples"] for each in benchmarks if each["examples"])]
    if group == "data":
        compared = values["filter"].get("contamination_sets", {})
        return [values["source"], *values["mix"].values(), *compared.values()]
    return [values] if group == "model" else []


class RunIds:
    """Gives the id of each run of a plan; groups that runs share are written out once."""

    def __init__(self) -> None:
        self._texts: dict[tuple[str, int], tuple[Any, str]] = {}  # with the group, whose id() must stay its own

    def __call__(self, config: RunConfig) -> str:
        """Return the run's id: 12 hex digits of SHA-256 over the canonical JSON of its identity."""
        canonical = ",".join(f'"{group}":{self._text(group, getattr(config, group))}' for group in sorted(GROUPS))
        return hashlib.sha256(f"{{{canonical}}}".encode()).hexdigest()[:ID_LENGTH]

    def _text(self, group: str, value: Any) -> str:
        key = group, id(value)
        if key not in self._texts:
            values = _identity_of(group, value)
            text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
            self._texts[key] = value, text
        return self._texts[key][1]


def run_id(config: RunConfig) -> str:
    """Return the id of one run, as `RunIds` does."""
    return RunIds()(config)
