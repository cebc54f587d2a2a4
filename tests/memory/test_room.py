"""What a run must fit in, the micro-batch that fits, and the setting that is proposed where a run does not."""

import re
from dataclasses import replace

import pytest

from qlora_lab.config import hardware
from qlora_lab.config.hardware import Hardware
from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import ConfigError
from qlora_lab.memory import room as rooms
from qlora_lab.memory.process import SHARED_BYTES
from qlora_lab.memory.room import GIB, RESERVED_BYTES, Room, largest_micro_batch_size, predict, refusal, room_of
from tests.helpers import composed

LAPTOP = Hardware("a laptop", frozenset(), cores=4, gpus=(), memory_bytes=16 * GIB)
WORKSTATION = replace(LAPTOP, gpus=("A6000", "A6000"), gpu_ids=("0", "1"))
GPU = ["trainer.device=cuda", "trainer.compute_dtype=bfloat16", "trainer.batch_size=16"]


def seven_b(*overrides: str) -> RunConfig:
    return composed("model=llama_7b", "trainer.micro_batch_size=16", *GPU, *overrides)


def card(gib: float, runs: int = 1) -> Room:
    return Room("GPU", round(gib * GIB), runs, "launcher.runs_per_gpu")


@pytest.mark.parametrize(
    ("overrides", "machine", "at_once", "expected"),
    [
        (["launcher=slurm", "launcher.gpu_memory_gb=80"], LAPTOP, 1, ("GPU", 80 * GIB, 1)),
        (["launcher=slurm", "launcher.gpu_memory_gb=80", "launcher.runs_per_gpu=3"], LAPTOP, 1, ("GPU", 80 * GIB, 3)),
        (["launcher=slurm"], WORKSTATION, 1, None),
        (["launcher=pool"], WORKSTATION, 2, ("GPU", 48 * GIB, 1)),
        (["launcher=pool", "launcher.runs_per_gpu=2"], WORKSTATION, 4, ("GPU", 48 * GIB, 2)),
        (["launcher=local", "launcher.gpu_memory_gb=24"], WORKSTATION, 3, ("GPU", 24 * GIB, 2)),
        (["trainer.device=cpu", "launcher=slurm", "launcher.slurm.memory_gb=5"], LAPTOP, 9, ("host", 5 * GIB, 1)),
        (["trainer.device=cpu", "launcher=local"], LAPTOP, 4, ("host", 16 * GIB, 4)),
        (["trainer.device=cpu", "launcher=local"], replace(LAPTOP, memory_bytes=None), 4, None),
    ],
)
def test_a_run_must_fit_its_share_of_the_launchers_card_or_host(
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    machine: Hardware,
    at_once: int,
    expected: tuple[str, int, int] | None,
) -> None:
    monkeypatch.setattr(rooms, "gpu_memory_bytes", lambda ids: {("0", "1"): 48 * GIB}[ids])
    room = room_of(seven_b(*overrides), machine, at_once)
    assert (None if room is None else (room.kind, room.total_bytes, room.runs)) == expected


@pytest.mark.parametrize("batch_size", [16, 12, 7])
@pytest.mark.parametrize("gib", [6, 10, 16, 80])
def test_auto_is_the_largest_divisor_that_fits(batch_size: int, gib: int) -> None:
    config, room = seven_b(f"trainer.batch_size={batch_size}", "trainer.micro_batch_size=auto"), card(gib)
    chosen = largest_micro_batch_size(config, room)

    def fits(size: int) -> bool:
        prediction = predict(replace(config, trainer=replace(config.trainer, micro_batch_size=size)))
        assert prediction.peak_bytes is not None
        return prediction.peak_bytes + RESERVED_BYTES <= room.total_bytes

    assert batch_size % chosen == 0 and fits(chosen)
    assert not any(fits(size) for size in range(chosen + 1, batch_size + 1) if batch_size % size == 0)


def test_auto_needs_to_know_what_there_is_and_what_is_needed() -> None:
    config = seven_b("trainer.micro_batch_size=auto")
    with pytest.raises(ConfigError, match=r"set launcher\.gpu_memory_gb=\.\.\., or give a number"):
        largest_micro_batch_size(config, None)
    unknown = composed("model=hub", "model.hub_id=some/model", "trainer.micro_batch_size=auto", *GPU)
    with pytest.raises(ConfigError, match=r"auto needs a prediction of memory, and memory can only be planned where"):
        largest_micro_batch_size(unknown, card(80))
    assert largest_micro_batch_size(config, card(1)) == 1  # and then it is refused


@pytest.mark.parametrize(
    ("overrides", "room", "settings"),
    [
        ([], card(16, runs=4), ["launcher.runs_per_gpu=1"]),
        ([], card(10), ["trainer.micro_batch_size=8"]),
        (["quant=none"], card(20), ["trainer.micro_batch_size=8"]),
        (["data.max_source_tokens=1500"], card(6), ["trainer.gradient_checkpointing=true", "trainer.micro_batch_size"]),
        (["quant=none"], card(12), ["quant=nf4"]),
        (["adapter.rank=256", "data.max_source_tokens=1500"], card(14), ["trainer.gradient_checkpointing=true"]),
        (
            ["trainer.gradient_checkpointing=true", "trainer.micro_batch_size=1", "data.max_source_tokens=1500"],
            card(5.5),
            ["trainer.offload_activations=true"],
        ),
        (["adapter.rank=256"], card(12.5), ["trainer.offload_activations=true", "adapter.dtype=bfloat16"]),
        (["adapter.rank=256"], card(9), ["trainer.micro_batch_size=1", "adapter.rank"]),
        (["trainer.micro_batch_size=1", "evaluation.batch_tokens=8192"], card(7), ["evaluation.batch_tokens"]),
        (["evaluation.batch_tokens=8192"], card(8), ["trainer.micro_batch_size=4", "evaluation.batch_tokens=4096"]),
    ],
)
def test_with_the_setting_that_is_proposed_a_run_fits(overrides: list[str], room: Room, settings: list[str]) -> None:
    config = seven_b(*overrides)
    why = refusal(config, predict(config), room)
    assert why is not None and "it would fit with " in why
    proposed = re.findall(r"[\w.]+=\w+", why.partition("it would fit with ")[2])
    assert all(any(each.startswith(setting) for each in proposed) for setting in settings), why
    changed = seven_b(*overrides, *proposed)
    runs = changed.launcher.runs_per_gpu if "launcher.runs_per_gpu=1" in proposed else room.runs
    assert refusal(changed, predict(changed), replace(room, runs=runs)) is None


def test_rows_that_fit_are_said_by_their_length() -> None:
    long_rows = [
        "trainer.gradient_checkpointing=true",
        "trainer.offload_activations=true",
        "trainer.micro_batch_size=1",
        "data.max_source_tokens=1700",
    ]
    config = composed("model=llama_7b", *GPU, *long_rows, "evaluation.batch_tokens=512")
    prediction = predict(config)
    assert prediction.plan is not None and prediction.plan.evaluation == 0
    room = card((prediction.plan.total + RESERVED_BYTES) / GIB - 0.1)
    why = refusal(config, prediction, room)
    assert why is not None
    found = re.search(r"rows of at most ([\d,]+) tokens", why)
    assert found is not None, why
    source = int(found[1].replace(",", "")) - config.data.max_target_tokens
    for longer, fits in ((0, True), (1, False)):
        shorter = replace(config, data=replace(config.data, max_source_tokens=source + longer))
        assert (refusal(shorter, predict(shorter), room) is None) is fits


def test_where_nothing_helps_the_card_that_would_do_is_said() -> None:
    config = composed("model=llama_65b", "trainer.micro_batch_size=16", *GPU)
    why = refusal(config, predict(config), card(24))
    assert why is not None
    assert "must fit a GPU of 24.0 GiB, less 0.9 GiB for what processes take besides; it fits with no smaller" in why
    found = re.search(r"one row at a time with trainer.gradient_checkpointing=true needs ([\d.]+) GiB", why)
    assert found is not None and 34 < float(found[1]) < 45


def test_what_is_not_known_is_not_refused() -> None:
    config = seven_b()
    assert refusal(config, predict(config), None) is None
    unknown = composed("model=hub", "model.hub_id=some/model", "trainer.micro_batch_size=1", *GPU)
    prediction = predict(unknown)
    assert prediction.peak_bytes is None and "model.architecture" in str(prediction.why_not)
    assert refusal(unknown, prediction, card(1)) is None


def test_runs_on_one_host_have_their_base_and_libraries_in_common() -> None:
    config = composed("trainer.device=cpu", "trainer.compute_dtype=float32", "trainer.micro_batch_size=4")
    prediction = predict(config)
    plan = prediction.plan
    assert plan is not None
    common = plan.base + SHARED_BYTES
    just_fits = RESERVED_BYTES + common + 4 * (plan.total - common)
    for total, fits in ((just_fits + GIB // 100, True), (just_fits - GIB // 100, False)):
        why = refusal(config, prediction, Room("host", round(total), 4, "launcher.max_parallel"))
        assert (why is None) is fits, why
    alone = replace(config, paths=replace(config.paths, cache_bases=False))
    assert refusal(alone, predict(alone), Room("host", round(just_fits + GIB // 100), 4, "launcher.max_parallel"))


def test_this_machines_memory_is_known() -> None:
    room = room_of(composed("trainer.device=cpu"), hardware.detect(), 1)
    assert room is not None and room.total_bytes > GIB / 4
