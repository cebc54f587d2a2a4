"""What an adapter's folder says of the adapter, and what is said where it says nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora_lab.errors import ModelError
from qlora_lab.export import main as export
from qlora_lab.runs.folder import RunFolder
from qlora_lab.serving.shared_base import SharedBase
from tests.evaluation.finished_runs import finished
from tests.serving.adapters import opened_base


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run in another prompt format than its base's."""
    return finished(tmp_path_factory.mktemp("runs"), "data.prompt_format=chatml")


def moved(folder: Path, to: Path, **settings: Any) -> Path:
    shutil.copytree(folder, to)
    file = to / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return to


def test_a_runs_adapter_is_the_runs_wherever_it_is_named(chatml: RunFolder, tmp_path: Path) -> None:
    run = RunFolder(shutil.copytree(chatml.path, tmp_path / chatml.run_id))
    shared = SharedBase(opened_base(tmp_path), tmp_path)
    for name, where in (("id", run.run_id), ("run", run.path), ("adapter", run.adapter)):
        registered = shared.register(name, where)
        assert (registered.prompt_format, registered.notes) == ("chatml", ())
    (run.adapter / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"is not what run .* ended with"):
        shared.register("changed", run.adapter)


def test_an_exported_adapter_brings_its_prompt_format(chatml: RunFolder, tmp_path: Path) -> None:
    export([str(chatml.path), "--out", str(tmp_path / "out")])
    (folder,) = (tmp_path / "out/adapters").iterdir()
    registered = SharedBase(opened_base(tmp_path), tmp_path).register("mine", folder)
    assert (registered.prompt_format, registered.notes) == ("chatml", ())


def test_what_a_folder_leaves_open_is_said(chatml: RunFolder, tmp_path: Path) -> None:
    shared = SharedBase(opened_base(tmp_path), tmp_path)
    named = shared.register("named", moved(chatml.adapter, tmp_path / "named"))
    said = (
        "adapter 'named' does not say in which prompt format it was trained; it is asked in that of tiny_random in nf4"
    )
    assert (named.prompt_format, named.notes) == ("plain", (f"{said}, plain",))
    nameless = shared.register("nameless", moved(chatml.adapter, tmp_path / "other", base_model_name_or_path=None))
    assert nameless.notes[0].startswith("adapter 'nameless' does not name the base that it is for")
