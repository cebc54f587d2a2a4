"""The numbers of a model that lies on this machine, out of its config.json; without transformers, for planning."""

import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from qlora_lab.config.families import FAMILIES, POSITION_OFFSET
from qlora_lab.config.schema import ArchitectureConfig, ModelConfig
from qlora_lab.errors import ConfigError

# What config.json calls each number, in the one model type or the other.
NAMES = {
    "hidden_size": ("hidden_size", "d_model", "n_embed"),
    "num_layers": ("num_hidden_layers", "num_layers", "n_layers", "n_layer"),
    "num_heads": ("num_attention_heads", "num_heads", "n_heads", "n_head"),
    "feed_forward_size": ("intermediate_size", "d_ff", "ffn_dim"),
    "vocab_size": ("vocab_size",),
    "max_position": ("max_position_embeddings", "max_seq_len"),
    "num_decoder_layers": ("num_decoder_layers",),
    "head_size": ("head_dim", "d_kv"),
    "embedding_size": ("word_embed_proj_dim",),
    "norm_first": ("do_layer_norm_before",),
}
# Model types whose head is apart where config.json does not say; elsewhere it is the embeddings then.
APART = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox")


def architecture_on_disk(model: ModelConfig) -> ArchitectureConfig | None:
    """Return the numbers of a model in a folder, or in the hub's cache; None where they are not there or not enough."""
    try:
        file = Path(model.path or "") / "config.json" if model.source == "folder" else _in_hub_cache(model)
        if file is None:
            return None
        status = file.stat()
        return _architecture_in(file, status.st_size, status.st_mtime_ns)
    except (OSError, RuntimeError):  # not there, or not ours to read; or in the home of nobody
        return None


@lru_cache
def _architecture_in(file: Path, size: int, changed_ns: int) -> ArchitectureConfig | None:
    """Read a config.json once for all the runs of a plan; its size and time tell a file that was written again."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return architecture_of(found)
    except (ValueError, TypeError, AttributeError, ConfigError):  # loading the model says what is wrong with it
        return None


def architecture_of(found: Mapping[str, Any]) -> ArchitectureConfig | None:
    """Return the numbers in what a config.json holds; None for a model type whose layers are not known.

    Raises:
        ConfigError: numbers that cannot be.
    """
    model_type = found.get("model_type")
    if model_type not in FAMILIES:
        return None
    if model_type == "t5" and not str(found.get("feed_forward_proj")).startswith("gated"):  # T5 before 1.1
        return None
    numbers = {
        name: next((found[key] for key in keys if found.get(key) is not None), None) for name, keys in NAMES.items()
    }
    if model_type in ("bloom", "mpt") and numbers["hidden_size"] is not None:
        numbers["feed_forward_size"] = int(found.get("expansion_ratio", 4)) * numbers["hidden_size"]
    if model_type == "roberta" and numbers["max_position"] is not None:
        numbers["max_position"] -= POSITION_OFFSET
    numbers["num_kv_heads"] = found.get("num_key_value_heads") or numbers["num_heads"]
    # transformers 5 calls every T5 model tied, and keeps the truth in the second key
    tied = found.get("scale_decoder_outputs", found.get("tie_word_embeddings", model_type not in APART))
    said = {name: value for name, value in numbers.items() if value is not None}
    needed = ("hidden_size", "num_layers", "num_heads", "feed_forward_size", "vocab_size")
    if not all(name in said for name in needed):
        return None
    return ArchitectureConfig(model_type, **said, tie_embeddings=bool(tied))


def _in_hub_cache(model: ModelConfig) -> Path | None:
    """Return the config.json that the hub's cache has of a model at its revision, by the layout of that cache."""
    if model.source != "hub" or not model.hub_id:
        return None
    repository = _hub_cache() / f"models--{model.hub_id.replace('/', '--')}"
    revision = model.revision or "main"
    reference = repository / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    return repository / "snapshots" / commit / "config.json"


def _hub_cache() -> Path:
    """Return the hub's cache; the variables count as in huggingface_hub/constants.py."""
    given = os.environ.get
    home = given("HF_HOME", str(Path(given("XDG_CACHE_HOME", "~/.cache")) / "huggingface"))
    cache = given("HUGGINGFACE_HUB_CACHE", str(Path(_expanded(home)) / "hub"))
    return Path(_expanded(given("HF_HUB_CACHE", cache)))


def _expanded(path: str) -> str:
    return os.path.expandvars(Path(path).expanduser())
