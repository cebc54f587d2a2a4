"""A training step of a LLaMA-shaped model of random weights on one GPU, ours beside what a user would use instead:
python kernels/bench/training_step_gpu.py [--shape 7b] [--rows 4] [--tokens 512] [--rounds 3] [--json FILE].

Sides, each in processes of its own, in turn: `ours` (NF4 with double quantization), `dense` (the same adapters on
bfloat16 weights), and `peft` (transformers + PEFT + bitsandbytes). All have rank-16 adapters on every linear layer,
gradient checkpointing and 32-bit AdamW. A side whose packages are missing, or that fails, is left out, and it is said.
Unsloth, which takes its models from a hub, is not among them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from memory_proof import LEARNING_RATE, LOSS_CHUNK_TOKENS, SHAPES, Shape, build_model
from torch import Tensor, nn

from qlora_lab.adapters.lora import add_adapters, trainable_parameters
from qlora_lab.config.schema import AdapterConfig, OptimConfig
from qlora_lab.models.loss import target_loss
from qlora_lab.train.optimizer import build_optimizer

RANK, STEPS, WARM_STEPS = 16, 8, 3
KEPT_CHARACTERS = 2000  # of what a side that fails says
NEEDS = {"ours": (), "dense": (), "peft": ("peft", "bitsandbytes")}
Step = Callable[[dict[str, Tensor]], float]


def dense_linear(weight: Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def bitsandbytes_linear(weight: Tensor) -> nn.Module:
    import bitsandbytes

    options = {"quant_type": "nf4", "compress_statistics": True}
    layer = bitsandbytes.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype, device="meta", **options
    )
    layer.weight = bitsandbytes.nn.Params4bit(weight.cpu(), requires_grad=False, **options)
    return layer.to(weight.device)


def our_step(shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype, dense: bool) -> Step:
    """Return one of this project's training steps, on NF4 weights or on dense ones."""
    model = build_model(shape, tokens, device, dtype, **({"make_linear": dense_linear} if dense else {}))
    add_adapters(model, AdapterConfig(rank=RANK, alpha=float(RANK), dtype="bfloat16"), torch.Generator().manual_seed(0))
    optimizer = build_optimizer(OptimConfig(learning_rate=LEARNING_RATE), trainable_parameters(model))
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def step(batch: dict[str, Tensor]) -> float:
        loss, count = target_loss(model, batch, LOSS_CHUNK_TOKENS)
        loss.backward()
        norm, _ = optimizer.gradient_norm(1.0 / count)
        optimizer.step(gradient_scale=min(1.0, 1.0 / norm) / count)
        optimizer.zero_grad()
        return loss.item() / count

    return step


def peft_step(shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype) -> Step:
    """Return the step of transformers + PEFT + bitsandbytes, as their documentation puts them together."""
    from peft import LoraConfig, get_peft_model

    base = build_model(shape, tokens, device, dtype, make_linear=bitsandbytes_linear)
    base.is_loaded_in_4bit = True  # what PEFT goes by
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    model = get_peft_model(
        base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=device.type == "cuda")
    model.train()

    def step(batch: dict[str, Tensor]) -> float:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure(
    side: str, shape: Shape, *, rows: int, tokens: int, device: torch.device, dtype: torch.dtype, steps: int = STEPS
) -> dict[str, Any]:
    """Return tokens/s of a step (the median of those after the first few), the losses, and the peak of memory."""
    torch.manual_seed(0)
    if side == "peft":
        step = peft_step(shape, tokens, device, dtype)
    else:
        step = our_step(shape, tokens, device, dtype, dense=side == "dense")
    ids = torch.randint(shape.vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    losses, seconds = [], []
    for _ in range(steps):
        started = time.monotonic()
        losses.append(step(batch))  # reading the loss waits for the device
        seconds.append(time.monotonic() - started)
    return {
        "tokens_per_s": rows * tokens / statistics.median(seconds[WARM_STEPS:]),
        "losses": [round(loss, 4) for loss in losses],
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }


def in_turn(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run every side in a fresh process, round after round; yield the results so far after each."""
    missing = {side: [name for name in names if find_spec(name) is None] for side, names in NEEDS.items()}
    left_out = {side: f"there is no {' and no '.join(names)}" for side, names in missing.items() if names}
    work = {"shape": options.shape, "rows": options.rows, "tokens": options.tokens, "rank": RANK}
    rounds: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        rounds.append({})
        for side in [side for side in NEEDS if side not in left_out]:
            command = [sys.executable, __file__, "--side", side, "--shape", options.shape]
            command += ["--rows", str(options.rows), "--tokens", str(options.tokens)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                rounds[-1][side] = json.loads(done.stdout.splitlines()[-1])
                print(f"{side}: {rounds[-1][side]}", flush=True)
            else:
                left_out[side] = f"exit status {done.returncode}: {done.stderr[-KEPT_CHARACTERS:]}"
            yield {"work": work, "rounds": rounds, "ratios": ratios(rounds), "left_out": left_out}
    for side, reason in left_out.items():
        print(f"{side} is left out: {reason}", flush=True)


def ratios(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Return how many times as fast ours is as each other side: the median of the rounds that have both."""
    found: dict[str, list[float]] = {}
    for each in rounds:
        for side in each.keys() - {"ours"} if "ours" in each else ():
            found.setdefault(f"ours/{side}", []).append(each["ours"]["tokens_per_s"] / each[side]["tokens_per_s"])
    return {name: statistics.median(values) for name, values in sorted(found.items())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=NEEDS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch finds no GPU that it can use")
    if options.side:
        device = torch.device("cuda", torch.cuda.current_device())
        size = {"rows": options.rows, "tokens": options.tokens}
        print(json.dumps(measure(options.side, SHAPES[options.shape], **size, device=device, dtype=torch.bfloat16)))
        return 0
    result: dict[str, Any] = {}
    for result in in_turn(options):
        if options.json:  # after each side: what was measured stays when a later one takes too long
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0 if all("ours" in each for each in result["rounds"]) else 1


if __name__ == "__main__":
    sys.exit(main())
