"""A finished run's model is opened as the run left it, or refused."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlora_lab import run as runs
from qlora_lab.adapters.lora import adapted_layers
from qlora_lab.errors import ConfigError, ModelError, RunFolderError
from qlora_lab.evaluation.candidates import alone, base_of, trained
from qlora_lab.evaluation.run_model import RunModel, open_model, open_run
from qlora_lab.models.warm import WarmBase
from qlora_lab.runs.find import find_run
from qlora_lab.runs.folder import RunFolder
from tests.evaluation.finished_runs import finished, planned

QUICK = ("optim.learning_rate=0.05", "evaluation.rows=4", "data.source.families=[nth_word]")
FULL = ("adapter=none", "quant=none", "trainer.compute_dtype=bfloat16", "model.new_tokens=['<a>']")
NEW_TOKENS = ("model.new_tokens=['<a>']", "adapter.trained_modules=[embed_tokens]")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return finished(tmp_path_factory.mktemp("runs"), *QUICK)


def copy_of(folder: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(folder.path, tmp_path / folder.run_id)
    return RunFolder(tmp_path / folder.run_id)


def loss(opened: RunModel) -> float:
    """Evaluate as the run did at its end, on the rows that it held out."""
    assert opened.config is not None
    bench = runs.build(opened.config)
    outcome = runs._evaluate(replace(bench, model=opened.model, tokenizer=opened.tokenizer), opened.config)
    return outcome.metrics["eval/loss"]


def test_an_opened_run_scores_what_it_scored(run_folder: RunFolder) -> None:
    opened = open_run(run_folder.path)
    assert adapted_layers(opened.model) and not opened.model.training  # not merged
    assert loss(opened) == run_folder.result()["metrics"]["eval/loss"]


@pytest.mark.parametrize("overrides", [FULL, NEW_TOKENS], ids=["full", "new tokens"])
def test_so_does_one_that_trained_more_than_adapters(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    folder = finished(tmp_path, *QUICK, *overrides)
    assert loss(open_run(folder.path)) == folder.result()["metrics"]["eval/loss"]


def test_the_base_alone_is_what_the_run_started_from(run_folder: RunFolder, tmp_path: Path) -> None:
    base = base_of(run_folder.config())
    opened = open_model(alone(base, tmp_path))
    assert not adapted_layers(opened.model)
    built = runs.build(run_folder.config())  # its adapters start at zero
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(opened.model(ids).logits, built.model(ids).logits, rtol=0, atol=1e-6)


def test_the_base_of_two_runs_is_one_candidate(run_folder: RunFolder, tmp_path: Path) -> None:
    config = run_folder.config()
    other = replace(config, adapter=replace(config.adapter, rank=2), model=replace(config.model, name="renamed"))
    assert base_of(other).settings() == base_of(config).settings()
    int4 = replace(config, quant=replace(config.quant, format="int4"))
    assert alone(base_of(int4), tmp_path).path != alone(base_of(config), tmp_path).path


def test_runs_on_one_base_share_it_in_memory(run_folder: RunFolder) -> None:
    bases = WarmBase()
    first, second = (open_model(trained(run_folder), bases=bases) for _ in range(2))
    assert first.model.model.embed_tokens.weight is second.model.model.embed_tokens.weight


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is new, and only finished runs are evaluated"):
        open_run(planned(tmp_path).path)


def test_weights_that_are_not_the_runs_are_refused(run_folder: RunFolder, tmp_path: Path) -> None:
    folder = copy_of(run_folder, tmp_path)
    file = folder.adapter / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is not what run .* ended with"):
        open_run(folder.path)
    file.unlink()
    with pytest.raises(ModelError, match=f"run {folder.run_id} has no weights in"):
        open_run(folder.path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_of_a_gpu_is_refused_without_one(run_folder: RunFolder) -> None:
    candidate = trained(run_folder)
    with pytest.raises(ConfigError, match="trained on a GPU"):
        open_model(replace(candidate, base=replace(candidate.base, device="cuda")))


def test_runs_are_found_by_their_first_digits(run_folder: RunFolder, tmp_path: Path) -> None:
    folder = copy_of(run_folder, tmp_path)
    assert find_run(tmp_path, folder.run_id[:5]).path == folder.path
    assert find_run(tmp_path / "elsewhere", str(folder.path)).path == folder.path
    near = f"0{folder.run_id[1:]}" if folder.run_id[0] != "0" else f"1{folder.run_id[1:]}"
    with pytest.raises(RunFolderError, match=f"'{near}' is no run in .*did you mean '{folder.run_id}'"):
        find_run(tmp_path, near)
    (tmp_path / f"{folder.run_id[:11]}{'0' if folder.run_id[11] != '0' else '1'}").mkdir()
    with pytest.raises(RunFolderError, match="could be any of 2 runs"):
        find_run(tmp_path, folder.run_id[:5])
    with pytest.raises(RunFolderError, match=r"it has no runs; set paths\.runs_dir"):
        find_run(tmp_path / "elsewhere", "abc")
