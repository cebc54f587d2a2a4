"""Many adapters on one base: each row gets what it gets alone; what does not fit is refused in a sentence."""

import gc
import json
import shutil
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora_lab.adapters.peft_format import CONFIG, WEIGHTS, load_adapter
from qlora_lab.errors import ConfigError, ModelError, RunFolderError
from qlora_lab.evaluation.candidates import Candidate
from qlora_lab.quant.linear import QuantizedLinear, cached_weights
from qlora_lab.runs.folder import RunFolder
from qlora_lab.serving.pool import AdapterPool
from qlora_lab.serving.shared_base import SharedBase
from qlora_lab.serving.sources import Source, source_of
from tests.evaluation.finished_runs import planned
from tests.serving.adapters import in_int4, opened_base, shared_base, tiny_base

IDS = torch.randint(256, (6, 9), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(shared: SharedBase, ids: Tensor = IDS) -> Tensor:
    return shared.model(ids).logits


@pytest.fixture(scope="module")
def alone(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Tensor]:
    """What each adapter, and the base, gives on a base of its own, as runs are evaluated."""
    found: dict[str | None, Tensor] = {}
    for name, folder in [(None, None), *adapters.items()]:
        model = opened_base(tmp_path_factory.getbasetemp()).model
        if folder is not None:
            load_adapter(model, folder)
        with torch.no_grad():
            found[name] = model(IDS).logits
    return found


@pytest.mark.parametrize("name", ["a", "b", "c", None])
def test_switching_gives_what_the_adapter_gives_alone(
    shared: SharedBase, alone: dict[str | None, Tensor], name: str | None
) -> None:
    shared.switch("d")
    shared.switch(name)
    torch.testing.assert_close(logits(shared), alone[name], rtol=0, atol=0)  # the same ops
    assert name is None or (alone[name] - alone[None]).abs().max() > 0.1


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize(
    "names",
    [
        ["a", "b", "c", "d", None, "a"],
        ["b", None, None, "b", "b", "b"],
        ["c", "a", "a", "a", "c", "a"],
        ["d"] * 6,
        [None] * 6,
    ],
    ids=lambda names: "".join(name or "-" for name in names),
)
def test_rows_with_adapters_of_their_own_get_what_they_get_alone(
    shared: SharedBase, alone: dict[str | None, Tensor], names: list[str | None], expanded: bool
) -> None:
    with cached_weights(shared.model) if expanded else nullcontext(), shared.rows(names):
        mixed = logits(shared)
    for row, name in enumerate(names):
        # Logits reach 80 here, and sums are in another order.
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-3)


def test_one_adapter_in_most_rows_does_not_make_work_for_the_others(
    shared: SharedBase, alone: dict[str | None, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a"] * 7 + ["b", None, "a", "c", "d"]
    rows = [row % len(IDS) for row in range(len(names))]
    worked_out, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda x, y: worked_out.append(x.shape[0] * x.shape[1]) or bmm(x, y))
    for served in (names, ["a"] * 11 + ["b"]):  # the second after all four, with a stack that has them all
        worked_out.clear()
        with shared.rows(served):
            mixed = logits(shared, IDS[rows])
        for row, name in enumerate(served):
            torch.testing.assert_close(mixed[row], alone[name][rows[row]], rtol=1e-4, atol=1e-3)  # as above
        assert max(worked_out) <= (2 * len(names) + 4) * IDS.shape[1]


def test_switching_between_ready_adapters_copies_nothing(shared: SharedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    shared.switch("a")
    shared.switch("b")
    monkeypatch.setattr(AdapterPool, "_on_device", lambda *_: pytest.fail("an adapter was copied"))
    for name in ("a", "b", None, "a"):
        shared.switch(name)


def test_the_base_product_is_worked_out_once_for_all_rows(shared: SharedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    forward = QuantizedLinear.forward
    monkeypatch.setattr(QuantizedLinear, "forward", lambda self, x: rows.append(len(x)) or forward(self, x))
    with shared.rows(["a", "b", None, "c", "a", "d"]):
        logits(shared)
    assert rows == [6] * 14  # 7 linears in each of 2 layers


def test_after_a_batch_of_many_the_adapter_of_before_is_back(shared: SharedBase) -> None:
    shared.switch("a")
    before = logits(shared)
    with pytest.raises(RuntimeError, match="stop"), shared.rows(["b", "c", "b", "c", "b", None]):
        raise RuntimeError("stop")
    assert torch.equal(logits(shared), before)


def test_a_stack_is_kept_while_rows_come_and_go(shared: SharedBase) -> None:
    kinds = []
    for names in (["a", "b", "c"], ["c", "b"], ["a", "a", "c"], ["a", "d"]):
        with shared.rows(names):
            logits(shared, IDS[: len(names)])
            kinds.append(shared._route.now.stack)
    assert kinds[0] is kinds[1] is kinds[2] is not kinds[3]


def test_rows_must_be_as_many_as_the_batch_has(shared: SharedBase) -> None:
    with shared.rows(["a", "b", None, "c"]), pytest.raises(Exception, match="must have 4 rows"):
        logits(shared)


def test_the_least_recently_used_leave_the_device_and_come_back(adapters: dict[str, Path], tmp_path: Path) -> None:
    unlimited = shared_base(tmp_path, adapters)
    sizes = {name: adapter.ready_bytes for name, adapter in unlimited.pool.registered.items()}
    unlimited.switch("a")
    before = logits(unlimited)
    shared = shared_base(tmp_path, adapters, budget_bytes=sizes["a"] + sizes["b"] + sizes["d"])
    for name in ("a", "b", "d", "a"):
        shared.switch(name)
    assert shared.pool.ready_names == ["b", "d", "a"]
    shared.switch("c")
    assert "b" not in shared.pool.ready_names and shared.pool.ready_names[-1] == "c"
    assert shared.pool.ready_bytes <= shared.pool.budget_bytes
    shared.switch("a")
    assert torch.equal(logits(shared), before)
    with pytest.raises(ModelError, match=r"4 adapters at a time take [\d,]+ bytes, more than the budget of"):
        shared.rows(["a", "b", "c", "d"]).__enter__()
    with pytest.raises(ModelError, match=r"adapter 'a' takes .* more than the whole budget of 1,000"):
        shared_base(tmp_path, adapters, budget_bytes=1000)


def test_what_is_evicted_is_freed_also_after_a_batch_of_several(adapters: dict[str, Path], tmp_path: Path) -> None:
    sizes = {name: one.ready_bytes for name, one in shared_base(tmp_path, adapters).pool.registered.items()}
    shared = shared_base(tmp_path, adapters, budget_bytes=max(sizes.values()) + sizes["b"])
    shared.switch("b")
    with shared.rows(["a", "b"]):
        logits(shared, IDS[:2])
    evicted = weakref.ref(shared.pool.ready(["a"])["a"])
    with shared.rows(["c", None]):
        logits(shared, IDS[:2])
        gc.collect()
        assert evicted() is None and "a" not in shared.pool.ready_names
    assert "b" in shared.pool.ready_names, "the one that was switched to is back"


def test_runs_are_served_by_their_ids_and_digits(run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "runs" / run.run_id)
    run = RunFolder(tmp_path / "runs" / run.run_id)
    shared = SharedBase(opened_base(tmp_path, tiny_base()), tmp_path / "runs")
    registered = shared.register("mine", run.run_id[:6])
    assert shared.names == ["mine"] and registered.prompt_format == "plain" and registered.notes == ()
    base = logits(shared)
    shared.switch("mine")
    assert (logits(shared) - base).abs().max() > 1e-3
    int4 = SharedBase(opened_base(tmp_path, in_int4(tiny_base())), tmp_path / "runs")
    assert "was trained on tiny_random in nf4" in int4.register("mine", run.path).notes[0]
    (run.adapter / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"is not what run .* ended with"):
        shared.register("other", run.run_id)
    with pytest.raises(RunFolderError, match="is new, and only finished runs"):
        shared.register("new", planned(tmp_path / "runs", "seed=3").run_id)


def test_an_adapter_of_another_base_is_refused_with_both_names(
    shared: SharedBase, adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(adapters["a"], folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "org/llama"}))
    with pytest.raises(ModelError, match="adapter 'x' is for the base 'org/llama', and this one is 'tiny_random'"):
        shared.register("x", folder)
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "org/tiny_random"}))
    shared.register("x", folder)
    base = tiny_base()
    wider = replace(base, model=replace(base.model, architecture=replace(base.model.architecture, hidden_size=96)))
    said = r"and this one is 'tiny_random in nf4': .*models \(model.architecture.hidden_size 96 and 64\); serve it"
    with pytest.raises(ModelError, match=said):
        shared.register("y", Source(adapters["a"], "a run", wider))


def test_ranks_targets_and_damage_are_refused_and_nothing_is_registered(
    shared: SharedBase, adapters: dict[str, Path], tmp_path: Path
) -> None:
    def refusal(name: str) -> str:
        with pytest.raises(ModelError) as error:
            shared.register("x", tmp_path / name)
        return str(error.value)

    for name in ("rank", "target", "shape", "damaged"):
        shutil.copytree(adapters["a"], tmp_path / name)
    settings = json.loads((tmp_path / "rank/adapter_config.json").read_text())
    (tmp_path / "rank/adapter_config.json").write_text(json.dumps(settings | {"r": 5}))
    assert "must hold lora_A of shape (5, 128) for" in refusal("rank")
    weights = load_file(tmp_path / "target/adapter_model.safetensors")
    renamed = {key.replace("layers.1.", "layers.9."): value for key, value in weights.items()}
    save_file(renamed, tmp_path / "target/adapter_model.safetensors")
    assert "which is no linear layer of this model" in refusal("target")
    cut = {key: value[:, :1].clone() for key, value in weights.items()}
    save_file(cut, tmp_path / "shape/adapter_model.safetensors")
    assert "is it an adapter of another model?" in refusal("shape")
    file = tmp_path / "damaged/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "is damaged" in refusal("damaged")
    assert shared.names == ["a", "b", "c", "d"]
    shared.register("x", adapters["a"])


def test_what_is_no_adapter_here_is_refused(shared: SharedBase, adapters: dict[str, Path], tmp_path: Path) -> None:
    for name, where, said in [
        ("x", "nothing", "'nothing' must be a run, a folder with adapter_config.json, or a hub id"),
        ("x", "org/adapter@v1", "hf download org/adapter --revision v1 adapter_config.json adapter_model.safetensors"),
        ("a", adapters["a"], "there is an adapter 'a' already"),
        ("tiny_random", adapters["a"], "not the base's"),
        ("two words", adapters["a"], "an adapter's name must be"),
    ]:
        with pytest.raises(ModelError) as error:
            shared.register(name, where)
        assert said in str(error.value)
    with pytest.raises(ModelError, match="the adapter must be one of a, b, c, d; got 'e'"):
        shared.switch("e")
    with_tokens = tmp_path / "with_tokens"
    shutil.copytree(adapters["a"], with_tokens)
    key, values = "base_model.model.model.embed_tokens.weight", torch.zeros(384, 64)
    save_file(load_file(with_tokens / WEIGHTS) | {key: values}, with_tokens / WEIGHTS)
    settings = json.loads((with_tokens / CONFIG).read_text())
    (with_tokens / CONFIG).write_text(json.dumps(settings | {"modules_to_save": ["embed_tokens"]}))
    with pytest.raises(ModelError, match=r"adapter 'x' trained 'model\.embed_tokens\.weight' as a whole"):
        shared.register("x", with_tokens)
    full = planned(tmp_path / "runs", "adapter=none", "quant=none")
    with pytest.raises(ModelError, match="trained every weight and has no adapter"):
        source_of(Candidate("full", full.path, tiny_base(), full))
    with pytest.raises(ConfigError, match="only models that continue a text are served"):
        opened = opened_base(tmp_path)
        base = replace(opened.base, model=replace(opened.base.model, task="seq2seq"))
        SharedBase(replace(opened, base=base), tmp_path)


def test_a_peft_adapter_of_the_hubs_cache_is_found_without_the_network(
    shared: SharedBase, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "models--org--adapter"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("0" * 40)
    shutil.copytree(adapters["b"], place / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    registered = shared.register("from-hub", "org/adapter")
    assert registered.description == "org/adapter of the hub"
    shared.switch("b")
    before = logits(shared)
    shared.switch("from-hub")
    assert torch.equal(logits(shared), before)


def test_adapters_stay_in_their_files_until_they_are_used(shared: SharedBase, adapters: dict[str, Path]) -> None:
    mapped = Path("/proc/self/maps").read_text()
    assert all(str(folder / "adapter_model.safetensors") in mapped for folder in adapters.values())
    assert shared.pool.ready_names == []
