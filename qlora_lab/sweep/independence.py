"""Which groups Hydra can compose one option at a time, because no option of theirs reaches beyond its own key.

Where each option of a group writes under the group's key alone and no choice anywhere depends on another, what is
composed under that key depends on the option alone: 160 combinations of four groups are then some twenty compositions.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, OmegaConf

LOCAL = "file"  # the scheme of folders whose files we can look at
HYDRAS_OWN = ("hydra", "main", "schema")  # Hydra's own files, and configurations that were registered in Python


def independent_groups(loader: ConfigLoader, config: DictConfig) -> Callable[[str, list[str]], bool]:
    """Return the test of a group's key and options for `Composer`.

    Args:
        config: what the loader composed for the whole study.
    """
    repository = loader.repository  # type: ignore[attr-defined]
    whole = _choices_are_plain(repository, config)

    def is_independent(key: str, options: list[str]) -> bool:
        if not whole or "/" in key or "@" in key:
            return False
        loaded = [repository.load_config(f"{key}/{option}") for option in options]
        return all(each is not None and _stays_inside(each, key) for each in loaded)

    return is_independent


def study_files(loader: ConfigLoader, config: DictConfig) -> list[Path] | None:
    """Return the configuration files that the loader may read; None where it also reads others' packages."""
    folders: list[Path] = []
    for source in loader.get_sources():
        if source.scheme() == LOCAL:
            folders.append(Path(source.path))
        elif source.provider not in HYDRAS_OWN and source.scheme() != "structured":
            return None
    if OmegaConf.select(config, "hydra.searchpath"):
        return None
    return [file for folder in folders for file in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")])]


def _choices_are_plain(repository: Any, config: DictConfig) -> bool:
    """Say whether no defaults list names a choice by `${...}`, so that none depends on another."""
    files = study_files(repository, config)
    return files is not None and not any("${" in str(_defaults(file)) for file in files)


def _defaults(file: Path) -> object:
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError:
        return "${"  # Hydra is to say what is wrong with it, if it is used
    return content.get("defaults") if isinstance(content, dict) else None


def _stays_inside(option: Any, key: str) -> bool:
    """Say whether an option's file goes where its group stands, and chooses nothing."""
    chooses = [each for each in option.defaults_list or [] if not each.is_self()]
    return not chooses and option.header.get("package") in (None, "_group_", key)
