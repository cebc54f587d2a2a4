"""Placements by path alone, on the linears of real transformers models."""

from functools import cache

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from qlora_lab.config.placement import layer_index, match_linears
from qlora_lab.errors import ConfigError

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": None,
}
MODELS = {
    "llama": (AutoModelForCausalLM, {**SMALL}),
    "opt": (AutoModelForCausalLM, {**SMALL, "word_embed_proj_dim": 16}),  # as OPT-350m: projections outside layers
    "gpt_neox": (AutoModelForCausalLM, {**SMALL}),
    "bloom": (AutoModelForCausalLM, {**SMALL}),
    "mpt": (AutoModelForCausalLM, {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4}),
    "phi3": (AutoModelForCausalLM, {**SMALL}),
    "roberta": (AutoModelForSequenceClassification, {**SMALL, "pad_token_id": 1}),
    "t5": (AutoModelForSeq2SeqLM, {"vocab_size": 64, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 48}),
}
# One layer of each by hand: what attention, the feed-forward block, and query and value are called there.
# The first matched layer of the model is compared.
EXPECTED = {
    "llama": ("q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj", "q_proj v_proj"),
    "opt": ("k_proj v_proj q_proj out_proj", "fc1 fc2", "v_proj q_proj"),
    "gpt_neox": ("query_key_value dense", "dense_h_to_4h dense_4h_to_h", "query_key_value"),
    "bloom": ("query_key_value dense", "dense_h_to_4h dense_4h_to_h", "query_key_value"),
    "mpt": ("Wqkv out_proj", "up_proj down_proj", "Wqkv"),
    "phi3": ("o_proj qkv_proj", "gate_up_proj down_proj", "qkv_proj"),
    "roberta": ("query key value dense", "dense dense", "query value"),
    "t5": ("q k v o", "wi wo", "q v"),
}


@cache
def linears(model_type: str) -> tuple[str, ...]:
    model_class, numbers = MODELS[model_type]
    with torch.device("meta"):
        model = model_class.from_config(AutoConfig.for_model(model_type, **numbers))
    return tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))


def matched(model_type: str, placement: str, regex: str | None = None, last_k: int | None = None) -> list[str]:
    return match_linears(linears(model_type), placement, regex, last_k)


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize(("place", "placement"), enumerate(["attention", "feed_forward", "query_value"]))
def test_blocks_are_told_apart(model_type: str, place: int, placement: str) -> None:
    names = matched(model_type, placement)
    first = names[0].split(".")[: next(i for i, part in enumerate(names[0].split(".")) if part.isdigit()) + 1]
    in_first_layer = [name.rpartition(".")[2] for name in names if name.split(".")[: len(first)] == first]
    assert in_first_layer == EXPECTED[model_type][place].split()


@pytest.mark.parametrize("model_type", MODELS)
def test_every_linear_of_a_layer_is_attention_or_feed_forward(model_type: str) -> None:
    attention, feed_forward = matched(model_type, "attention"), matched(model_type, "feed_forward")
    in_layers = [name for name in matched(model_type, "all_linear") if layer_index(name) is not None]
    assert sorted(attention + feed_forward) == sorted(in_layers)


@pytest.mark.parametrize("model_type", MODELS)
def test_heads_are_never_matched(model_type: str) -> None:
    left_out = set(linears(model_type)) - set(matched(model_type, "all_linear"))
    expected = {"classifier.dense", "classifier.out_proj"} if model_type == "roberta" else {"lm_head"}
    assert left_out == expected
    with pytest.raises(ConfigError, match=r"adapter\.target_regex"):
        matched(model_type, "regex", "lm_head|classifier.*")


def test_linears_outside_layers_are_reached_by_all_linear_only() -> None:
    outside = ["model.decoder.project_out", "model.decoder.project_in"]
    assert [name for name in matched("opt", "all_linear") if layer_index(name) is None] == outside
    assert matched("opt", "regex", ".*project_in") == outside[1:]
    assert not set(outside) & set(matched("opt", "feed_forward") + matched("opt", "attention"))
    assert not set(outside) & set(matched("opt", "all_linear", last_k=2))


def test_regex_matches_whole_paths() -> None:
    assert matched("llama", "regex", r".*\.1\.mlp\.(up|down)_proj") == [
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]
    with pytest.raises(ConfigError, match="whole path"):
        matched("llama", "regex", "q_proj")


def test_last_layers() -> None:
    assert {layer_index(name) for name in matched("llama", "all_linear", last_k=1)} == {1}
    assert matched("llama", "all_linear", last_k=2) == matched("llama", "all_linear")
    assert matched("llama", "query_value", last_k=1) == [f"model.layers.1.self_attn.{x}_proj" for x in "qv"]


def test_last_layers_are_counted_in_every_stack() -> None:
    names = matched("t5", "all_linear", last_k=1)
    assert {".".join(name.split(".")[:3]) for name in names} == {"encoder.block.1", "decoder.block.1"}


def test_query_and_value_are_those_of_attention() -> None:
    """RWKV's feed-forward block has a `value` too."""
    names = ["blocks.0.attention.key", "blocks.0.attention.value", "blocks.0.feed_forward.value"]
    assert match_linears(names, "query_value", None, None) == names[1:2]


def test_more_than_nine_layers_are_ordered_as_numbers() -> None:
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(12)]
    assert match_linears(names, "all_linear", None, 3) == names[9:]


@pytest.mark.parametrize(
    ("placement", "regex", "last_k", "message"),
    [
        ("regex", r".*\.q_porj", None, r"adapter\.target_regex .* got '\.\*\\\.q_porj'.*did you mean 'q_proj'"),
        ("regex", "(", None, r"adapter\.target_regex must be a regular expression; got '\('"),
        ("all_linear", None, 3, r"adapter\.last_k_layers must be at most 2, the layers of the model; got 3"),
        ("regex", r".*\.0\..*", 1, r"adapter\.last_k_layers 1 leaves none of the 7 layers"),
    ],
)
def test_what_matches_nothing_is_refused(placement: str, regex: str | None, last_k: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        matched("llama", placement, regex, last_k)
    assert "\n" not in str(refusal.value)


def test_a_placement_that_the_model_does_not_have_is_refused_with_what_it_has() -> None:
    names = ["model.layers.0.mixer.in_proj", "model.layers.1.mixer.in_proj"]
    message = r"adapter\.placement 'query_value' matches no linear layer .* model\.layers\.N\.mixer\.in_proj"
    with pytest.raises(ConfigError, match=message):
        match_linears(names, "query_value", None, None)
    with pytest.raises(ConfigError, match="no linear layers"):
        match_linears([], "all_linear", None, None)
