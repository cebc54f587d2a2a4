"""What several test files build: a composed configuration without the command line."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from qlora_lab.config.command import PLUGINS, shipped
from qlora_lab.config.load import from_hydra
from qlora_lab.config.schema import RunConfig
from qlora_lab.sweep.axes import Axes
from qlora_lab.sweep.compose import Composer

TINY = ["model=tiny_random", "trainer.max_steps=3", "evaluation.rows=16", "tracking=none"]


@contextmanager
def hydra_on_conf(**schemas: type) -> Iterator[None]:
    """Compose from conf/; `schemas` are those of other commands than train and sweep, by the names in their files."""
    if str(PLUGINS) not in sys.path:
        sys.path.append(str(PLUGINS))
    GlobalHydra.instance().clear()
    for name, node in {"run_schema": RunConfig, **schemas}.items():
        ConfigStore.instance().store(name=name, node=node)
    with initialize_config_dir(str(shipped("conf")), version_base="1.3"):
        yield


def composed(*overrides: str) -> RunConfig:
    """Return what `python -m qlora_lab.train OVERRIDES` would run, unresolved.

    Hydra composes each choice of groups once, as for a study: a composition takes it a tenth of a second.
    """
    keys, _, values = zip(*(override.partition("=") for override in overrides), strict=True) if overrides else ((),) * 3
    with hydra_on_conf():
        if len(set(keys)) < len(keys) or any(key[0] in "+~" for key in keys):
            return from_hydra(compose("train", list(overrides)))
        composer = _composer(os.environ.get("QLORA_LAB_DATA"), Path.cwd())
        point = dict(zip(keys, values, strict=True))
        return deepcopy(composer(Axes({key: [value] for key, value in point.items()}, []), point))


@cache
def _composer(*_: object) -> Composer:
    """Return what remembers compositions; conf/ also reads a variable, and studies of the working directory."""
    return Composer(lambda overrides: compose("train", overrides), lambda key: (shipped("conf") / key).is_dir())


def tiny(runs_dir: Path, *overrides: str) -> RunConfig:
    """Return a configuration of a run that takes a second: random weights, three steps."""
    config = composed(*TINY, *overrides)
    return replace(config, paths=replace(config.paths, runs_dir=str(runs_dir), cache_dir=f"{runs_dir}/cache"))
