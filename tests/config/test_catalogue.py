"""The models of conf/model/: what a file says is what Hydra composes, transformers builds and the world publishes."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers.initialization import no_init_weights

from qlora_lab.config.architecture import check_task, linear_layers, total_parameters
from qlora_lab.config.catalogue import described_models, model_named
from qlora_lab.config.schema import CAUSAL, CLASSIFICATION, SEQ2SEQ, ArchitectureConfig, QuantConfig
from qlora_lab.errors import ConfigError
from qlora_lab.memory.plan import plan_memory
from qlora_lab.memory.usual import USUAL_SHAPE, usual_run
from qlora_lab.memory.weights import weight_bytes
from qlora_lab.models.architecture import to_transformers
from tests.helpers import composed

MODELS = {model.name: model for model in described_models()}
BUILDERS = {
    CAUSAL: AutoModelForCausalLM,
    SEQ2SEQ: AutoModelForSeq2SeqLM,
    CLASSIFICATION: AutoModelForSequenceClassification,
}
# Millions of parameters, and of linear weights below the head, as published or counted from published configs.
PUBLISHED = {
    "flan_t5_small": (77.0, 44.0),
    "t5_base": (247.6, 198.2),
    "t5_large": (783.2, 717.2),
    "flan_t5_xl": (2849.8, 2717.9),
    "flan_t5_xxl": (11135.3, 10871.6),
    "roberta_large": (355.4, 302.0),
    "opt_125m": (125.2, 84.9),
    "opt_350m": (331.2, 303.0),
    "opt_13b": (12853.5, 12582.9),
    "bloom_560m": (559.2, 302.0),
    "bloom_7b1": (7069.0, 6039.8),
    "pythia_70m": (70.4, 18.9),
    "pythia_12b": (11846.1, 11324.6),
    "mpt_7b": (6649.3, 6442.5),
    "llama_7b": (6738.4, 6476.0),
    "llama_13b": (13015.9, 12687.8),
    "llama_33b": (32528.9, 32102.2),
    "llama_65b": (65285.7, 64760.1),
    "llama2_70b": (68976.6, 68451.0),
    "llama3.2_1b": (1235.8, 973.1),
    "llama3.1_8b": (8030.3, 6979.3),
    "mistral_7b": (7248.0, 6979.3),
    "qwen2.5_0.5b": (494.0, 357.8),
    "qwen2.5_72b": (72706.2, 70212.6),
    "qwen3_0.6b": (596.0, 440.4),
    "qwen3_32b": (32762.1, 31205.6),
    "smollm2_135m": (134.5, 106.2),
    "smollm2_360m": (361.8, 314.6),
    "smollm2_1.7b": (1711.4, 1610.6),
    "gemma2_2b": (2614.3, 2024.3),
    "gemma3_270m": (268.1, 100.3),
}


def numbers(name: str) -> ArchitectureConfig:
    architecture = MODELS[name].architecture
    assert architecture is not None
    return architecture


def built_parameters(architecture: ArchitectureConfig, task: str) -> int:
    """Count what transformers builds. It ties T5's head, which the v1.1 and Flan checkpoints keep apart."""
    with torch.device("meta"), no_init_weights():
        model = BUILDERS[task].from_config(to_transformers(architecture))
    model.tie_weights()
    built = sum(weight.numel() for weight in model.parameters())
    own_head = architecture.model_type == "t5" and not architecture.tie_embeddings
    return built + architecture.vocab_size * architecture.hidden_size if own_head else built


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_transformers_builds(name: str) -> None:
    """Of one layer and of two, built without memory; all layers of a model are alike."""
    one, two = (
        built_parameters(dataclasses.replace(numbers(name), num_layers=layers), MODELS[name].task) for layers in (1, 2)
    )
    assert total_parameters(numbers(name)) == one + (numbers(name).num_layers - 1) * (two - one)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    layers = linear_layers(numbers(name))
    assert layers is not None
    linear = sum(out_features * in_features for _, out_features, in_features in layers)
    total = total_parameters(numbers(name))
    assert total is not None
    assert (round(total / 1e6, 1), round(linear / 1e6, 1)) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["opt_350m", "qwen2.5_0.5b", "smollm2_135m", "tiny_random"])
def test_a_file_means_what_hydra_composes(name: str) -> None:
    assert model_named(name) == composed(f"model={name}").model


def test_every_model_has_a_hub_id_and_its_own_task() -> None:
    for name, model in MODELS.items():
        assert model.hub_id is not None or model.source != "hub", name
        assert model.max_length_tokens <= numbers(name).max_position, name
        check_task(model)


def test_a_task_that_the_architecture_does_not_do_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.task must be seq2seq for a model of type 't5'; got 'causal'"):
        check_task(dataclasses.replace(MODELS["t5_small"], task=CAUSAL))


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="got 'llama_56b'; did you mean 'llama_65b'"):
        model_named("llama_56b")


def test_the_command_prints_a_table_without_torch() -> None:
    code = (
        "import runpy, sys; sys.argv = ['models', 'llama_65b', 'gemma3']; "
        "runpy.run_module('qlora_lab.models', run_name='__main__'); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()[:4]]
    assert [line[0] for line in lines[1:]] == ["gemma3_270m", "gemma3_1b", "llama_65b"]
    # 65,286 M x 2 bytes; 64,760 M weights x (0.5 + 1/64 + 4/(64 x 256)) bytes, and 525 M x 2 bytes
    sizes = ["65,285.7", "M", "130.57", "GB", "34.46", "GB"]
    assert lines[-1][1:-2] == ["causal", "huggyllama/llama-65b", *sizes]
    usual = plan_memory(usual_run(model_named("llama_65b")), USUAL_SHAPE)
    assert lines[-1][-2:] == [f"{usual.training / 1e9:.2f}", "GB"]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_that_says_its_numbers_has_a_memory_plan(name: str) -> None:
    plan = plan_memory(usual_run(MODELS[name]), USUAL_SHAPE)
    weights = weight_bytes(MODELS[name].architecture, QuantConfig(), 2)
    assert 0.9 * weights.total < plan.training < 2 * weights.total + 2e9
