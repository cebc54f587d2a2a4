"""The models of conf/model/ by name, read without Hydra's tenth of a second for each."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qlora_lab.config.command import shipped
from qlora_lab.config.schema import ModelConfig
from qlora_lab.errors import ConfigError, unknown_name

HERE = "@_here_"  # what a file of a size writes after the file of its family


def model_names() -> list[str]:
    """Return the names that model= takes, in alphabetical order."""
    return sorted(file.name.removesuffix(".yaml") for file in _folder().glob("*.yaml"))


def model_named(name: str) -> ModelConfig:
    """Return what model=NAME composes to.

    Raises:
        ConfigError: there is no such model, or it needs a path or a hub id to be complete.
    """
    if name not in model_names():
        raise ConfigError(unknown_name("model", name, model_names()))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), _merged(_folder() / f"{name}.yaml"))
    except OmegaConfBaseException as error:
        raise ConfigError(f"conf/model/{name}.yaml: {str(error).splitlines()[0]}") from error
    config = OmegaConf.to_object(merged)
    assert isinstance(config, ModelConfig)
    return config


def described_models() -> list[ModelConfig]:
    """Return every model of conf/model/ that says its numbers."""
    with_numbers = [name for name in model_names() if "architecture" in _merged(_folder() / f"{name}.yaml")]
    return [model_named(name) for name in with_numbers]


def _folder() -> Path:
    return shipped("conf") / "model"


def _merged(file: Path) -> DictConfig:
    """Read a file with the file of its family below it, as Hydra would."""
    node = OmegaConf.load(file)
    assert isinstance(node, DictConfig)
    families = [entry.removesuffix(HERE) for entry in node.pop("defaults", []) if entry != "_self_"]
    merged = OmegaConf.merge(*(OmegaConf.load(_folder() / f"{family}.yaml") for family in families), node)
    assert isinstance(merged, DictConfig)
    return merged
