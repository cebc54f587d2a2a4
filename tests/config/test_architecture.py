"""The light table of linear layers against transformers' own models, built without memory."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from qlora_lab.config.architecture import adapter_parameters, linear_layers, total_parameters
from qlora_lab.config.families import FAMILIES, head_size
from qlora_lab.config.schema import ArchitectureConfig
from qlora_lab.errors import ConfigError
from qlora_lab.models.architecture import to_transformers
from tests.config.test_catalogue import BUILDERS, built_parameters

SMOLLM2_135M = ArchitectureConfig("llama", 576, 30, 9, 3, 1536, 49152, tie_embeddings=True, max_position=8192)


def small(model_type: str, *, tie_embeddings: bool = False) -> ArchitectureConfig:
    one_head_kind = not FAMILIES[model_type].grouped_query
    return ArchitectureConfig(
        model_type,
        hidden_size=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4 if one_head_kind else 2,
        feed_forward_size=256 if model_type in ("bloom", "mpt") else 96,
        vocab_size=100,
        tie_embeddings=tie_embeddings,
        max_position=128,
    )


def meta_model(architecture: ArchitectureConfig) -> nn.Module:
    with torch.device("meta"):
        return BUILDERS[FAMILIES[architecture.model_type].task].from_config(to_transformers(architecture))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_linear_layers_are_those_of_transformers(model_type: str) -> None:
    architecture = small(model_type)
    built = [
        (name, module.out_features, module.in_features)
        for name, module in meta_model(architecture).named_modules()
        if isinstance(module, nn.Linear) and name.partition(".")[0] not in ("lm_head", "embed_out", "classifier")
    ]
    assert linear_layers(architecture) == built


@pytest.mark.parametrize("model_type", FAMILIES)
def test_head_sizes_are_what_transformers_takes_by_itself(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, hidden_size=96, num_attention_heads=3)
    taken = getattr(config, "head_dim", None) or 96 // 3
    architecture = small(model_type)
    architecture.hidden_size, architecture.num_heads = 96, 3
    assert head_size(architecture) == taken


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_total_parameters_are_those_of_transformers(model_type: str, tie_embeddings: bool) -> None:
    architecture = small(model_type, tie_embeddings=tie_embeddings)
    assert total_parameters(architecture) == built_parameters(architecture, FAMILIES[model_type].task)


@pytest.mark.parametrize(
    ("architecture", "total", "linear"),
    [
        # published sizes, in whole parameters where the model card gives them, and in millions elsewhere
        (SMOLLM2_135M, 134_515_008, 106_168_320),
        (ArchitectureConfig("llama", 4096, 32, 32, 32, 11008, 32000), 6_738_415_616, 6_476_005_376),
        (ArchitectureConfig("qwen2", 896, 24, 14, 2, 4864, 151936, tie_embeddings=True), 494_032_768, 357_826_560),
    ],
    ids=["SmolLM2-135M", "LLaMA-7B", "Qwen2.5-0.5B"],
)
def test_published_sizes(architecture: ArchitectureConfig, total: int, linear: int) -> None:
    layers = linear_layers(architecture)
    assert layers is not None
    assert total_parameters(architecture) == total
    assert sum(out_features * in_features for _, out_features, in_features in layers) == linear


def test_adapter_parameters_of_smollm2() -> None:
    layers = linear_layers(SMOLLM2_135M)
    assert layers is not None
    assert adapter_parameters(layers, rank=8) == 2_442_240  # published; worked out in tests/adapters/test_lora.py


def test_an_unknown_model_type_is_none() -> None:
    architecture = small("llama")
    architecture.model_type = "mamba"
    assert linear_layers(architecture) is None
    assert total_parameters(architecture) is None


@pytest.mark.parametrize(
    ("heads", "kv_heads", "message"),
    [
        (5, 5, r"model\.architecture\.num_heads must divide hidden_size \(64\); got 5"),
        (4, 3, r"model\.architecture\.num_kv_heads must divide num_heads \(4\); got 3"),
    ],
)
def test_impossible_heads_are_refused(heads: int, kv_heads: int, message: str) -> None:
    architecture = small("llama")
    architecture.num_heads, architecture.num_kv_heads = heads, kv_heads
    with pytest.raises(ConfigError, match=message):
        linear_layers(architecture)
