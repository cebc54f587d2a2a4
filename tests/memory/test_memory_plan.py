"""The command that plans memory, and what fits a card."""

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies

from qlora_lab.config import hardware
from qlora_lab.config.families import FAMILIES
from qlora_lab.config.schema import CLASSIFICATION, RunConfig
from qlora_lab.errors import ConfigError
from qlora_lab.memory.fit import largest_rows, longest_tokens
from qlora_lab.memory.layer import Shape
from qlora_lab.memory.optimizer import PAGED_BYTES
from qlora_lab.memory.plan import paged_bytes, plan_memory
from qlora_lab.memory.profiles import PROFILES
from qlora_lab.ops.paging import WINDOW_BYTES
from tests.helpers import composed
from tests.memory.test_activations import BASE, composed_once, numbers

PAGED = "paged_adamw_32bit"
GPU = ["trainer.device=cuda", "trainer.compute_dtype=bfloat16"]


def llama(size: str, *overrides: str) -> RunConfig:
    return composed(f"model=llama_{size}", "adapter.rank=64", *GPU, *overrides)


def test_adapters_gradients_and_optimizer_states_are_counted_from_the_placement() -> None:
    plan = plan_memory(llama("7b"), Shape(1, 512))
    # the study's count: 160 million at rank 64 on all linear layers, in float32; two states each
    assert plan.adapters == plan.gradients == 159_907_840 * 4
    assert plan.optimizer == 2 * plan.adapters
    halves = plan_memory(llama("7b", "adapter.dtype=bfloat16"), Shape(1, 512))
    assert halves == replace(plan, adapters=plan.adapters // 2, gradients=plan.gradients // 2)
    small = plan_memory(llama("7b", "optim.name=adamw_8bit"), Shape(1, 512))
    assert small.optimizer == 2 * (159_907_840 + 159_907_840 // 256 * 4)


def test_paged_states_leave_the_card_to_the_rest() -> None:
    whole, paged = (plan_memory(llama("7b", f"optim.name={name}"), Shape(1, 512)) for name in ("adamw", PAGED))
    assert paged.optimizer == PAGED_BYTES and replace(paged, optimizer=whole.optimizer) == whole
    config = llama("7b", f"optim.name={PAGED}")
    assert paged_bytes(config) == whole.optimizer - PAGED_BYTES
    in_8_bits = llama("7b", "optim.name=paged_adamw_8bit")
    assert plan_memory(in_8_bits, Shape(1, 512)).optimizer + paged_bytes(in_8_bits) == 2 * (159_907_840 + 2_498_560)
    on_cpu = llama("7b", f"optim.name={PAGED}", "trainer.device=cpu")  # where nothing pages
    assert plan_memory(on_cpu, Shape(1, 512)).optimizer == whole.optimizer and paged_bytes(on_cpu) == 0
    assert PAGED_BYTES == 2 * WINDOW_BYTES


def test_full_fine_tuning_holds_every_weight_four_times() -> None:
    config = composed("model=llama_7b", "adapter=none", "quant=none", *GPU, "trainer.compute_dtype=float32")
    plan = plan_memory(config, Shape(1, 512))
    assert (plan.adapters, plan.packed_weights) == (0, 0)
    assert plan.base == plan.gradients == plan.optimizer // 2 == 4 * 6_738_415_616
    config.trainer.compute_dtype = "bfloat16"  # autocast copies what it multiplies, below the head
    assert plan_memory(config, Shape(1, 512)).base == plan.base + 2 * 6_476_005_376


def test_an_encoder_decoder_shares_its_tokens_as_the_limits_say() -> None:
    limits = ["data.max_source_tokens=96", "data.max_target_tokens=32"]
    config = composed("model=flan_t5_base", *GPU, *limits)
    long_source = plan_memory(config, Shape(2, 128))
    config.data.max_source_tokens, config.data.max_target_tokens = 32, 96
    long_target = plan_memory(config, Shape(2, 128))
    # 96 or 32 places with a loss; the decoder's layers attend twice and keep more
    assert long_target.activations > long_source.activations
    assert long_target.loss - long_source.loss == 64 * 2 * 2 * 768 * 2 + (128 - 64) * 32128 * 6


def test_checkpointing_keeps_the_input_of_every_layer_and_one_layer() -> None:
    whole = plan_memory(llama("7b"), Shape(2, 512))
    thin = plan_memory(llama("7b", "trainer.gradient_checkpointing=true"), Shape(2, 512))
    of_inputs = 32 * 2 * 512 * 4096 * 2
    mask = 2 * 512 * 512  # of truth values, which all layers are given again
    assert thin.activations == of_inputs + whole.activations // 32 + mask
    assert whole.training - thin.training == whole.activations - thin.activations


def test_nothing_is_kept_below_the_first_adapter() -> None:
    whole, top = (plan_memory(llama("7b", *last), Shape(2, 512)) for last in ([], ["adapter.last_k_layers=8"]))
    assert top.activations * 4 == whole.activations


def test_offloading_leaves_the_inputs_of_two_layers_on_the_card() -> None:
    kept, moved = (
        plan_memory(
            llama("7b", "trainer.gradient_checkpointing=true", f"trainer.offload_activations={asked}"), Shape(2, 512)
        )
        for asked in ("false", "true")
    )
    assert kept.activations - moved.activations == 30 * 2 * 512 * 4096 * 2


@pytest.mark.parametrize("overrides", [[], ["trainer.gradient_checkpointing=true"]])
def test_what_fits_fits_and_one_more_does_not(overrides: list[str]) -> None:
    config, budget = llama("7b", *overrides), 23e9
    rows = largest_rows(config, 512, budget)
    assert plan_memory(config, Shape(rows, 512)).training <= budget < plan_memory(config, Shape(rows + 1, 512)).training
    tokens = longest_tokens(config, 8, budget)
    assert plan_memory(config, Shape(8, tokens)).training <= budget
    assert tokens == 2048 or plan_memory(config, Shape(8, tokens + 1)).training > budget
    assert largest_rows(config, 512, 1e9) == longest_tokens(config, 1, 1e9) == 0


@settings(max_examples=40, deadline=None)
@given(
    model_type=strategies.sampled_from(list(PROFILES)),
    overrides=strategies.tuples(
        strategies.sampled_from(["adapter=all_linear", "adapter=none"]),
        strategies.sampled_from(["trainer.device=cpu", "trainer.device=cuda"]),
        strategies.sampled_from(["trainer.compute_dtype=float32", "trainer.compute_dtype=bfloat16"]),
        strategies.booleans().map("trainer.gradient_checkpointing={}".format),
        strategies.sampled_from(["trainer.batch_size=4", "trainer.batch_size=16"]),
    ),
    tokens=strategies.integers(1, 600),
)
def test_more_rows_never_need_less(model_type: str, overrides: tuple[str, ...], tokens: int) -> None:
    """So the largest number of rows that fits is found by halving."""
    config = copy.deepcopy(composed_once("trainer.micro_batch_size=4", "quant=none", *overrides))
    task, size = FAMILIES[model_type].task, {**BASE, "vocab": 4000}
    config.model = replace(config.model, task=task, architecture=numbers(model_type, size))
    config.data.labels = ["no", "yes"] if task == CLASSIFICATION else []
    needs = [plan_memory(config, Shape(rows, tokens)).training for rows in range(1, 20)]
    assert needs == sorted(needs)


def test_gradients_of_one_micro_batch_come_as_activations_go() -> None:
    one = "trainer.batch_size=4", "trainer.micro_batch_size=4"
    full = ["adapter=none", "quant=none", "trainer.compute_dtype=float32"]
    several = plan_memory(llama("7b", *full, "trainer.micro_batch_size=4"), Shape(4, 512))
    single = plan_memory(llama("7b", *full, *one), Shape(4, 512))
    assert replace(single, not_at_once=several.not_at_once, evaluation=several.evaluation) == several
    # 27 GB of gradients and 22 GB that are kept: the larger and a little of the other
    most = single.training - single.base - single.optimizer
    assert single.activations < single.gradients < most < 1.05 * single.gradients


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model=hub", "model.hub_id=some/model"], "memory can only be planned where model.architecture says"),
        (
            ["model=tiny_random", "model.architecture.model_type=gpt2"],
            "memory can be planned for models of type llama, mistral,",
        ),
        (
            ["adapter.trained_modules=[model.norm]"],
            r"adapter\.trained_modules among embed_tokens, lm_head; got 'norm'",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(overrides: list[str], sentence: str) -> None:
    config = composed(*GPU, *overrides)
    with pytest.raises(ConfigError, match=sentence):
        plan_memory(replace(config), Shape(1, 512))


@pytest.mark.parametrize(
    ("size", "total_gb", "float32_gb", "model_mb", "adapters_mb", "optimizer_mb"),
    [
        ("7b", 6.1, 6.8, 3866, 320, 1279),
        ("13b", 10.7, 11.7, 7201, 501, 2003),
        ("33b", 24.1, 26.1, 17414, 975, 3901),
        ("65b", 45.3, 48.5, 34459, 1599, 6396),
    ],
)
def test_what_is_printed_beside_figure_6_is_what_is_planned(
    size: str, total_gb: float, float32_gb: float, model_mb: int, adapters_mb: int, optimizer_mb: int
) -> None:
    """sweeps/paper/README.md has these numbers."""
    ours = llama(size, "trainer.gradient_checkpointing=true")
    assert plan_memory(ours, Shape(1, 512)).training / 1e9 == pytest.approx(float32_gb, abs=0.051)
    theirs = composed(f"model=llama_{size}", "adapter=qlora_paper", *GPU, "trainer.gradient_checkpointing=true")
    plan = plan_memory(theirs, Shape(1, 512))
    assert plan.training / 1e9 == pytest.approx(total_gb, abs=0.051)
    found = [plan.base, plan.adapters, plan.optimizer]
    assert [round(size / 1e6) for size in found] == [model_mb, adapters_mb, optimizer_mb]


def test_weights_are_told_apart_by_what_they_are() -> None:
    plan = plan_memory(llama("7b"), Shape(1, 512))
    matrix, linears, layers = 32000 * 4096 * 2, 6_476_005_376, 7 * 32
    assert (plan.packed_weights, plan.absmax) == (linears // 2, linears // 64)
    assert plan.embeddings == plan.head == matrix
    # one number of four bytes for each 256 blocks, which divide every layer here, and an offset for each layer
    assert plan.nested_absmax == 4 * (linears // 64 // 256 + layers)
    assert plan.dense_weights == 2 * (2 * 32 + 1) * 4096  # norms
    single = plan_memory(llama("7b", "quant.double_quant=false"), Shape(1, 512))
    assert (single.absmax, single.nested_absmax) == (4 * linears // 64, 0)
    dense = plan_memory(llama("7b", "quant=none"), Shape(1, 512))
    assert (dense.packed_weights, dense.absmax, dense.dense_weights) == (0, 0, plan.dense_weights + 2 * linears)


@pytest.mark.parametrize(
    ("model", "trained", "embeddings", "head"),
    [
        ("llama_7b", "", 1, 1),
        ("llama_7b", "embed_tokens", 0, 1),
        ("llama_7b", "lm_head", 1, 0),
        ("qwen3_0.6b", "", 1, 0),  # tied
        ("qwen3_0.6b", "embed_tokens", 0, 0),
        ("opt_350m", "", 1, 0),  # narrower than the layers
        ("flan_t5_base", "", 1, 1),
    ],
)
def test_embeddings_and_head_are_components_unless_they_are_trained(
    model: str, trained: str, embeddings: int, head: int
) -> None:
    config = composed(f"model={model}", *GPU, *([f"adapter.trained_modules=[{trained}]"] if trained else []))
    architecture = config.model.architecture
    assert architecture is not None
    matrix = architecture.vocab_size * (architecture.embedding_size or architecture.hidden_size) * 2
    plan = plan_memory(config, Shape(1, 64))
    assert (plan.embeddings, plan.head) == (embeddings * matrix, head * matrix)


def test_the_command_prints_components_and_cards_without_torch() -> None:
    code = (
        "import runpy, sys; sys.argv = ['memory', 'model=llama_65b', 'trainer.micro_batch_size=1', "
        "'data.max_source_tokens=256', 'data.max_target_tokens=256', 'trainer.gradient_checkpointing=true', "
        "'launcher.gpu_memory_gb=141']; "
        "runpy.run_module('qlora_lab.memory', run_name='__main__'); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    of_cpu = hardware.product_dtype(hardware.detect(), "cpu", "bfloat16")
    assert "1 rows of 512 tokens" in lines[0] and lines[1].split() == ["GPU,", "bfloat16", "CPU,", of_cpu]
    assert lines[2].split() == ["checkpointing", "with", "without", "with", "without"]
    sizes = {line[:16].strip(): [float(word) for word in line[16:64].split()] for line in lines[3:19]}
    for number, (activations, peak) in enumerate(zip(sizes["activations"], sizes["peak"], strict=True)):
        column = {name: found[number] for name, found in sizes.items() if name != "peak"}
        assert peak == pytest.approx(sum(column.values()), abs=0.01)
        assert column["not at once"] <= -min(column["loss"], column["workspace"]) + 0.001
        assert (column["process"] > 0) == (number >= 2)
        assert number % 2 == 0 or activations > 10 * sizes["activations"][number - 1]
    weights = ["packed weights", "absmax", "nested absmax", "embeddings", "head", "dense weights"]
    assert list(sizes)[:6] == weights
    # 64,760 M weights in 4 bits; 64,760 M / 64 absmax of 1 + 4 / 256 bytes; two matrices of 262 M numbers of 2 bytes
    assert [sizes[name][0] for name in weights] == [32.380, 1.012, 0.016, 0.524, 0.524, 0.003]
    assert f"This run is on a GPU with checkpointing: its peak is {sizes['peak'][0]:.3f} GB." in lines
    cards = {line.split()[0]: line.split()[2:] for line in lines[-6:]}
    assert int(cards["141"][0]) > int(cards["80"][0])
    assert cards["24"] == ["none", "none"] and int(cards["80"][0]) > int(cards["48"][0]) > 1
