"""What a run must fit in, whether its predicted peak does, and the nearest setting with which it would."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from qlora_lab.config.hardware import Hardware, gpu_memory_bytes
from qlora_lab.config.schema import AUTO, RunConfig
from qlora_lab.errors import ConfigError
from qlora_lab.memory.fit import RESERVED_GB, longest_tokens
from qlora_lab.memory.layer import Shape
from qlora_lab.memory.plan import MemoryPlan, plan_memory
from qlora_lab.memory.process import shared_bytes

GIB = 2**30
RESERVED_BYTES = RESERVED_GB * 1e9
SMALLEST_RANK, SHORTEST_ROW = 4, 16  # that are worth proposing
GPU, HOST = "GPU", "host"


@dataclass(frozen=True)
class Room:
    """Memory that a run shares with others, or has alone.

    Attributes:
        kind: GPU or HOST.
        total_bytes: of the card, the machine, or what is asked of SLURM.
        runs: that share it.
        setting: the key that says how many do.
    """

    kind: str
    total_bytes: int
    runs: int
    setting: str

    def budget_bytes(self, config: RunConfig, plan: MemoryPlan) -> float:
        """Return what is left to one of several such runs.

        Each has a CUDA context on its GPU. What runs on one host have in common is there once, as the rest of the host.
        """
        if self.kind == GPU:
            return self.total_bytes / self.runs - RESERVED_BYTES
        shared = shared_bytes(config, plan.base)
        return (self.total_bytes - RESERVED_BYTES - shared) / self.runs + shared

    @property
    def reserved_for(self) -> str:
        return "what processes take besides" if self.kind == GPU else "the rest of the machine"

    @property
    def words(self) -> str:
        size = f"{self.total_bytes / GIB:,.1f} GiB"
        whole = f"a GPU of {size}" if self.kind == GPU else f"{size} of host memory"
        return f"{whole}, shared by {self.runs} runs" if self.runs > 1 else whole


@dataclass(frozen=True)
class Prediction:
    """A run's memory at its peak.

    Attributes:
        plan: its components; None where they cannot be predicted.
        why_not: then says why.
    """

    plan: MemoryPlan | None
    why_not: str | None = None

    @cached_property
    def peak_bytes(self) -> int | None:
        return self.plan.total if self.plan is not None else None


def room_of(config: RunConfig, machine: Hardware, runs_at_once: int) -> Room | None:
    """Return what a resolved run must fit in; None where nobody says how much there is.

    Args:
        machine: that plans, and executes what is not for SLURM.
        runs_at_once: that share it.
    """
    launcher = config.launcher
    on_slurm = launcher.kind == "slurm"
    if config.trainer.device == "cuda":
        elsewhere = on_slurm or not machine.gpus  # planned here, for a machine that has some
        per_gpu = launcher.runs_per_gpu if elsewhere else -(-runs_at_once // len(machine.gpus))
        setting = "launcher.runs_per_gpu" if launcher.runs_per_gpu > 1 else "launcher.max_parallel"
        if launcher.gpu_memory_gb is not None:
            return Room(GPU, round(launcher.gpu_memory_gb * GIB), per_gpu, setting)
        found = None if on_slurm else gpu_memory_bytes(machine.gpu_ids)
        return Room(GPU, found, per_gpu, setting) if found is not None else None
    if on_slurm:
        return Room(HOST, launcher.slurm.memory_gb * GIB, launcher.runs_per_gpu, "launcher.runs_per_gpu")
    if machine.memory_bytes is None:
        return None
    return Room(HOST, machine.memory_bytes, runs_at_once, "launcher.max_parallel")


def predict(config: RunConfig) -> Prediction:
    """Predict the peak of a resolved run, of its longest possible rows."""
    try:
        return Prediction(_plan(config))
    except ConfigError as error:
        return Prediction(None, str(error))


def shared_by_what_fits(config: RunConfig, prediction: Prediction, room: Room) -> Room:
    """Return a room shared by as many runs as fit in it side by side, and by one at least."""
    plan = prediction.plan
    if plan is None:
        return room
    for runs in range(room.runs, 1, -1):
        fewer = replace(room, runs=runs)
        if plan.total <= fewer.budget_bytes(config, plan):
            return fewer
    return replace(room, runs=1)


def largest_micro_batch_size(config: RunConfig, room: Room | None) -> int:
    """Return what trainer.micro_batch_size=auto stands for: the largest divisor of batch_size that fits, or else 1.

    The number of rows in a step stays what it is.

    Raises:
        ConfigError: it is not known what there is to fit in, or the run's memory cannot be predicted.
    """
    key = f"trainer.micro_batch_size={AUTO}"
    if room is None:
        raise ConfigError(
            f"{key} needs to know the memory of the GPU; set launcher.gpu_memory_gb=..., or give a number"
        )
    last = 1
    for micro_batch_size in _divisors(config.trainer.batch_size):
        smaller = _with(config, micro_batch_size=micro_batch_size)
        prediction = predict(smaller)
        if prediction.plan is None:
            raise ConfigError(f"{key} needs a prediction of memory, and {prediction.why_not}; give a number")
        if prediction.plan.training <= room.budget_bytes(smaller, prediction.plan):  # evaluation has batches of its own
            return micro_batch_size
        last = micro_batch_size
    return last


def refusal(config: RunConfig, prediction: Prediction, room: Room | None) -> str | None:
    """Return one sentence that says why a resolved run does not fit and what would; None where it fits or may."""
    plan = prediction.plan
    if room is None or plan is None or plan.total <= room.budget_bytes(config, plan):
        return None
    return (
        f"the run needs {plan.total / GIB:,.1f} GiB at its peak, and must fit {room.words}, less "
        f"{RESERVED_BYTES / GIB:.1f} GiB for {room.reserved_for}; {Remedies(config, room).nearest}"
    )


class Remedies:
    """Settings with which a run that does not fit would."""

    def __init__(self, config: RunConfig, room: Room) -> None:
        self._config = config
        self._room = room

    @cached_property
    def nearest(self) -> str:
        """Name the setting that changes least: first those that leave the result as it is."""
        for words in self._in_order():
            return f"it would fit with {words}"
        return f"it fits with no smaller batch, shorter rows or lower rank; {self._without_hope()}"

    def _in_order(self) -> Iterator[str]:
        config, room = self._config, self._room
        for runs in range(room.runs - 1, 0, -1):
            yield from self._if_it_fits(config, f"{room.setting}={runs}", replace(room, runs=runs))
        yield from self._by_micro_batch(config, "")
        checkpointed, settings = _with(config, gradient_checkpointing=True), "trainer.gradient_checkpointing=true"
        keep_less = [(checkpointed, settings)]
        if config.trainer.device == "cuda" and not config.trainer.offload_activations:
            checkpointed = _with(checkpointed, offload_activations=True)
            settings += " trainer.offload_activations=true"
            keep_less.append((checkpointed, settings))
        for changed, words in keep_less:
            if changed != config:
                yield from self._by_micro_batch(changed, words)
        if config.quant.format == "none" and config.adapter.kind == "lora":
            quant = replace(config.quant, format="nf4", double_quant=True)
            for changed, words in keep_less:
                yield from self._by_micro_batch(replace(changed, quant=quant), f"quant=nf4 {words}")
        smallest = _with(checkpointed, micro_batch_size=1)
        settings = f"trainer.micro_batch_size=1 {settings}"
        tokens = longest_tokens(smallest, 1, room.budget_bytes(smallest, _plan(smallest)))
        if tokens >= SHORTEST_ROW:
            yield f"{settings} and rows of at most {tokens:,} tokens (data.max_source_tokens + data.max_target_tokens)"
        if config.adapter.kind == "lora" and config.adapter.dtype != "bfloat16":
            settings += " adapter.dtype=bfloat16"
            smallest = replace(smallest, adapter=replace(config.adapter, dtype="bfloat16"))
            yield from self._if_it_fits(smallest, settings, room)
        rank = config.adapter.rank // 2
        while rank >= SMALLEST_RANK:
            lower = replace(smallest, adapter=replace(smallest.adapter, rank=rank))
            yield from self._if_it_fits(lower, f"{settings} adapter.rank={rank}", room)
            rank //= 2

    def _by_micro_batch(self, config: RunConfig, settings: str) -> Iterator[str]:
        """Yield the settings with the largest micro-batch that fits, up to the run's own."""
        own = config.trainer.micro_batch_size
        assert isinstance(own, int)
        for size in [own, *(size for size in _divisors(config.trainer.batch_size) if size < own)]:
            smaller = f"trainer.micro_batch_size={size}" if size < own else ""
            words = " ".join(filter(None, [settings, smaller]))
            for found in self._if_it_fits(_with(config, micro_batch_size=size), words, self._room):
                yield found
                return

    @staticmethod
    def _if_it_fits(config: RunConfig, settings: str, room: Room) -> Iterator[str]:
        """Yield the settings if training fits with them, and smaller batches of evaluation where that must be too."""
        plan = _plan(config)
        budget = room.budget_bytes(config, plan)
        if plan.training > budget:
            return
        tokens = config.evaluation.batch_tokens
        while plan.total > budget and tokens > 1:
            tokens //= 2
            plan = _plan(replace(config, evaluation=replace(config.evaluation, batch_tokens=tokens)))
        if plan.total <= budget:
            smaller = f"evaluation.batch_tokens={tokens}" if tokens < config.evaluation.batch_tokens else ""
            yield " ".join(filter(None, [settings, smaller]))

    def _without_hope(self) -> str:
        """Say how large a card would do, for one row at a time."""
        peak = _plan(_with(self._config, gradient_checkpointing=True, micro_batch_size=1)).total
        needed = f"{(peak + RESERVED_BYTES) / GIB:,.1f} GiB"
        return f"one row at a time with trainer.gradient_checkpointing=true needs {needed}"


def _plan(config: RunConfig) -> MemoryPlan:
    rows = config.trainer.micro_batch_size
    assert isinstance(rows, int)  # resolved
    return plan_memory(config, Shape(rows, config.data.longest_row_tokens))


def _divisors(number: int) -> list[int]:
    """Return what divides a number, the largest first."""
    return [divisor for divisor in range(number, 0, -1) if number % divisor == 0]


def _with(config: RunConfig, **trainer: Any) -> RunConfig:
    return replace(config, trainer=replace(config.trainer, **trainer))
