"""One QLoRA training step of the embedded model: ours beside transformers + PEFT + bitsandbytes.

    python tests/benchmarks/training_step.py [--rounds 5] [--json out.json]

Each side runs in processes of its own, called in turn, so that a noisy machine disturbs both; figures are medians over
rounds, and the last column the median of the per-round ratios (theirs / ours). The same work: SmolLM2-135M-Instruct,
NF4 with double quantization, LoRA rank 8 on all linear layers, AdamW, batches of 8 rows of 32 tokens with the loss on
the last 8, float32 compute.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROWS, ROW_TOKENS, TARGET_TOKENS, STEPS, WARM_STEPS, RANK = 8, 32, 8, 8, 2, 8
FIGURES = {
    "first_step_s": ("seconds from command to first step done", 1.0),
    "tokens_per_s": ("tokens/s of a training step", -1.0),
    "peak_rss_bytes": ("peak resident memory, GB", 1.0),
}


def batches() -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return [torch.randint(100, 40_000, (ROWS, ROW_TOKENS), generator=generator) for _ in range(STEPS)]


def time_steps(step: Any, started: float) -> dict[str, float]:
    """Call `step(batch)` on every batch and return the figures of this process."""
    durations: list[float] = []
    first_step_s = 0.0
    for index, batch in enumerate(batches()):
        before = time.perf_counter()
        step(batch)
        durations.append(time.perf_counter() - before)
        if index == 0:
            first_step_s = time.time() - started
    return {
        "first_step_s": first_step_s,
        "tokens_per_s": ROWS * ROW_TOKENS / statistics.median(durations[WARM_STEPS:]),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def ours(started: float) -> dict[str, float]:
    import torch

    from qlora_lab.adapters.lora import add_adapters, trainable_parameters
    from qlora_lab.config.schema import OptimConfig
    from qlora_lab.fetch import default_cache_dir
    from qlora_lab.models.load import load_model
    from qlora_lab.models.loss import target_loss
    from qlora_lab.train.optimizer import build_optimizer
    from tests.helpers import composed

    config = composed(f"adapter.rank={RANK}")
    torch.manual_seed(0)
    model = load_model(
        config.model,
        config.quant,
        compute_dtype=torch.float32,
        device="cpu",
        cache_dir=default_cache_dir(),
        seed=0,
    )
    add_adapters(model, config.adapter, torch.Generator().manual_seed(0))
    parameters = trainable_parameters(model)
    optimizer = build_optimizer(OptimConfig(learning_rate=1e-3), parameters)
    model.train()

    def step(batch: torch.Tensor) -> None:
        labels = batch.clone()
        labels[:, :-TARGET_TOKENS] = -100
        inputs = {"input_ids": batch, "attention_mask": torch.ones_like(batch), "labels": labels}
        loss, tokens = target_loss(model, inputs, config.trainer.loss_chunk_tokens)
        (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return time_steps(step, started)


def theirs(started: float) -> dict[str, float]:
    """Transformers + PEFT + bitsandbytes, as their documentation puts them together."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qlora_lab.fetch import default_cache_dir
    from qlora_lab.models.gguf import wheel_model

    torch.manual_seed(0)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        wheel_model("smollm2_135m", default_cache_dir()),
        quantization_config=quantization,
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3, weight_decay=0.0)
    model.train()

    def step(batch: torch.Tensor) -> None:
        labels = batch.clone()
        labels[:, :-TARGET_TOKENS] = -100
        model(input_ids=batch, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return time_steps(step, started)


def measure(side: str) -> dict[str, float]:
    """Run one side in a fresh process."""
    command = [sys.executable, __file__, "--side", side, "--started", str(time.time())]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)
    if done.returncode != 0:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=["ours", "theirs"])
    parser.add_argument("--started", type=float)
    options = parser.parse_args()
    if options.side:
        figures = {"ours": ours, "theirs": theirs}[options.side](options.started)
        print(json.dumps(figures))
        return
    rounds = [{side: measure(side) for side in ("ours", "theirs")} for _ in range(options.rounds)]
    report(rounds)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rounds": rounds}, indent=2) + "\n")


def report(rounds: list[dict[str, dict[str, float]]]) -> None:
    print(f"{machine()}; {len(rounds)} rounds, medians")
    print(f"{'':44} {'ours':>9} {'theirs':>9} {'better by':>10}")
    for key, (label, sense) in FIGURES.items():
        scale = 1e9 if key.endswith("bytes") else 1.0
        sides = {side: statistics.median(r[side][key] for r in rounds) / scale for side in ("ours", "theirs")}
        ratio = statistics.median((r["theirs"][key] / r["ours"][key]) ** sense for r in rounds)
        print(f"{label:44} {sides['ours']:9.2f} {sides['theirs']:9.2f} {ratio:9.2f}x")


def machine() -> str:
    from qlora_lab.config.hardware import detect

    hardware = detect()
    return (
        f"{hardware.cores} cores of {hardware.cpu_model} ({', '.join(hardware.instruction_sets)}), {platform.system()}"
    )


if __name__ == "__main__":
    main()
