"""A run made ready before anything is loaded: nothing left open, and what needs no weights checked."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_lab.config import hardware
from qlora_lab.config.architecture import check_task, linear_layers
from qlora_lab.config.families import FAMILIES
from qlora_lab.config.placement import match_linears
from qlora_lab.config.resolve import resolve
from qlora_lab.config.schema import AUTO, RowsConfig, RunConfig, TrainerConfig
from qlora_lab.errors import ConfigError, ModelError, QloraLabError, unknown_name
from qlora_lab.runs.fingerprint import source_fingerprint
from qlora_lab.sweep.needs import Needs, what_counts
from qlora_lab.wheels import WHEELS, default_cache_dir, wheel_file

# What resolving and the checks of files look at; the placement of the adapter comes on top.
LOOKED_AT = ("model", "data", "trainer", "evaluation", "launcher", "paths")
Ids = tuple[int, ...]


class Preparer:
    """Prepares the runs of a plan; what runs share is resolved and checked once, and they go on sharing it.

    Args:
        machine: that plans.
        runs: that there are, as `Needs` takes it.
    """

    def __init__(self, machine: hardware.Hardware, runs: int = 1) -> None:
        self._machine = machine
        self._needs = Needs(machine, runs)
        # with the configuration itself, so that the ids of its groups stay its own
        self._resolved: dict[Ids, tuple[RunConfig, dict[str, Any] | QloraLabError]] = {}
        self._placed: dict[Ids, tuple[RunConfig, QloraLabError | None]] = {}
        self._chosen: dict[tuple[object, ...], tuple[RunConfig, TrainerConfig]] = {}
        self._equal: dict[tuple[str, str], Any] = {}

    def __call__(self, config: RunConfig) -> RunConfig:
        """Return what `prepare` returns.

        Raises:
            ConfigError, ModelError, DataError: as `prepare` does.
        """
        key = tuple(id(getattr(config, name)) for name in LOOKED_AT)
        if key not in self._resolved:
            self._resolved[key] = config, self._resolve(config)
        resolved = self._resolved[key][1]
        if isinstance(resolved, QloraLabError):
            raise resolved
        key = id(resolved["model"]), id(config.adapter)
        prepared = replace(config, **resolved)
        if key not in self._placed:
            self._placed[key] = prepared, _error_of(prepared)
        error = self._placed[key][1]
        if error is not None:
            raise error
        if prepared.trainer.micro_batch_size != AUTO and prepared.trainer.threads is not None:
            return prepared
        wanted = what_counts(prepared)
        if wanted not in self._chosen:
            trainer = self._trainer(prepared)
            self._chosen[wanted] = prepared, self._equal.setdefault(("trainer", repr(trainer)), trainer)
        return replace(prepared, trainer=self._chosen[wanted][1])

    def _trainer(self, config: RunConfig) -> TrainerConfig:
        """Return the settings of training with the micro-batch and the threads chosen, where they are left open."""
        chosen = self._needs.chosen(config)
        if chosen.trainer.threads is not None:
            return chosen.trainer
        return replace(chosen.trainer, threads=self._threads(chosen))

    def _threads(self, config: RunConfig) -> int:
        """Return a run's share of the cores: on SLURM of those a task asks for, not those of the machine that plans."""
        launcher = config.launcher
        if launcher.kind == "slurm":
            return max(1, launcher.slurm.cpus_per_run // launcher.runs_per_gpu)
        return max(1, self._machine.cores // self._needs.side_by_side(config))

    def _resolve(self, config: RunConfig) -> dict[str, Any] | QloraLabError:
        try:
            resolved = _resolve(config, self._machine)
        except QloraLabError as error:
            return error
        groups = {name: getattr(resolved, name) for name in LOOKED_AT}
        return {name: self._equal.setdefault((name, repr(value)), value) for name, value in groups.items()}


def prepare(config: RunConfig, machine: hardware.Hardware) -> RunConfig:
    """Resolve what is left open and check what needs no weights, before anything is loaded.

    Raises:
        ConfigError: the adapter matches no layer, or trainer.micro_batch_size=auto cannot be chosen.
        ModelError, DataError: the model or the data are not on this machine.
    """
    prepared = Preparer(machine)(config)
    check_device(prepared, machine)
    return prepared


def _error_of(config: RunConfig) -> QloraLabError | None:
    try:
        _check_placement(config)
    except QloraLabError as error:
        return error
    return None


def _resolve(config: RunConfig, machine: hardware.Hardware) -> RunConfig:
    data_dir = Path(config.paths.data_dir)
    resolved = resolve(config, machine, lambda source: source_fingerprint(source, data_dir))
    check_inputs(resolved)
    return resolved


def check_device(config: RunConfig, machine: hardware.Hardware) -> None:
    """Refuse to execute a run for a GPU where there is none; it may be planned.

    Raises:
        ConfigError: with what would do.
    """
    if config.trainer.device == "cuda" and config.launcher.kind != "slurm" and not machine.gpus:
        raise ConfigError(
            "trainer.device must be cpu or auto, since this process sees no GPU; got 'cuda'; "
            "run it where one is, or with launcher=slurm; sweep.action=plan needs none"
        )


def _check_placement(config: RunConfig) -> None:
    """Refuse an adapter that matches no layer, where the model's layers are known without loading it."""
    architecture, adapter = config.model.architecture, config.adapter
    if architecture is not None and config.model.source == "random" and architecture.model_type not in FAMILIES:
        raise ConfigError(unknown_name("model.architecture.model_type", architecture.model_type, FAMILIES))
    check_task(config.model)
    layers = linear_layers(architecture) if architecture is not None else None
    if layers is not None and adapter.kind == "lora":
        match_linears([name for name, _, _ in layers], adapter.placement, adapter.target_regex, adapter.last_k_layers)


def check_inputs(config: RunConfig) -> None:
    """Refuse a run whose model or data are not on this machine, in the plan rather than in every run.

    Hub ids are left to the run: nodes may reach a hub that this machine does not. A wheel is hashed once, however
    many runs name it.
    """
    cache_dir = Path(config.paths.cache_dir) if config.paths.cache_dir else default_cache_dir()
    model = config.model
    if model.source == "wheel":
        _check_wheel("model.wheel", model.wheel or "", cache_dir, of_a_model=True)
    elif model.source in ("folder", "gguf") and not Path(model.path or "").exists():
        raise ModelError(f"model.path does not exist: {model.path}; give the path of a {model.source}")
    sets = {f"evaluation.sets.{name}": source for name, source in config.evaluation.sets.items()}
    mix = {f"data.mix.{name}": part for name, part in config.data.mix.items()}
    benchmarks = {f"evaluation.benchmarks.{name}": source for name, source in config.evaluation.benchmarks.items()}
    sources: dict[str, RowsConfig] = {"data.source": config.data.source, **mix, **sets, **benchmarks}
    for place, source in sources.items():
        if source.kind == "wheel":
            _check_wheel(f"{place}.wheel", source.wheel or "", cache_dir, of_a_model=False)


def _check_wheel(key: str, name: str, cache_dir: Path, *, of_a_model: bool) -> None:
    """Refuse a wheel that is none, or holds something else, or is not in the cache."""
    allowed = [known for known, wheel in WHEELS.items() if (wheel.gguf is not None) == of_a_model]
    if name not in allowed:
        raise ConfigError(unknown_name(key, name, allowed))
    wheel_file(name, cache_dir)
