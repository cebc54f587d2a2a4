"""Every architecture goes through a run with NF4 weights and adapters: tiny random versions of all of them.

The loss goes down, adapters save and load, and PEFT computes the same from what was saved.
"""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlora_lab.adapters.lora import adapted_layers, add_adapters, trainable_parameters
from qlora_lab.config.architecture import linear_layers
from qlora_lab.config.command import shipped
from qlora_lab.config.families import FAMILIES
from qlora_lab.config.hardware import Hardware
from qlora_lab.config.placement import match_linears
from qlora_lab.config.resolve import resolve
from qlora_lab.config.schema import CLASSIFICATION, AdapterConfig, ArchitectureConfig, ModelConfig, QuantConfig
from qlora_lab.data.batching import collate
from qlora_lab.data.prepare import data_of_run
from qlora_lab.data.tokenization import Example
from qlora_lab.evaluation.run_model import open_run
from qlora_lab.evaluation.suite import evaluate
from qlora_lab.models.load import load_model
from qlora_lab.models.loss import check_output_head, row_losses, target_loss
from qlora_lab.quant.linear import QuantizedLinear
from qlora_lab.run import execute
from qlora_lab.runs.folder import FINISHED, RunFolder
from qlora_lab.runs.identity import run_id
from tests.helpers import composed

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks transformers so
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

PLAIN = QuantConfig(format="none", double_quant=False)
LABELS = ["no", "yes", "maybe"]
VARIANTS = {
    "opt, norms after the blocks": ("opt", {"embedding_size": 32, "norm_first": False, "tie_embeddings": True}),
    "t5, tied": ("t5", {"tie_embeddings": True}),
    "t5, fewer decoder layers": ("t5", {"num_decoder_layers": 1}),
}
ARCHITECTURES = {name: (name, {}) for name in FAMILIES} | VARIANTS
# Of which conf/model/ has models; the others are laid out as llama is.
RUNS = [name for name in FAMILIES if name not in ("gemma", "smollm3")]


def architecture(name: str) -> ArchitectureConfig:
    model_type, changes = ARCHITECTURES[name]
    own_heads = not FAMILIES[model_type].grouped_query
    numbers = {
        "model_type": model_type,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 4 if own_heads else 2,
        "feed_forward_size": 256 if own_heads else 96,
        "vocab_size": 384,  # of the byte tokenizer
        "head_size": 16 if FAMILIES[model_type].grouped_query or model_type == "t5" else None,
        "tie_embeddings": model_type in ("gemma", "gemma2", "gemma3_text", "roberta"),
        "max_position": 64,
    }
    return ArchitectureConfig(**{**numbers, **changes})


def model_config(name: str) -> ModelConfig:
    task = FAMILIES[ARCHITECTURES[name][0]].task
    return ModelConfig(
        name, "random", task, tokenizer="byte_level", architecture=architecture(name), max_length_tokens=64
    )


def built(name: str, quant: QuantConfig, dtype: torch.dtype = torch.float32, seed: int = 4) -> PreTrainedModel:
    return load_model(
        model_config(name), quant, compute_dtype=dtype, device="cpu", cache_dir=Path(), seed=seed, labels=LABELS
    )


def batch_for(name: str) -> dict[str, Tensor]:
    """Rows of different lengths, so that padding is there."""
    task = FAMILIES[ARCHITECTURES[name][0]].task
    generator = torch.Generator().manual_seed(6)
    rows = []
    for number, (source, target) in enumerate([(9, 5), (4, 3), (6, 7)]):
        ids = torch.randint(3, 96, (source + target,), generator=generator).tolist()
        if task == CLASSIFICATION:
            ids = [*ids[:source], number % len(LABELS)]
        rows.append(Example(ids, source, source, f"row {number}", None, 0, task))
    return collate(rows, pad_id=0)


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    config = model.config
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = batch["labels"].clamp(min=0)
    with torch.no_grad():
        return model(**inputs).logits


def dequantized(model: nn.Module, plain: nn.Module) -> nn.Module:
    """Put the weights that a quantized model computes with into a plain one."""
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            plain.get_submodule(name.removesuffix(".base")).weight.data = layer.dequantize()
    return plain


def train(model: PreTrainedModel, batch: dict[str, Tensor], steps: int = 10) -> list[float]:
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=2e-2)
    losses = []
    for _ in range(steps):
        loss, tokens = target_loss(model, batch, chunk_tokens=4)
        (loss / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / tokens)
    return losses


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows whose target is told by the first word of their source."""
    words = dict(zip(("poor", "fine", "mixed"), LABELS, strict=True))
    records = [{"input": f"{word} {number}", "output": words[word]} for number in range(12) for word in words]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def finished_run(name: str, rows: Path) -> RunFolder:
    """Execute a run of a few steps and return its folder."""
    folder = rows.parent
    config = composed(
        *("model=tiny_random", "data=file", f"data.source.path={rows}", "adapter.rank=4", "adapter.alpha=8"),
        *("data.max_source_tokens=16", "data.max_target_tokens=8", "data.prompt_format=plain"),
        *("trainer.device=cpu", "trainer.compute_dtype=float32", "trainer.threads=1", "tracking=none"),
        *("trainer.max_steps=12", "trainer.batch_size=12", "trainer.micro_batch_size=12", "trainer.log_every_steps=1"),
        *("optim.learning_rate=0.01", "optim.warmup_share=0", "optim.schedule=linear", "evaluation.rows=6"),
        *("evaluation.sample_generations=1", "evaluation.max_source_tokens=16", "evaluation.max_target_tokens=8"),
        *("evaluation.max_new_tokens=4", "evaluation.before_training=true"),
        *(f"paths.runs_dir={folder}", f"paths.cache_dir={folder}/cache"),
    )
    labels = LABELS if FAMILIES[ARCHITECTURES[name][0]].task == CLASSIFICATION else []
    config = replace(config, model=model_config(name), data=replace(config.data, labels=labels))
    config = resolve(config, Hardware("some CPU", frozenset(), 2, ()), lambda source: None)
    run = RunFolder.create(folder, run_id(config), config)
    assert execute(run.path) == FINISHED, run.status()
    return run


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_and_saves_what_loads_here_and_in_peft(name: str, rows: Path) -> None:
    run = finished_run(name, rows)
    history = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval/loss"] for line in history if "eval/loss" in line]
    assert len(losses) == 2 and losses[-1] < 0.95 * losses[0]

    opened = open_run(run.path, cache_dir=rows.parent / "cache")
    layers = adapted_layers(opened.model)
    # every linear layer below the head, and all of them quantized
    assert list(layers) == [path for path, *_ in linear_layers(architecture(name)) or []]
    assert all(isinstance(layer.base, QuantizedLinear) for layer in layers.values())
    untouched = [key for key, parameter in trainable_parameters(opened.model).items() if not parameter.any()]
    assert not untouched  # lora_B starts at zero: a gradient has reached every layer
    config = run.config()
    data = data_of_run(config, opened.tokenizer, rows.parent / "cache")
    again = evaluate(opened.model, opened.tokenizer, data.held_out, config.evaluation, exact_match_sets=(),
                     loss_chunk_tokens=config.trainer.loss_chunk_tokens, evaluators=["target_loss"])  # fmt: skip
    assert again.metrics["eval/loss"] == pytest.approx(losses[-1], rel=1e-6)

    batch = batch_for(name)
    plain = dequantized(opened.model, built(name, PLAIN, seed=config.seed))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns about keys that are missing or left over
        theirs = PeftModel.from_pretrained(plain, run.adapter)
    # the same products in another order
    torch.testing.assert_close(logits(theirs.eval(), batch), logits(opened.model, batch), rtol=1e-4, atol=1e-4)


def test_every_architecture_that_a_model_has_a_name_for_is_tested() -> None:
    files = (shipped("conf") / "model" / "family").glob("*.yaml")
    named = {str(OmegaConf.load(file).architecture.model_type) for file in files}
    assert named and named <= set(RUNS)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_are_those_of_the_model_itself(name: str) -> None:
    """Body and head taken apart give the loss that transformers computes."""
    model, batch = built(name, PLAIN), batch_for(name)
    check_output_head(model, batch["input_ids"][:1])
    labels = batch["labels"]
    task = model_config(name).task
    if task == CLASSIFICATION:
        labels = labels[:, 1]
    elif task == "seq2seq":
        labels = labels[:, 1:].contiguous()
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss, tokens = target_loss(model, batch, chunk_tokens=3)
        sums, counts = row_losses(model, batch, chunk_tokens=3)
    torch.testing.assert_close(loss / tokens, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sums.sum().float(), loss, rtol=1e-4, atol=1e-5)
    assert counts.sum() == tokens == (3 if task == CLASSIFICATION else 15)


@pytest.mark.parametrize("name", ["llama", "t5", "roberta", "bloom"])
def test_it_trains_in_16_bits(name: str, tmp_path: Path) -> None:
    config, batch = AdapterConfig(rank=4, alpha=8), batch_for(name)
    model = built(name, QuantConfig(), torch.bfloat16)
    add_adapters(model, config, torch.Generator().manual_seed(0))
    losses = train(model, batch)
    assert losses[-1] < 0.9 * losses[0]
    assert {parameter.dtype for parameter in trainable_parameters(model).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "attention", "feed_forward", "query_value"),
    [
        ("llama", 8, 6, ["q_proj", "v_proj"]),
        ("opt", 8, 4, ["q_proj", "v_proj"]),
        ("gpt_neox", 4, 4, ["query_key_value"]),
        ("bloom", 4, 4, ["query_key_value"]),
        ("mpt", 4, 4, ["Wqkv"]),
        ("t5", 24, 12, ["q", "v"]),
        ("roberta", 8, 4, ["query", "value"]),
    ],
)
def test_placements_mean_the_right_layers(name: str, attention: int, feed_forward: int, query_value: list[str]) -> None:
    paths = [path for path, *_ in linear_layers(architecture(name)) or []]
    placed = {
        placement: match_linears(paths, placement, None, None)
        for placement in ("attention", "feed_forward", "query_value")
    }
    assert (len(placed["attention"]), len(placed["feed_forward"])) == (attention, feed_forward)
    assert set(placed["attention"]) | set(placed["feed_forward"]) == set(paths)
    assert sorted({path.rpartition(".")[2] for path in placed["query_value"]}) == sorted(query_value)
    # T5's decoder attends twice
    per_layer = {"t5": 3}.get(name, 1) * len(query_value)
    assert len(placed["query_value"]) == 2 * per_layer
