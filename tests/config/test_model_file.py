"""Memory is planned from the config.json of a model on this machine as from the numbers of a model with a name."""

import json
import runpy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from qlora_lab.config import model_file
from qlora_lab.config.families import FAMILIES, head_size
from qlora_lab.config.model_file import architecture_of, architecture_on_disk
from qlora_lab.config.schema import ModelConfig, RunConfig
from qlora_lab.memory.layer import Shape
from qlora_lab.memory.plan import plan_memory
from qlora_lab.models.architecture import to_transformers
from tests.config.test_architecture import small
from tests.helpers import composed

PLANNED = ("model_type", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "feed_forward_size", "vocab_size")


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_numbers_that_transformers_writes_are_read(model_type: str, tie_embeddings: bool, tmp_path: Path) -> None:
    architecture = small(model_type, tie_embeddings=tie_embeddings or model_type == "roberta")
    to_transformers(architecture).save_pretrained(tmp_path)
    read = architecture_on_disk(ModelConfig("m", "folder", path=str(tmp_path)))
    assert read is not None
    assert [getattr(read, name) for name in PLANNED] == [getattr(architecture, name) for name in PLANNED]
    assert (read.tie_embeddings, head_size(read)) == (architecture.tie_embeddings, head_size(architecture))
    if model_type in ("opt", "roberta"):  # whose positions are weights
        assert read.max_position == architecture.max_position


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        # as the repositories have them: names of older versions, and no word of a head that is as it always is
        (
            {"model_type": "bloom", "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16, "vocab_size": 250880},
            {"hidden_size": 1024, "num_layers": 24, "feed_forward_size": 4096, "tie_embeddings": True},
        ),
        (
            {
                "model_type": "opt",
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "ffn_dim": 4096,
                "word_embed_proj_dim": 512,
                "do_layer_norm_before": False,
                "vocab_size": 50272,
            },
            {"embedding_size": 512, "norm_first": False, "tie_embeddings": True},
        ),
        (
            {
                "model_type": "t5",
                "d_model": 768,
                "num_layers": 12,
                "num_heads": 12,
                "d_ff": 2048,
                "d_kv": 64,
                "feed_forward_proj": "gated-gelu",
                "tie_word_embeddings": False,
                "vocab_size": 32128,
            },
            {"num_decoder_layers": None, "tie_embeddings": False},
        ),
    ],
    ids=["bloom", "opt", "t5"],
)
def test_published_files_are_read(published: dict[str, Any], expected: dict[str, Any]) -> None:
    found = architecture_of(published)
    assert found is not None and asdict(found) | expected == asdict(found)


CACHE_VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"XDG_CACHE_HOME": "{}/xdg"},
        {"HF_HOME": "~/some"},
        {"HF_HOME": "$SCRATCH/some"},
        {"HUGGINGFACE_HUB_CACHE": "~/old"},
        {"HUGGINGFACE_HUB_CACHE": "{}/old", "HF_HUB_CACHE": "$SCRATCH/new"},
    ],
    ids=str,
)
def test_the_hubs_cache_is_where_its_own_library_has_it(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in CACHE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "{}", "SCRATCH": "{}/scratch", **variables}.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    code = runpy.run_path(constants.__file__)
    assert model_file._hub_cache() == Path(code["HF_HUB_CACHE"])
    assert tmp_path in model_file._hub_cache().parents


def test_a_cache_that_may_not_be_read_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_: Path) -> bool:
        raise PermissionError("not yours")

    monkeypatch.setattr(Path, "is_file", forbidden)
    assert architecture_on_disk(ModelConfig("m", "hub", hub_id="some/model")) is None


@pytest.mark.parametrize(
    "config", ["{", "[]", '{"model_type": "gpt2"}', '{"model_type": "llama", "hidden_size": "many"}']
)
def test_what_cannot_be_read_is_not_known(config: str, tmp_path: Path) -> None:
    model = ModelConfig("m", "folder", path=str(tmp_path))
    assert architecture_on_disk(model) is None
    (tmp_path / "config.json").write_text(config)
    assert architecture_on_disk(model) is None


def test_t5_without_gates_is_not_known() -> None:
    config = {"model_type": "t5", "d_model": 8, "num_layers": 1, "num_heads": 1, "d_ff": 8, "vocab_size": 9}
    assert architecture_of(config | {"feed_forward_proj": "gated-gelu"}) is not None
    assert architecture_of(config | {"feed_forward_proj": "relu"}) is architecture_of(config) is None


def test_a_folder_and_the_hubs_cache_are_planned_as_a_model_with_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: RunConfig = composed("model=llama_7b", "trainer.device=cuda", "trainer.compute_dtype=bfloat16")
    architecture = named.model.architecture
    assert architecture is not None
    expected = plan_memory(named, Shape(2, 512))
    folder = tmp_path / "models--some--llama" / "snapshots" / ("1" * 40)
    to_transformers(architecture).save_pretrained(folder)
    (tmp_path / "models--some--llama" / "refs").mkdir()
    (tmp_path / "models--some--llama" / "refs" / "main").write_text("1" * 40)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for place in (
        {"source": "folder", "path": str(folder)},
        {"source": "hub", "hub_id": "some/llama"},
        {"source": "hub", "hub_id": "some/llama", "revision": "1" * 40},
    ):
        model = replace(named.model, **{"architecture": None, "hub_id": None, "revision": None, **place})
        assert plan_memory(replace(named, model=model), Shape(2, 512)) == expected
    half = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 16}
    (folder / "config.json").write_text(json.dumps(half))  # written again
    assert plan_memory(replace(named, model=model), Shape(2, 512)).packed_weights * 2 == expected.packed_weights
