"""Models on the hub: from its cache, and what is said where it refuses."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session, constants

from qlora_lab.config.schema import ModelConfig
from qlora_lab.errors import ModelError
from qlora_lab.models.load import commit_of, load_model, load_tokenizer
from tests.hub_stand_in import hub_server
from tests.models.loading import NF4, UP, architecture, edit_weights, loaded


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def test_a_model_in_the_hub_cache_loads_offline(hub_cache: Path, make_folder, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub_cache / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(make_folder(eos_token="<end>", pad_token="<pad>"), repository / "snapshots" / commit)
    config = ModelConfig("m", "hub", hub_id="some/model", max_length_tokens=128, architecture=architecture())
    assert loaded(config).config.hidden_size == 32
    assert load_tokenizer(config, tmp_path)("a b")["input_ids"] == [2, 3]


def test_a_revision_is_loaded_as_asked(hub_cache: Path, make_folder, tmp_path: Path) -> None:
    repository = hub_cache / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    for digit, name, value in (("1", "main", 1.0), ("2", "tuned", 2.0)):
        folder = make_folder(name, eos_token="<end>" if name == "main" else "<pad>", unk_token="a")
        edit_weights(folder, lambda weights, value=value: weights[UP].fill_(value))
        (repository / "refs" / name).write_text(digit * 40)
        shutil.copytree(folder, repository / "snapshots" / (digit * 40))
    config = ModelConfig("m", "hub", hub_id="some/model", revision="tuned", max_length_tokens=128)
    with pytest.raises(
        ModelError, match=r"cache at revision '3{40}' \(model\.revision=main takes what is there\), and"
    ):
        loaded(replace(config, revision="3" * 40))
    model = loaded(config)
    assert model.get_parameter(UP)[0, 0] == 2.0
    assert commit_of(model) == "2" * 40
    for _ in range(2):  # quantized, and out of the cache of bases
        again = {"compute_dtype": torch.float32, "device": "cpu", "cache_dir": tmp_path, "seed": 0, "cache_bases": True}
        assert commit_of(load_model(config, NF4, **again)) == "2" * 40
        assert len(list((tmp_path / "bases").glob("*/manifest.json"))) == 1
    assert load_tokenizer(config, tmp_path).eos_token == "<pad>"


def test_a_model_that_is_not_cached_is_refused_offline(hub_cache: Path, tmp_path: Path) -> None:
    config = ModelConfig("m", "hub", hub_id="some/model")
    for load in (loaded, lambda config: load_tokenizer(config, tmp_path)):
        with pytest.raises(
            ModelError, match=r"'some/model' is neither .*cannot be reached; .*HF_HOME.*path="
        ) as refusal:
            load(config)
        assert "\n" not in str(refusal.value)


@pytest.fixture
def asked_hub(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub of our own, which the libraries ask."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub_server() as address:
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace(constants.ENDPOINT, address))
        monkeypatch.setattr(constants, "ENDPOINT", address)
        close_session()  # one that was opened before has other settings
        yield address
        close_session()


@pytest.mark.parametrize(
    ("hub_id", "revision", "sentence"),
    [
        (
            "meta/gated-7b",
            None,
            r"'meta/gated-7b' is gated on the hub: accept its licence .* HF_TOKEN .*, or a local copy with "
            r"model\.source=folder model\.path=FOLDER$",
        ),
        (
            "some/absent",
            None,
            r"'some/absent' is neither a folder nor a model on the hub that you may see; .* take a local copy with "
            r"model\.source=folder model\.path=FOLDER$",
        ),
        (
            "some/model",
            "old",
            r"'some/model' has no model\.revision 'old' on the hub; set a branch, tag or commit that it has, or take a "
            r"local copy with model\.source=folder model\.path=FOLDER$",
        ),
    ],
)
def test_what_the_hub_refuses_is_explained(
    hub_id: str, revision: str | None, sentence: str, asked_hub: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=sentence) as refusal:
        load_tokenizer(ModelConfig("m", "hub", hub_id=hub_id, revision=revision), tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_tokenizer_that_the_hub_refuses_has_a_local_setting_of_its_own(asked_hub: str, tmp_path: Path) -> None:
    config = ModelConfig("m", "hub", hub_id="some/model", tokenizer="meta/gated-7b")
    with pytest.raises(ModelError, match=r"'meta/gated-7b' is gated .* a local copy with model\.tokenizer=FOLDER$"):
        load_tokenizer(config, tmp_path)
