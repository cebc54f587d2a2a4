"""A run's id: a hash of everything that can change its result, and of nothing else."""

import hashlib
import json
from dataclasses import asdict
from typing import Any

from qlora_lab.config.schema import RunConfig

ID_LENGTH = 12  # hex digits; a collision among a million runs has a chance of 2e-3
# Whole groups, and single keys, that change where and how a run happens but not what comes out.
# Threads change rounding only; a resumed run keeps the number it started with.
NOT_IDENTITY = ("paths", "tracking", "launcher", "study", "sweep")
NOT_IDENTITY_KEYS = {"trainer": ("threads", "checkpoint_every_steps", "keep_checkpoints", "log_every_steps")}


def of_the_result(config: RunConfig) -> dict[str, Any]:
    """Return the groups and keys of a configuration that say what is run, not where and how."""
    values = {key: value for key, value in asdict(config).items() if key not in NOT_IDENTITY}
    for group, keys in NOT_IDENTITY_KEYS.items():
        values[group] = {key: value for key, value in values[group].items() if key not in keys}
    return values


def identity(config: RunConfig) -> dict[str, Any]:
    """Return what the id is a hash of: nothing that cannot change the result. `config` must be resolved."""
    values = of_the_result(config)
    del values["model"]["name"], values["data"]["name"]
    if config.quant.format == "none":
        values["quant"] = {"format": "none"}
    elif not config.quant.double_quant:
        del values["quant"]["double_quant_block_size"]
    if config.adapter.kind == "none":
        values["adapter"] = {"kind": "none"}
    if config.model.source == "random":
        for key in ("hub_id", "revision", "path", "wheel"):  # of the trained weights
            del values["model"][key]
    for source in (values["model"], values["data"]["source"], *values["evaluation"]["sets"].values()):
        if source["content_sha256"] is not None:
            del source["path"]  # the content counts, not where it lies
    return values


def run_id(config: RunConfig) -> str:
    """Return the run's id: 12 hex digits of SHA-256 over the canonical JSON of its identity."""
    canonical = json.dumps(identity(config), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:ID_LENGTH]
