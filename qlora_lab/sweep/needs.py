"""The memory that the runs of a plan will need, and what each must fit in; what runs share is predicted once."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from qlora_lab.config.hardware import Hardware
from qlora_lab.config.schema import AUTO, RunConfig
from qlora_lab.memory.room import (
    GIB,
    GPU,
    HOST,
    Prediction,
    Room,
    largest_micro_batch_size,
    predict,
    refusal,
    room_of,
    shared_by_what_fits,
)
from qlora_lab.sweep.listing import listed

MOST_GROUPS = 12  # that a person is shown
SHOWN_SHARE = 0.01  # of a peak, below which a component is not
# Cards that the CUDA kernels are built for (compute capability 8.0 and later), by what they are sold as; each reports a
# little more to its programs.
CARDS_GB = {
    "RTX A4000 (16 GB)": 16,
    "L4 or RTX 4090 (24 GB)": 24,
    "A100 (40 GB)": 40,
    "L40S (48 GB)": 48,
    "A100 or H100 (80 GB)": 80,
    "H200 (141 GB)": 141,
}


@dataclass(frozen=True)
class Need:
    """What one run needs.

    Attributes:
        room: what it must fit in; None where that is not known.
        refusal: why it does not, and what would; None where it fits, or nobody knows.
    """

    prediction: Prediction
    room: Room | None
    refusal: str | None


class Needs:
    """Tells the need of each run.

    Args:
        machine: that plans.
        runs: that there are; fewer than could share the machine have it for themselves.
    """

    def __init__(self, machine: Hardware, runs: int) -> None:
        self._machine = machine
        self._runs = runs
        # with the configuration itself, so that the ids of its groups stay its own
        self._known: dict[tuple[object, ...], tuple[RunConfig, Need]] = {}
        self._chosen: dict[tuple[object, ...], tuple[RunConfig, int]] = {}

    def __call__(self, config: RunConfig) -> Need:
        """Return the need of a run with nothing left open."""
        key = what_counts(config)
        if key not in self._known:
            prediction = predict(config)
            room = _fitting(config, prediction, self._room(config))
            self._known[key] = config, Need(prediction, room, refusal(config, prediction, room))
        return self._known[key][1]

    def side_by_side(self, config: RunConfig) -> int:
        """Return how many such runs this machine executes at once, were there many."""
        most = runs_at_once(config, self._machine)
        room = _fitting(config, predict(config), room_of(config, self._machine, most))
        return room.runs if room is not None and room.kind == HOST else most

    def micro_batch_size(self, config: RunConfig) -> int:
        """Return what trainer.micro_batch_size=auto stands for in a run that is resolved otherwise.

        Raises:
            ConfigError: the memory of the run, or what it must fit in, is not known.
        """
        key = what_counts(config)
        if key not in self._chosen:
            self._chosen[key] = config, largest_micro_batch_size(config, self._room(config))
        return self._chosen[key][1]

    def chosen(self, config: RunConfig) -> RunConfig:
        """Return a resolved run with its micro-batch chosen, where that is left open."""
        if config.trainer.micro_batch_size != AUTO:
            return config
        return replace(config, trainer=replace(config.trainer, micro_batch_size=self.micro_batch_size(config)))

    def _room(self, config: RunConfig) -> Room | None:
        return room_of(config, self._machine, min(self._runs, runs_at_once(config, self._machine)))


def _fitting(config: RunConfig, prediction: Prediction, room: Room | None) -> Room | None:
    """Return the room with no more runs in it than fit, where their number is this machine's to choose."""
    chosen = config.launcher.kind in ("local", "pool") and config.launcher.max_parallel is None
    if room is None or room.kind != HOST or not chosen:
        return room
    return shared_by_what_fits(config, prediction, room)


def what_counts(config: RunConfig) -> tuple[object, ...]:
    """Return a key that runs with the same need share; not their learning rates and seeds."""
    groups = (
        config.model,
        config.quant,
        config.adapter,
        config.data,
        config.trainer,
        config.evaluation,
        config.launcher,
    )
    return (config.optim.name, config.paths.cache_bases, *map(id, groups))


def runs_at_once(config: RunConfig, machine: Hardware) -> int:
    """Return how many runs share this machine's memory, if they are executed on it."""
    launcher = config.launcher
    return parallel_runs(config, machine) * (launcher.runs_per_gpu if launcher.kind == "pool" else 1)


def parallel_runs(config: RunConfig, machine: Hardware) -> int:
    """Return how many runs share this machine: one a GPU, else one a core, or as the launcher says."""
    launcher = config.launcher
    if launcher.kind == "in_process":
        return 1
    return launcher.max_parallel or len(machine.gpus) or machine.cores


def side_by_side(runs: Sequence[tuple[RunConfig, Need | None]], machine: Hardware) -> tuple[int, str | None]:
    """Return how many of these runs are executed at once on this machine, and a sentence where memory is the limit."""
    most = runs_at_once(runs[0][0], machine)
    rooms = [(need.room.runs, need) for _, need in runs if need is not None and need.room and need.room.kind == HOST]
    fit, tightest = min(rooms, key=lambda pair: pair[0], default=(most, None))
    if tightest is None or fit >= min(most, len(runs)):
        return min(most, fit), None
    assert tightest.room is not None
    peak = tightest.prediction.peak_bytes or 0
    return fit, (
        f"at most {fit} of {min(most, len(runs))} runs at once, since one needs up to {_size(peak / GIB)} of "
        f"{_size(tightest.room.total_bytes / GIB)} of host memory; launcher.max_parallel sets another number"
    )


@dataclass(frozen=True)
class MemoryGroup:
    """Runs of one model in one format.

    Attributes:
        refused: of the runs, those that do not fit.
        predicted_gib: the least and the most of a run's peak; None where it is not predicted.
        components_gib: of its largest run, by the names of `memory.plan.MemoryPlan`; they add up to its peak.
        not_predicted: then says why.
        card: the smallest of CARDS_GB with room for the largest of the runs, and those that share it; None where none
            has any, or they need no GPU or are not predicted.
        fits_in: kind (GPU or host), gib, and the runs that share it; None where it is not known.
    """

    model: str
    quant: str
    runs: int
    refused: int
    predicted_gib: tuple[float, float] | None
    components_gib: dict[str, float] | None
    not_predicted: str | None
    micro_batch_sizes: list[int]
    card: str | None
    fits_in: dict[str, object] | None


def memory_groups(runs: Iterable[tuple[RunConfig, Need]]) -> list[MemoryGroup]:
    """Group the needs of runs."""
    groups: dict[tuple[object, ...], list[tuple[RunConfig, Need]]] = {}
    for config, need in runs:
        predicted = need.prediction.peak_bytes is not None
        key = config.model.name, config.quant.format, need.room, predicted
        groups.setdefault(key, []).append((config, need))
    return [_group(of_group) for of_group in groups.values()]


def _group(runs: list[tuple[RunConfig, Need]]) -> MemoryGroup:
    config, need = runs[0]
    plans = [each.prediction.plan for _, each in runs if each.prediction.plan is not None]
    peaks = [plan.total / GIB for plan in plans]
    largest = max(plans, key=lambda plan: plan.total, default=None)
    sizes = {each.trainer.micro_batch_size for each, _ in runs}
    room = need.room
    return MemoryGroup(
        model=config.model.name,
        quant=config.quant.format,
        runs=len(runs),
        refused=sum(each.refusal is not None for _, each in runs),
        predicted_gib=(min(peaks), max(peaks)) if peaks else None,
        components_gib={name: size / GIB for name, size in asdict(largest).items()} if largest else None,
        not_predicted=need.prediction.why_not,
        micro_batch_sizes=sorted(size for size in sizes if isinstance(size, int)),
        card=smallest_card(runs),
        fits_in=asdict(room) | {"words": room.words} if room is not None else None,
    )


def smallest_card(runs: Sequence[tuple[RunConfig, Need]]) -> str | None:
    """Return the smallest card with room for each of these runs, and as many like it as share a GPU."""
    if any(config.trainer.device != "cuda" or need.prediction.plan is None for config, need in runs):
        return None
    distinct = {id(need): (config, need) for config, need in runs}.values()
    for name, size_gb in CARDS_GB.items():
        if all(_has_room(round(size_gb * 1e9), config, need) for config, need in distinct):
            return name
    return None


def _has_room(card_bytes: int, config: RunConfig, need: Need) -> bool:
    plan = need.prediction.plan
    shared_by = need.room.runs if need.room is not None else config.launcher.runs_per_gpu
    room = Room(GPU, card_bytes, shared_by, "launcher.runs_per_gpu")
    return plan is not None and plan.total <= room.budget_bytes(config, plan)


def memory_text(groups: list[MemoryGroup]) -> str:
    """Return the needs of groups for a person."""
    rooms = dict.fromkeys(str(group.fits_in["words"]) if group.fits_in else "" for group in groups)
    (first, *others) = rooms
    fits = f"; each run must fit {first}" if first and not others else ""
    unknown = "; the GPU's memory is not known: set launcher.gpu_memory_gb" if rooms == {"": None} else ""
    rows = [_row(group, with_room=bool(others)) for group in groups]
    lines = [f"memory at the peak{fits}{unknown}", *listed(rows, MOST_GROUPS, "groups")]
    return "\n".join([*lines, *_components(groups)])


def _components(groups: list[MemoryGroup]) -> Iterator[str]:
    """Yield what the peak of the largest run of all is made of; nothing where none is predicted."""
    predicted = [(group.predicted_gib[1], group) for group in groups if group.predicted_gib is not None]
    if not predicted:
        return
    peak, group = max(predicted, key=lambda pair: pair[0])
    assert group.components_gib is not None
    large = {name: size for name, size in group.components_gib.items() if abs(size) >= SHOWN_SHARE * peak}
    parts = [f"{name.replace('_', ' ')} {_size(size)}" for name, size in large.items()]
    yield f"  the largest, {group.model} {group.quant}, {_size(peak)}: {', '.join(parts)}; less is left out here"


def _size(gib: float) -> str:
    return f"{gib:,.1f} GiB" if abs(gib) >= 0.1 else f"{1024 * gib:,.0f} MiB"


def _row(group: MemoryGroup, *, with_room: bool) -> str:
    sizes = group.micro_batch_sizes
    rows = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    if group.predicted_gib is None:
        peak = f"not predicted ({group.not_predicted})"
    else:
        low, high = map(_size, group.predicted_gib)
        peak = low if low == high else f"{low} to {high}"
    fits = f", must fit {group.fits_in['words']}" if with_room and group.fits_in else ""
    refused = f", {group.refused:,} of {group.runs:,} runs refused" if group.refused else ""
    card = f", smallest card that fits: {group.card}" if group.card is not None else ""
    return f"  {group.model} {group.quant}, micro-batch {rows}: {peak}{card}{fits}{refused}"
