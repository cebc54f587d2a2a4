"""Which models are evaluated: finished runs, what they started from, adapters and models without a run. No torch."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qlora_lab.config.hardware import Hardware, product_dtype
from qlora_lab.config.schema import AUTO, EvaluateConfig, ModelConfig, OpenConfig, QuantConfig, RunConfig
from qlora_lab.errors import ModelError
from qlora_lab.hashing import file_sha256
from qlora_lab.runs.evaluations import settings_hash
from qlora_lab.runs.find import check_finished
from qlora_lab.runs.fingerprint import model_fingerprint
from qlora_lab.runs.folder import RunFolder

BASES = "bases"  # below the folder of runs, with the evaluations of models without one
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # of PEFT's format


@dataclass(frozen=True)
class Base:
    """A model as runs start from it: what decides its weights, and how it is asked."""

    model: ModelConfig
    quant: QuantConfig
    prompt_format: str
    compute_dtype: str
    device: str
    labels: tuple[str, ...] = ()  # of a classifier
    seed: int = 0  # of random weights

    @property
    def name(self) -> str:
        return f"{self.model.name} in {self.compute_dtype if self.quant.format == 'none' else self.quant.format}"

    @property
    def known_names(self) -> list[str]:
        """What an adapter may call it that was trained on it."""
        model = self.model
        return [name for name in (model.hub_id, model.name, model.path, model.wheel) if name]

    def settings(self) -> dict[str, Any]:
        """Return what two bases have in common when they give the same answers, as plain values."""
        values = asdict(self)
        del values["model"]["name"]
        if self.model.content_sha256 is not None:
            del values["model"]["path"]  # the content counts, not where it lies
        if self.model.source != "random" and not self.labels:
            del values["seed"]
        return values


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate.

    Attributes:
        name: what its answers are signed with.
        path: the folder of its run, or of the base alone; its evaluations lie below.
        base: the model below the adapter.
        run: the finished run whose weights are asked; None: the base's.
        adapter_folder: an adapter of no run, in PEFT's format, that is asked instead.
    """

    name: str
    path: Path
    base: Base
    run: RunFolder | None = None
    adapter_folder: Path | None = None

    @property
    def adapter_sha256(self) -> str | None:
        """Of the weights that are asked; None of a base alone."""
        if self.adapter_folder is not None:
            return file_sha256(self.adapter_folder / ADAPTER_FILES[1])
        return None if self.run is None else str(self.run.result()["adapter_sha256"])


def base_of(config: RunConfig) -> Base:
    """Return what a run started from."""
    return Base(
        model=config.model,
        quant=config.quant,
        prompt_format=config.data.prompt_format or config.model.prompt_format,
        compute_dtype=config.trainer.compute_dtype,
        device=config.trainer.device,
        labels=tuple(config.data.labels),
        seed=config.seed,
    )


def trained(folder: RunFolder, name: str | None = None) -> Candidate:
    """Return a finished run as a candidate.

    Raises:
        RunFolderError: it is not finished, or has no configuration.
    """
    check_finished(folder)
    return Candidate(name or folder.run_id, folder.path, base_of(folder.config()), folder)


def alone(base: Base, runs_dir: Path, name: str | None = None) -> Candidate:
    """Return a base model as a candidate; runs that started from the same have the same evaluations of it."""
    return Candidate(name or base.name, _path(runs_dir, base.model.name, base.settings()), base)


def adapted(base: Base, folder: Path, runs_dir: Path, name: str | None = None) -> Candidate:
    """Return an adapter of no run on a base as a candidate; the same files are the same one wherever they lie.

    Raises:
        ModelError: a file of it is missing.
    """
    missing = [file for file in ADAPTER_FILES if not (folder / file).is_file()]
    if missing:
        raise ModelError(f"{folder} must hold an adapter in PEFT's format; it has no {missing[0]}")
    settings = {**base.settings(), "adapter": [file_sha256(folder / file) for file in ADAPTER_FILES]}
    called = folder.resolve().name
    return Candidate(name or called, _path(runs_dir, called, settings), base, adapter_folder=folder)


def _path(runs_dir: Path, name: str, settings: Mapping[str, Any]) -> Path:
    readable = re.sub(r"[^A-Za-z0-9._]+", "_", name).strip("._") or "model"
    return runs_dir / BASES / f"{readable}-{settings_hash(settings)}"


def asked_base(config: EvaluateConfig | OpenConfig, machine: Hardware) -> Base:
    """Return the model that is asked for without a run, with nothing left to choose.

    Raises:
        ModelError: its files are missing.
    """
    assert config.model is not None  # both refuse that
    device = config.device if config.device != AUTO else "cuda" if machine.gpus else "cpu"
    dtype = config.compute_dtype
    if dtype == AUTO:
        dtype = "bfloat16" if device == "cuda" else product_dtype(machine, device, "bfloat16")
    model = replace(config.model, content_sha256=model_fingerprint(config.model))
    return Base(model, config.quant or QuantConfig(), config.model.prompt_format, dtype, device)
