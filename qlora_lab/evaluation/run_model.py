"""Models opened as their runs left them: the base quantized the same, the adapter on top, not merged."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_lab.adapters.peft_format import load_adapter
from qlora_lab.adapters.saved_adapter import check_base_name, read_adapter
from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import ConfigError, ModelError
from qlora_lab.evaluation.candidates import Base, Candidate, trained
from qlora_lab.evaluation.weights import cached_if_small
from qlora_lab.hashing import file_sha256
from qlora_lab.models.load import load_model, load_tokenizer
from qlora_lab.models.precision import computing_in
from qlora_lab.models.special_tokens import fit_vocabulary
from qlora_lab.models.warm import WarmBase, base_key
from qlora_lab.ops.blockwise.checks import DTYPES
from qlora_lab.ops.registry import CUDA_KERNELS, KERNELS
from qlora_lab.runs.fingerprint import check_model_fingerprint
from qlora_lab.runs.folder import RunFolder
from qlora_lab.wheels import default_cache_dir

ADAPTER_WEIGHTS, FULL_WEIGHTS = "adapter_model.safetensors", "model.safetensors"


@dataclass(frozen=True)
class RunModel:
    """A model to evaluate, in evaluation mode on its device.

    Attributes:
        name: what its answers are signed with.
        base: what it is built on: model, format, prompt format, dtype, device.
        config: of the run; None of a model or an adapter without one, and of a run's base alone.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    base: Base
    config: RunConfig | None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute as the run did inside the block, with the expanded weights of a small model kept."""
        with computing_in(self.model, DTYPES[self.base.compute_dtype]), cached_if_small(self.model):
            yield


def open_run(folder: Path, *, cache_dir: Path | None = None, cache_bases: bool = True) -> RunModel:
    """Open the model of a finished run.

    Raises:
        RunFolderError: the run is not finished, or its configuration is missing.
        ConfigError: it needs a GPU, and there is none here.
        ModelError: its adapter is missing, or is not the one of its result; its base is missing or has changed.
    """
    return open_model(trained(RunFolder(folder)), cache_dir=cache_dir, cache_bases=cache_bases)


def open_model(
    candidate: Candidate, *, cache_dir: Path | None = None, cache_bases: bool = True, bases: WarmBase | None = None
) -> RunModel:
    """Open a run's model, an adapter on the base that it is for, or a base alone.

    Args:
        cache_dir: where fetched models and quantized bases lie; None: where they lie by default.
        cache_bases: whether the quantized base is kept there.
        bases: keeps the base in memory for the next run that started from it.

    Raises:
        ConfigError, ModelError: as `open_run`; ModelError also where an adapter is of another base.
    """
    base, run = candidate.base, candidate.run
    _check_device(base.device)
    cache_dir = cache_dir or default_cache_dir()
    if run is not None:
        check_weights(run)
    check_model_fingerprint(base.model)
    if candidate.adapter_folder is not None:
        saved = read_adapter(candidate.adapter_folder)
        check_base_name(f"the adapter in {candidate.adapter_folder}", saved, base.known_names)
    tokenizer = load_tokenizer(base.model, cache_dir)
    config = run.config() if run is not None else None
    if run is not None and config is not None and config.adapter.kind == "none":
        # Every weight was trained, in float32. The folder has no tokenizer, and new tokens have their rows already.
        whole = replace(base.model, source="folder", path=str(run.adapter), architecture=None, content_sha256=None)
        trained_whole = replace(base, model=replace(whole, new_tokens=[]), compute_dtype="float32")
        model = base_model(trained_whole, tokenizer, cache_dir=cache_dir)
    else:
        key = None if config is None else base_key(config)
        model = base_model(base, tokenizer, cache_dir=cache_dir, cache_bases=cache_bases, bases=bases, key=key)
        adapter = candidate.adapter_folder if run is None else run.adapter
        if adapter is not None:
            load_adapter(model, adapter)
    return RunModel(model.eval(), tokenizer, candidate.name, base, config)


def base_model(
    base: Base,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_dir: Path,
    cache_bases: bool = False,
    bases: WarmBase | None = None,
    key: str | None = None,
) -> PreTrainedModel:
    """Load what a run starts from, with rows for its new tokens.

    Args:
        tokenizer: of the model, as `load_tokenizer` returns it.
        key: what `bases` keeps it by; see `base_key`.

    Raises:
        ConfigError, ModelError: as `load_model`.
    """
    load = partial(
        load_model,
        base.model,
        base.quant,
        compute_dtype=DTYPES[base.compute_dtype],
        device=base.device,
        cache_dir=cache_dir,
        seed=base.seed,
        labels=base.labels,
        cache_bases=cache_bases,
    )
    model = load() if bases is None else bases.model(key, load)
    fit_vocabulary(model, tokenizer, base.model.new_tokens)
    return model


def _check_device(device: str) -> None:
    """A run is evaluated only on the kind of device it was trained on: another kind gives other numbers."""
    KERNELS.require()
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "the model was trained on a GPU or is to compute on one (device is 'cuda'), but torch sees none here; "
            "evaluate it where one is, give device=cpu with run=base, or train with trainer.device=cpu (that is "
            "another run)"
        )
    if device == "cuda":
        CUDA_KERNELS.require()


def check_weights(run: RunFolder) -> None:
    """Refuse a run whose weights are not those of its result.

    Raises:
        ModelError: they are missing, or have changed.
    """
    files = [file for file in (run.adapter / name for name in (ADAPTER_WEIGHTS, FULL_WEIGHTS)) if file.is_file()]
    if not files:
        raise ModelError(f"run {run.run_id} has no weights in {run.adapter}; restore them, or execute the run again")
    found, expected = file_sha256(files[0]), run.result().get("adapter_sha256")
    if found != expected:
        raise ModelError(
            f"{files[0]} is not what run {run.run_id} ended with (SHA-256 {found[:12]}, in its result "
            f"{str(expected)[:12]}); restore the file, or execute the run again"
        )
