"""Runs that cannot fit are refused in the plan: nothing is started for them, and the others go on."""

import json
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from qlora_lab.config.hardware import Hardware
from qlora_lab.config.schema import RunConfig
from qlora_lab.errors import ConfigError
from qlora_lab.memory import room as rooms
from qlora_lab.memory.process import SHARED_BYTES
from qlora_lab.memory.room import GIB, RESERVED_BYTES, Room, predict
from qlora_lab.runs.folder import FINISHED, NEW, RunFolder
from qlora_lab.sweep import launch, site, study
from qlora_lab.sweep.needs import Needs, memory_groups, memory_text, side_by_side, smallest_card
from qlora_lab.sweep.plan import Plan, PlannedRun, make_plan, planned
from qlora_lab.sweep.plan_file import code_commit
from qlora_lab.sweep.prepare import prepare
from qlora_lab.sweep.preview import preview_of
from qlora_lab.sweep.states import REFUSED
from qlora_lab.sweep.status import find_study, states_of, study_status
from tests.helpers import composed, tiny

LARGE = ["model=llama_7b", "trainer.batch_size=16", "trainer.micro_batch_size=16", "tracking=none"]


def large(runs_dir: Path, *overrides: str) -> RunConfig:
    return composed(*LARGE, "launcher=slurm", "launcher.gpu_memory_gb=8", f"paths.runs_dir={runs_dir}", *overrides)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Two runs that fit 8 GiB and two that do not, the first of which has finished all the same."""
    arms = {"1": large(tmp_path, "trainer.gradient_checkpointing=true"), "16": large(tmp_path)}
    points = [
        ({"arm": arm, "seed": str(seed)}, replace(config, seed=seed)) for arm, config in arms.items() for seed in (0, 1)
    ]
    before = make_plan("fits", points)
    finished = RunFolder.create(tmp_path, before.runs[2].run_id, before.runs[2].config)
    finished.begin()
    finished.end(FINISHED, 1.0)
    return make_plan("fits", points)


def test_what_does_not_fit_is_refused_and_the_others_go_on(plan: Plan) -> None:
    assert [run.state for run in plan.runs] == [NEW, NEW, FINISHED, REFUSED]
    assert [run.run_id for run in plan.to_do(retry_failed=True)] == [run.run_id for run in plan.runs[:2]]
    text = plan.text()
    assert "4 runs: 2 new, 1 finished, 1 refused" in text
    assert f"1 refused, such as run {plan.runs[3].run_id} (arm=16 seed=1): the run needs 11.8 GiB at its peak" in text
    plan.check_any_fits()
    record = plan.write()
    assert ["refusal" in run for run in record["runs"]] == [False, False, False, True]
    status = study_status(
        *(lambda found: (found, states_of(found)))(find_study(plan.runs_dir, "fits")), datetime.now(UTC)
    )
    assert status.states == {NEW: 2, FINISHED: 1, REFUSED: 1}
    assert [(each.cause, each.runs) for each in status.failures] == [(REFUSED, 1)]
    assert "1 refused: the run needs 11.8 GiB at its peak" in status.text()


def test_only_what_fits_reaches_the_launcher(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []
    monkeypatch.setitem(launch.LAUNCHERS, "slurm", lambda plan, folders, launcher: reached.extend(folders) or True)
    monkeypatch.setattr("qlora_lab.sweep.site.check_before_submitting", lambda plan, launcher: None)
    monkeypatch.setattr(study, "_answer_text", lambda plan, record: "the answer")
    with pytest.raises(SystemExit):  # the launcher above does nothing
        study.run_study(plan, "run")
    assert [folder.run_id for folder in reached] == [run.run_id for run in plan.runs[:2]]
    assert not (plan.runs_dir / plan.runs[3].run_id).exists()


def test_a_study_of_which_no_run_fits_is_refused(tmp_path: Path) -> None:
    none = make_plan("none", [({"seed": str(seed)}, replace(large(tmp_path), seed=seed)) for seed in (0, 1)])
    with pytest.raises(ConfigError, match=r"no run of study none fits: the run needs 11\.8 GiB .* would fit with"):
        study.run_study(none, "run")
    assert not (tmp_path / "studies").exists()


def test_a_larger_card_takes_the_same_runs(plan: Plan, tmp_path: Path) -> None:
    wide = replace(plan.runs[3].config.launcher, gpu_memory_gb=80.0)
    again = planned("fits", [(run.run_id, run.axes, replace(run.config, launcher=wide)) for run in plan.runs])
    assert [run.state for run in again.runs] == [NEW, NEW, FINISHED, NEW]


def test_ids_are_the_same_whichever_card_and_machine_the_micro_batch_is_chosen_for(tmp_path: Path) -> None:
    chosen = {}
    for gib in (6, 10, 80):
        config = large(tmp_path, "trainer.micro_batch_size=auto", f"launcher.gpu_memory_gb={gib}")
        (run,) = make_plan("auto", [({}, config)]).runs
        chosen[run.config.trainer.micro_batch_size] = run.run_id
        assert run.config.trainer.batch_size == 16
    assert len(chosen) == 3 and len(set(chosen.values())) == 1
    (given,) = make_plan("auto", [({}, large(tmp_path))]).runs
    assert given.run_id in chosen.values()


def test_what_runs_share_is_predicted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[int] = Counter()
    original = rooms.plan_memory

    def counted(config: RunConfig, shape: object) -> object:
        calls[config.adapter.rank] += 1
        return original(config, shape)  # type: ignore[arg-type]

    monkeypatch.setattr(rooms, "plan_memory", counted)
    bases = [tiny(tmp_path, f"adapter.rank={rank}") for rank in (4, 8)]
    make_plan(
        "many",
        [
            (
                {"rank": str(base.adapter.rank), "seed": str(seed), "lr": str(rate)},
                replace(base, seed=seed, optim=optim),
            )
            for base in bases
            for rate, optim in ((rate, replace(base.optim, learning_rate=rate)) for rate in (1e-4, 2e-4, 3e-4))
            for seed in range(20)
        ],
    )
    assert calls == {4: 2, 8: 2}, "to share the cores among what fits, and in the plan"


def test_few_runs_have_the_machine_for_themselves(tmp_path: Path) -> None:
    config = tiny(tmp_path, "trainer.device=cpu", "trainer.compute_dtype=float32", "launcher=local")
    config = replace(config, trainer=replace(config.trainer, micro_batch_size=1))
    alone = (predict(config).peak_bytes or 0) - SHARED_BYTES
    room_for_four = round(RESERVED_BYTES) + SHARED_BYTES + 4 * alone + 1000
    machine = Hardware("a laptop", frozenset(), cores=8, gpus=(), memory_bytes=room_for_four)
    assert Needs(machine, runs=1)(config).refusal is None
    fixed = replace(config, launcher=replace(config.launcher, max_parallel=8))
    why = Needs(machine, runs=100)(fixed).refusal
    assert why is not None and "GiB of host memory, shared by 8 runs" in why
    assert why.endswith("it would fit with launcher.max_parallel=4")
    assert side_by_side([(config, Needs(machine, runs=3)(config))] * 3, machine) == (3, None)


@pytest.mark.parametrize("launcher", ["local", "pool"])
def test_no_more_runs_are_executed_at_once_than_fit(
    tmp_path: Path, launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path, "trainer.device=cpu", "trainer.compute_dtype=float32", f"launcher={launcher}")
    config = replace(config, trainer=replace(config.trainer, micro_batch_size=1))
    alone = (predict(config).peak_bytes or 0) - SHARED_BYTES
    room_for_four = round(RESERVED_BYTES) + SHARED_BYTES + 4 * alone + 1000
    machine = Hardware("a laptop", frozenset(), cores=8, gpus=(), memory_bytes=room_for_four)
    need = Needs(machine, runs=100)(config)
    assert need.refusal is None and need.room is not None and need.room.runs == 4
    count, why = side_by_side([(config, need)] * 100, machine)
    assert count == 4 and why is not None and why.startswith("at most 4 of 8 runs at once, since one needs up to ")
    assert Needs(machine, runs=100).side_by_side(config) == 4 and prepare(config, machine).trainer.threads == 2
    monkeypatch.setattr(site.hardware, "detect", lambda: machine)
    runs = [PlannedRun(f"{number:012}", {}, config, NEW, need=need) for number in range(100)]
    plan = Plan("study", tmp_path, runs, repeated=0)
    assert site.submission(plan, runs, config.launcher).text().splitlines()[1:] == [why]
    larger = replace(machine, memory_bytes=10 * room_for_four)
    assert side_by_side([(config, Needs(larger, runs=100)(config))] * 100, larger) == (8, None)
    too_small = Needs(replace(machine, memory_bytes=round(RESERVED_BYTES)), runs=100)(config)
    assert too_small.refusal is not None and too_small.room is not None and too_small.room.runs == 1


def test_groups_say_peaks_micro_batches_and_what_is_not_predicted(plan: Plan, tmp_path: Path) -> None:
    others = make_plan("t5", [({}, tiny(tmp_path, "launcher=slurm"))])
    groups = memory_groups((run.config, run.need) for run in (*plan.runs, *others.runs) if run.need is not None)
    first, second = groups
    assert (first.model, first.quant, first.runs, first.refused, first.micro_batch_sizes) == (
        "llama_7b",
        "nf4",
        4,
        2,
        [16],
    )
    assert first.predicted_gib is not None and first.predicted_gib[0] < 7 < 11 < first.predicted_gib[1]
    assert second.fits_in is None
    parts = first.components_gib
    assert parts is not None and parts["embeddings"] == 32000 * 4096 * 2 / GIB  # bfloat16 on a GPU
    peak = sum(parts.values())
    assert peak == pytest.approx(first.predicted_gib[1])
    assert first.card == "RTX A4000 (16 GB)", "the largest of its runs needs 11.8 GiB"
    on_slurm = [(run.config, run.need) for run in plan.runs if run.need is not None]
    two_a_card = [(config, replace(need, room=Room("GPU", 8 * GIB, 2, ""))) for config, need in on_slurm]
    assert smallest_card(two_a_card) == "A100 (40 GB)"
    many_a_card = [(config, replace(need, room=Room("GPU", 8 * GIB, 20, ""))) for config, need in on_slurm]
    assert smallest_card(many_a_card) is None
    on_a_cpu = [(replace(config, trainer=replace(config.trainer, device="cpu")), need) for config, need in on_slurm]
    assert smallest_card(on_a_cpu) is None
    text = memory_text(groups)
    assert ", smallest card that fits: RTX A4000 (16 GB)" in text
    assert "llama_7b nf4, micro-batch 16: " in text and "must fit a GPU of 8.0 GiB, 2 of 4 runs refused" in text
    assert f"the largest, llama_7b nf4, {peak:.1f} GiB: packed weights 3.0 GiB, " in text
    assert "nested absmax" not in text  # less than a hundredth
    assert "not known: set launcher.gpu_memory_gb" in memory_text([second])


def test_the_plan_is_told_to_programs(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    told = json.loads(preview_of(plan).to_json())
    assert told["states"] == {NEW: 2, FINISHED: 1, REFUSED: 1}
    assert [run["state"] for run in told["runs"]] == [NEW, NEW, FINISHED, REFUSED]
    (refused,) = told["refused"]
    assert refused["axes"] == {"arm": "16", "seed": "1"} and "11.8 GiB" in refused["reason"]
    assert told["memory"][0]["fits_in"]["total_bytes"] == 8 * GIB
    assert told["commit"] == code_commit() and told["memory"][0]["card"] == "RTX A4000 (16 GB)"
    assert told["submission"]["runs"] == 2 and told["submission"]["arrays"] is None
    assert "got no scontrol" in told["submission"]["not_known"]
    assert told["forecast"]["runs"] == 2 and told["forecast"]["inodes"] > 0
