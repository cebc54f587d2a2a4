"""Train a LLaMA-shaped model of random weights for some steps in a limited part of one GPU, and say what it took:
python kernels/bench/memory_proof.py 65b --cap-gib 48 [--tokens 512] [--optim paged_adamw_32bit] [--json FILE].

NF4 with double quantization, rank-64 adapters in bfloat16 on all linear layers, batch 1, gradient checkpointing. torch
may allocate what the cap leaves beside states in unified memory, which it does not know of. The peak of both together
stands beside what `python -m qlora_lab.memory` predicts for the same run; above the cap, or above what is wanted, the
proof fails. What lies on the GPU beside torch's memory (the process's CUDA context, and whatever else runs there) is in
no budget of torch's, and said apart.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_lab.adapters.lora import add_adapters, trainable_parameters
from qlora_lab.config.schema import OPTIMIZERS, AdapterConfig, ArchitectureConfig, ModelConfig, OptimConfig
from qlora_lab.memory.layer import Shape as PlannedShape
from qlora_lab.memory.plan import MemoryPlan, plan_memory
from qlora_lab.memory.usual import usual_run
from qlora_lab.models.loss import target_loss
from qlora_lab.ops.registry import CUDA_KERNELS
from qlora_lab.quant.linear import QuantizedLinear
from qlora_lab.train.optimizer import build_optimizer, describe_optimizer, why_not_paged

GIB = 2**30
WEIGHT_STD = 0.02
LEARNING_RATE = 1e-3
LOSS_CHUNK_TOKENS = 256
HEAD = "lm_head"


@dataclass(frozen=True)
class Shape:
    """Of a LLaMA (Touvron et al. 2023, table 2)."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    vocabulary: int = 32000


SHAPES = {
    "7b": Shape(4096, 11008, 32, 32),
    "13b": Shape(5120, 13824, 40, 40),
    "33b": Shape(6656, 17920, 60, 52),
    "65b": Shape(8192, 22016, 80, 64),
}
WANTED_GIB = {  # the peak at a rank of 64, managed pages included, by shape, tokens and optimizer
    ("7b", 512, "paged_adamw_32bit"): 6.0,
    ("13b", 512, "paged_adamw_32bit"): 10.5,
    ("33b", 512, "paged_adamw_32bit"): 23.5,
    ("65b", 512, "paged_adamw_32bit"): 43.0,
    ("65b", 512, "paged_adamw_8bit"): 39.5,
    ("65b", 2048, "paged_adamw_32bit"): 48.0,
}


def quantized_linear(weight: Tensor) -> nn.Module:
    """Return our NF4 layer of a weight, with double quantization."""
    layer = QuantizedLinear(
        weight.shape[1],
        weight.shape[0],
        bias=False,
        format="nf4",
        block_size=64,
        double_quant=True,
        double_quant_block_size=256,
        compute_dtype=weight.dtype,
        device="meta",
    )
    layer.load_weight(weight)
    return layer


@torch.no_grad()
def build_model(
    shape: Shape,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    make_linear: Callable[[Tensor], nn.Module] = quantized_linear,
) -> LlamaForCausalLM:
    """Return a model of random weights whose linear layers are made one after another, of what `make_linear` returns.

    With quantized ones the peak is the result plus one weight.
    """
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=max(tokens, 2048),
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != HEAD:
            weight = torch.randn(layer.weight.shape, device=device, dtype=dtype) * WEIGHT_STD
            model.set_submodule(name, make_linear(weight))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, attribute = name.rpartition(".")
            value = torch.ones(parameter.shape, device=device, dtype=dtype)
            if parameter.dim() > 1:
                value = torch.randn(parameter.shape, device=device, dtype=dtype) * WEIGHT_STD
            setattr(model.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
    rotary = model.model.rotary_emb  # its buffers are computed, not loaded, and on meta there is nothing in them
    model.model.rotary_emb = type(rotary)(config=config).to(device)
    return model


def planned(shape: Shape, tokens: int, rank: int, optim: str) -> MemoryPlan:
    """Return the memory plan of the same run, with all of the optimizer's states, wherever they lie."""
    architecture = ArchitectureConfig(
        *("llama", shape.hidden_size, shape.layers, shape.heads, shape.heads, shape.intermediate_size),
        vocab_size=shape.vocabulary,
        max_position=max(tokens, 2048),
    )
    limits = {"tokenizer": "byte_level", "max_length_tokens": max(tokens, 2048)}
    run = usual_run(ModelConfig("proof", "random", architecture=architecture, **limits))
    run = replace(
        run,
        adapter=adapter_of(rank),
        optim=OptimConfig(name="adamw_8bit" if optim.endswith("8bit") else "adamw"),  # all states, wherever they lie
        data=replace(run.data, max_source_tokens=tokens // 2, max_target_tokens=tokens - tokens // 2),
        trainer=replace(run.trainer, loss_chunk_tokens=LOSS_CHUNK_TOKENS),
    )
    return plan_memory(run, PlannedShape(1, tokens))


def adapter_of(rank: int) -> AdapterConfig:
    return AdapterConfig(rank=rank, alpha=float(rank), dtype="bfloat16")


def random_batch(shape: Shape, tokens: int, device: torch.device) -> dict[str, Tensor]:
    ids = torch.randint(shape.vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def train(
    shape: Shape, *, tokens: int, rank: int, steps: int, optim: str, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Return what a training run took: bytes by kind, the loss of each step."""
    torch.manual_seed(0)
    model = build_model(shape, tokens, device, dtype)
    add_adapters(model, adapter_of(rank), torch.Generator().manual_seed(0))
    parameters = trainable_parameters(model)
    optimizer = build_optimizer(OptimConfig(name=optim, learning_rate=LEARNING_RATE), parameters)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = random_batch(shape, tokens, device)
    losses, started = [], time.monotonic()
    for _ in range(steps):
        loss, count = target_loss(model, batch, LOSS_CHUNK_TOKENS)
        loss.backward()
        optimizer.gradient_norm(1.0 / count)
        optimizer.step(gradient_scale=1.0 / count)
        optimizer.zero_grad()
        losses.append(loss.item() / count)
    frozen = [*model.buffers(), *(weight for weight in model.parameters() if not weight.requires_grad)]
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim() > 0]
    return {
        "optimizer": describe_optimizer(optimizer),
        "trainable_parameters": sum(weight.numel() for weight in parameters.values()),
        "bytes": {
            "frozen": sum(tensor.nbytes for tensor in frozen),
            "adapters": sum(weight.nbytes for weight in parameters.values()),
            "states": sum(state.nbytes for state in states),
            "managed": sum(state.nbytes for state in states) if getattr(optimizer, "is_paged", False) else 0,
        },
        "losses": [round(loss, 4) for loss in losses],
        "loss_falls": losses[-1] < losses[0],
        "seconds_per_step": round((time.monotonic() - started) / steps, 3),
    }


def measured(device: torch.device, outside_torch: int) -> dict[str, float]:
    """Return what a training run took of a GPU, in GiB, but for unified memory."""
    return {
        "peak_allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        "outside_torch_gib": outside_torch / GIB,
    }


def outside_torch_bytes(device: torch.device) -> int:
    """Return what is taken of a GPU and no tensor's: the process's context, and other processes."""
    torch.empty(1, device=device)  # or there might be no context yet
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def compared(
    result: dict[str, Any], took: dict[str, float], plan: MemoryPlan, options: argparse.Namespace
) -> dict[str, Any]:
    """Return the peak of a run, managed pages included, beside what was predicted and what is wanted."""
    managed = result["bytes"]["managed"] / GIB
    peak, predicted = took["peak_allocated_gib"] + managed, plan.training / GIB
    numbers = took | {
        "managed_gib": managed,
        "peak_with_managed_gib": peak,
        "predicted_with_managed_gib": predicted,
        "peak_of_predicted": peak / predicted,
    }
    wanted = WANTED_GIB.get((options.shape, options.tokens, options.optim)) if options.rank == 64 else None
    return {
        "shape": options.shape,
        "tokens": options.tokens,
        "rank": options.rank,
        "cap_gib": options.cap_gib,
        **{name: round(number, 3) for name, number in numbers.items()},
        "wanted_gib": wanted,
        "holds": result["loss_falls"] and peak <= min(options.cap_gib, wanted or options.cap_gib),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--cap-gib", type=float, required=True)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--optim", choices=OPTIMIZERS, default="paged_adamw_32bit")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch finds no GPU that it can use")
    device = torch.device("cuda", torch.cuda.current_device())
    total = torch.cuda.get_device_properties(device).total_memory
    shape = SHAPES[options.shape]
    plan = planned(shape, options.tokens, options.rank, options.optim)
    pages = options.optim.startswith("paged_") and why_not_paged({device}) is None
    outside_torch = outside_torch_bytes(device)
    left = options.cap_gib * GIB - (plan.optimizer if pages else 0)
    torch.cuda.set_per_process_memory_fraction(min(left / total, 1.0), device)
    result = train(
        shape,
        tokens=options.tokens,
        rank=options.rank,
        steps=options.steps,
        optim=options.optim,
        device=device,
        dtype=torch.bfloat16,
    )
    result |= compared(result, measured(device, outside_torch), plan, options) | {"kernels": str(CUDA_KERNELS)}
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
