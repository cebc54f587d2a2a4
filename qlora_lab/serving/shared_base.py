"""One base model in memory, and any number of adapters on it by name."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_lab.adapters.lora import adapted_layers
from qlora_lab.adapters.placement import Linear, linear_names
from qlora_lab.adapters.saved_adapter import SavedAdapter, check_base_name, check_fits, read_adapter
from qlora_lab.config.schema import CAUSAL
from qlora_lab.errors import ConfigError, ModelError
from qlora_lab.evaluation.candidates import Base
from qlora_lab.evaluation.run_model import RunModel
from qlora_lab.serving.layers import ReadyAdapter, Route, SharedLinear
from qlora_lab.serving.pool import AdapterPool, Registered
from qlora_lab.serving.sources import Source, find_source

# Of a model's configuration: what does not change its weights.
NOT_OF_WEIGHTS = ("name", "prompt_format", "max_length_tokens", "pad_token", "tokenizer")
SHOWN_KEYS = 3
NAME = re.compile(r"[\w.:@/-]{1,120}")


class SharedBase:
    """A base whose linear layers are shared by adapters; not for several threads at a time.

    Args:
        opened: the base alone, as `open_model(alone(base, runs_dir))` gives it; its model is changed.
        runs_dir: where ids of runs are looked up.
        budget_bytes: most memory for adapters that are ready on the device; None: no limit. The least recently used
            are evicted to the host. A batch with several adapters takes that of these once more.

    Example:
        >>> shared = SharedBase(opened, Path("runs"))
        >>> shared.register("clean", "0123456789ab")
        >>> shared.register("noisy", "some/peft_folder")
        >>> shared.switch("clean")                        # every row from now on
        >>> with shared.rows(["clean", None, "noisy"]):   # or each row its own, None being the base
        ...     logits = shared.model(input_ids).logits

    Raises:
        ConfigError: the model reads and writes apart, or is a classifier.
        ModelError: it has adapters already.
    """

    def __init__(self, opened: RunModel, runs_dir: Path, *, budget_bytes: int | None = None) -> None:
        self.model: PreTrainedModel = opened.model
        self.tokenizer: PreTrainedTokenizerBase = opened.tokenizer
        self.opened = opened
        self.base: Base = opened.base
        self._runs_dir = runs_dir
        if self.base.model.task != CAUSAL:
            raise ConfigError(
                f"only models that continue a text are served; {self.base.name} does {self.base.model.task}"
            )
        if adapted_layers(self.model):
            raise ModelError(f"{self.base.name} has adapters already; open the base alone")
        self.pool = AdapterPool(self.model.device, budget_bytes)
        self._route = Route()
        self._switched_to: str | None = None
        self._linears = linear_names(self.model)
        for path in self._linears:
            layer = self.model.get_submodule(path)
            assert isinstance(layer, Linear)
            self.model.set_submodule(path, SharedLinear(layer, path, self._route).train(layer.training))

    @property
    def name(self) -> str:
        """What the base is asked for by: its model's name, without the folders it may lie in."""
        return Path(self.base.model.name).name

    @property
    def names(self) -> list[str]:
        """The adapters, in the order in which they were registered."""
        return list(self.pool.registered)

    def register(self, name: str, where: str | Path | Source) -> Registered:
        """Make an adapter known by a name; it is read now, and made ready when it is first used.

        Args:
            where: a run's id or folder, a folder in PEFT's format, or a hub id that is in the local cache.

        Raises:
            ModelError: it is missing or damaged, of another base, or does not fit this one; its name is taken.
            RunFolderError: the run is not finished.
        """
        if not NAME.fullmatch(name) or name == self.name:
            raise ModelError(
                f"an adapter's name must be letters, digits and any of . _ - : @ /, and not the base's; got '{name}'"
            )
        source = where if isinstance(where, Source) else find_source(str(where), self._runs_dir)
        saved = read_adapter(source.folder)
        check_fits(self.model, source.folder, saved, self._linears)
        notes = self._check_base(name, source, saved)
        if saved.further:
            raise ModelError(
                f"adapter '{name}' trained '{min(saved.further)}' as a whole, which the rows of one batch cannot have "
                "apart; merge it into its base and serve the result"
            )
        prompt_format = source.prompt_format or self.base.prompt_format
        adapter = Registered(name, saved, prompt_format, source.description, notes)
        self.pool.add(adapter)
        return adapter

    def prompt_format(self, name: str | None) -> str:
        """Return the prompt format of an adapter, or of the base."""
        return self.base.prompt_format if name is None else self.pool.find(name).prompt_format

    def switch(self, name: str | None) -> None:
        """Use one adapter, or with None the base alone, for every row from now on.

        That takes microseconds where the adapter is ready, and a copy of its matrices where it is not.

        Raises:
            ModelError: there is none of that name.
        """
        self._route.now = None if name is None else self._ready([name])[name]
        self._switched_to = name

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Give each row of the batches inside an adapter of its own, or with None the base alone.

        The base's products are worked out once for all rows. What a row gets is what it gets alone, within rounding.

        Raises:
            ModelError: there is none of that name, or the budget does not hold them all at a time.
        """
        ready = self._ready([name for name in names if name is not None])
        rows = [None if name is None else ready[name] for name in names]
        self._route.now = self._route.mixed(rows, self.model.device)
        try:
            yield
        finally:
            self.switch(self._switched_to)  # which the batch may have evicted

    def _ready(self, names: Sequence[str]) -> dict[str, ReadyAdapter]:
        ready = self.pool.ready(names)
        if self.pool.budget_bytes is not None:  # else nothing is ever evicted
            self._route.forget_all_but(self.pool.ready_adapters)
        return ready

    def _check_base(self, name: str, source: Source, saved: SavedAdapter) -> tuple[str, ...]:
        """Refuse an adapter of another base; return what else differs."""
        if source.base is None:
            check_base_name(f"adapter '{name}'", saved, self._known_names())
            return tuple(self._unknown(name, source, saved))
        theirs, ours = (_settings(_weights_of(base)) for base in (source.base, self.base))
        differing = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
        if differing:
            told = ", ".join(f"{key} {theirs.get(key)} and {ours.get(key)}" for key in differing[:SHOWN_KEYS])
            raise ModelError(
                f"adapter '{name}' is for the base '{source.base.name}', and this one is '{self.base.name}': they are "
                f"different models ({told}{', ...' if len(differing) > SHOWN_KEYS else ''}); serve it on its own base"
            )
        if (source.base.quant, source.base.compute_dtype) != (self.base.quant, self.base.compute_dtype):
            return (
                f"adapter '{name}' was trained on {source.base.name}, computed in {source.base.compute_dtype}; on "
                f"{self.base.name} in {self.base.compute_dtype} it answers otherwise",
            )
        return ()

    def _unknown(self, name: str, source: Source, saved: SavedAdapter) -> Iterator[str]:
        """Say what an adapter of no run leaves open, and what is taken in its place."""
        if not saved.base_name:
            yield f"adapter '{name}' does not name the base that it is for; it fits {self.base.name}, and is put on it"
        if source.prompt_format is None:
            yield (
                f"adapter '{name}' does not say in which prompt format it was trained; it is asked in that of "
                f"{self.base.name}, {self.base.prompt_format}"
            )

    def _known_names(self) -> list[str]:
        model = self.base.model
        return [name for name in (model.name, model.hub_id, model.path, model.wheel, self.model.name_or_path) if name]


def _weights_of(base: Base) -> dict[str, Any]:
    """Return what two bases of the same weights have in common."""
    values: dict[str, Any] = {**base.settings(), "model": asdict(base.model)}
    kept = {key: value for key, value in values["model"].items() if key not in NOT_OF_WEIGHTS}
    if kept["content_sha256"] is not None:
        del kept["path"]  # the content counts, not where it lies
    return {"model": kept, "seed": values.get("seed")}


def _settings(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
