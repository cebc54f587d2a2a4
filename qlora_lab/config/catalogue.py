"""The models of conf/model/ and data sets of conf/data/ by name, read without Hydra's tenth of a second for each."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_lab.config.command import shipped
from qlora_lab.config.schema import DataConfig, ModelConfig
from qlora_lab.errors import ConfigError, unknown_name

HERE = "@_here_"  # what a file of a size writes after the file of its family


def model_names() -> list[str]:
    """Return the names that model= takes, in alphabetical order."""
    return names_in("model")


def names_in(group: str) -> list[str]:
    """Return the names that a group of conf/ takes, in alphabetical order."""
    return sorted(file.name.removesuffix(".yaml") for file in _folder(group).glob("*.yaml"))


def model_named(name: str) -> ModelConfig:
    """Return what model=NAME composes to.

    Raises:
        ConfigError: there is no such model, or it needs a path or a hub id to be complete.
    """
    if name not in model_names():
        raise ConfigError(unknown_name("model", name, model_names()))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), _merged("model", name))
    except OmegaConfBaseException as error:
        raise ConfigError(f"conf/model/{name}.yaml: {str(error).splitlines()[0]}") from error
    config = OmegaConf.to_object(merged)
    assert isinstance(config, ModelConfig)
    return config


def described_models() -> list[ModelConfig]:
    """Return every model of conf/model/ that says its numbers."""
    return [model_named(name) for name in model_names() if "architecture" in _merged("model", name)]


def data_sets() -> dict[str, DictConfig]:
    """Return what each data=NAME composes to, by name; unchecked, since some need a path or a hub id to be complete."""
    schema = OmegaConf.structured(DataConfig)
    return {name: OmegaConf.merge(schema, _merged("data", name)) for name in names_in("data")}  # type: ignore[misc]


def _folder(group: str) -> Path:
    return shipped("conf") / group


def _merged(group: str, name: str) -> DictConfig:
    """Read a file with the files of its defaults list below it, as Hydra would."""
    node = OmegaConf.load(_folder(group) / f"{name}.yaml")
    assert isinstance(node, DictConfig)
    below = [entry.removesuffix(HERE) for entry in node.pop("defaults", []) if entry != "_self_"]
    merged = OmegaConf.merge(*(_merged(group, other) for other in below), node)
    assert isinstance(merged, DictConfig)
    return merged
