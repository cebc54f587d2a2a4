"""QLoRA training steps of the embedded model: ours beside transformers + PEFT + bitsandbytes.

    python tests/benchmarks/training_step.py [--rounds 5] [--dtype bfloat16] [--checkpointing] [--json out.json]

Each side runs in processes of its own, called in turn, so that a noisy machine disturbs both; figures are medians over
rounds, and the last column the median of the per-round ratios with their range. The same work: SmolLM2-135M-Instruct,
NF4 with double quantization, LoRA rank 16 on all linear layers, AdamW, clipping, batches of 4 rows of 128 tokens with
the loss on every token. Both sides are plain loops, without a command line, data preparation or tracking.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS, ROW_TOKENS, STEPS, WATCHED_STEPS, RANK = 4, 128, 9, 3, 16
FIGURES = {
    "first_step_s": ("seconds from process start to first step done", 1.0),
    "step_s": ("seconds of a training step", 1.0),
    "cpu_s": ("CPU seconds of a training step", 1.0),
    "tokens_per_s": ("tokens/s of a training step", -1.0),
    "peak_rss_bytes": ("peak resident memory, GB", 1.0),
    "training_anonymous_bytes": ("peak anonymous memory while training, GB", 1.0),
}


class AnonymousPeak:
    """The most anonymous memory this process holds while inside, sampled: file maps of the checkpoint left out."""

    def __enter__(self) -> "AnonymousPeak":
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            (line,) = (
                line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")
            )
            self.peak_bytes = max(self.peak_bytes, int(line.split()[1]) * 1024)


def batches() -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return [torch.randint(100, 40_000, (ROWS, ROW_TOKENS), generator=generator) for _ in range(STEPS)]


def time_steps(step: Callable[[Any], None], started: float) -> dict[str, float]:
    """Call `step(batch)` on every batch and return the figures of this process.

    Memory is watched in the first steps and time taken in the others: who samples every few milliseconds takes a
    twentieth of a core.
    """
    durations: list[float] = []
    cpu_durations: list[float] = []
    first, *watched = batches()[:WATCHED_STEPS]
    with AnonymousPeak() as anonymous:
        step(first)
        first_step_s = time.time() - started
        for batch in watched:
            step(batch)
    for batch in batches()[WATCHED_STEPS:]:
        before, cpu_before = time.perf_counter(), time.process_time()
        step(batch)
        durations.append(time.perf_counter() - before)
        cpu_durations.append(time.process_time() - cpu_before)
    step_s = statistics.median(durations)
    return {
        "first_step_s": first_step_s,
        "step_s": step_s,
        "cpu_s": statistics.median(cpu_durations),
        "tokens_per_s": ROWS * ROW_TOKENS / step_s,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "training_anonymous_bytes": anonymous.peak_bytes,
    }


def ours(started: float, dtype: str, checkpointing: bool) -> dict[str, float]:
    import torch

    from qlora_lab.adapters.lora import add_adapters, trainable_parameters
    from qlora_lab.config.schema import OptimConfig
    from qlora_lab.models.load import load_model
    from qlora_lab.models.loss import target_loss
    from qlora_lab.train.optimizer import build_optimizer
    from qlora_lab.wheels import default_cache_dir
    from tests.helpers import composed

    config = composed(f"adapter.rank={RANK}")
    torch.manual_seed(0)
    model = load_model(
        config.model,
        config.quant,
        compute_dtype=getattr(torch, dtype),
        device="cpu",
        cache_dir=default_cache_dir(),
        seed=0,
    )
    add_adapters(model, config.adapter, torch.Generator().manual_seed(0))
    parameters = trainable_parameters(model)
    optimizer = build_optimizer(OptimConfig(learning_rate=1e-3), parameters)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def step(batch: torch.Tensor) -> None:
        inputs = {"input_ids": batch, "attention_mask": torch.ones_like(batch), "labels": batch}
        loss, tokens = target_loss(model, inputs, config.trainer.loss_chunk_tokens)
        loss.backward()
        norm, _ = optimizer.gradient_norm(1.0 / tokens)
        optimizer.step(gradient_scale=min(1.0, 1.0 / norm) / tokens)
        optimizer.zero_grad()

    return time_steps(step, started)


def theirs(started: float, dtype: str, checkpointing: bool) -> dict[str, float]:
    """Transformers + PEFT + bitsandbytes, as their documentation puts them together."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qlora_lab.models.gguf import wheel_model
    from qlora_lab.wheels import default_cache_dir

    torch.manual_seed(0)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    model = AutoModelForCausalLM.from_pretrained(
        wheel_model("smollm2_135m", default_cache_dir()),
        quantization_config=quantization,
        dtype=getattr(torch, dtype),
        device_map={"": "cpu"},
    )
    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    lora = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3, weight_decay=0.0)
    model.train()

    def step(batch: torch.Tensor) -> None:
        with torch.autocast("cpu", dtype=getattr(torch, dtype), enabled=dtype != "float32"):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return time_steps(step, started)


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    """Run one side in a fresh process."""
    from qlora_lab.runs.heap import heap_environment

    command = [sys.executable, __file__, "--side", side, "--started", str(time.time()), "--dtype", options.dtype]
    command += ["--checkpointing"] if options.checkpointing else []
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    if side == "ours":
        environment |= heap_environment(os.environ)  # as a run has it
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root)
    if done.returncode != 0:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in backward")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=["ours", "theirs"])
    parser.add_argument("--started", type=float)
    options = parser.parse_args()
    if options.side:
        run = {"ours": ours, "theirs": theirs}[options.side]
        print(json.dumps(run(options.started, options.dtype, options.checkpointing)))
        return
    rounds = [{side: measure(side, options) for side in ("ours", "theirs")} for _ in range(options.rounds)]
    work = f"{options.dtype}{', gradient checkpointing' if options.checkpointing else ''}"
    report(rounds, work)
    if options.json:
        options.json.write_text(json.dumps(record(rounds, work), indent=1) + "\n")


def record(rounds: list[dict[str, dict[str, float]]], work: str) -> dict[str, Any]:
    from qlora_lab.runs.environment import measured_commit

    return {"machine": machine(), "kernels": kernels(), "commit": measured_commit(), "work": work, "rounds": rounds}


def report(rounds: list[dict[str, dict[str, float]]], work: str) -> None:
    print(f"{machine()}; {kernels()}; {work}; {len(rounds)} rounds, medians")
    print(f"{'':46} {'ours':>9} {'theirs':>9} {'better by':>10}  (range)")
    for key, (label, sense) in FIGURES.items():
        scale = 1e9 if key.endswith("bytes") else 1.0
        sides = {side: statistics.median(r[side][key] for r in rounds) / scale for side in ("ours", "theirs")}
        ratios = sorted((r["theirs"][key] / r["ours"][key]) ** sense for r in rounds)
        spread = f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{label:46} {sides['ours']:9.2f} {sides['theirs']:9.2f} {statistics.median(ratios):9.2f}x  {spread}")


def kernels() -> str:
    from qlora_lab.ops.registry import KERNELS

    return str(KERNELS)


def machine() -> str:
    from qlora_lab.config.hardware import detect

    hardware = detect()
    return (
        f"{hardware.cores} cores of {hardware.cpu_model} ({', '.join(hardware.instruction_sets)}), {platform.system()}"
    )


if __name__ == "__main__":
    main()
