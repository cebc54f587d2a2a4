"""Training steps of the embedded model on rows of real lengths: grouped by length, in random order, and packed.

    QLORA_LAB_DATA=... python tests/benchmarks/packing.py [--data alpaca_slice] [--rounds 4]

Tokens are those of rows; padding counts for nothing. The kinds take turns, so that a noisy machine disturbs all; each
round takes the next step of each kind's own plan, and the figures are sums over rounds. NF4, LoRA rank 16, float32.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from qlora_lab.adapters.lora import add_adapters, trainable_parameters
from qlora_lab.config.schema import OptimConfig
from qlora_lab.data.batching import plan_steps
from qlora_lab.data.prepare import prepare_data
from qlora_lab.models.load import load_model, load_tokenizer
from qlora_lab.models.loss import target_loss
from qlora_lab.models.packing import check_packing
from qlora_lab.train.optimizer import build_optimizer
from qlora_lab.train.steps import StepBatch, StepDataset
from qlora_lab.wheels import default_cache_dir
from tests.helpers import composed

KINDS = {"grouped by length": (True, False), "random order": (False, False), "random order, packed": (False, True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="alpaca_slice")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16, help="in a step")
    parser.add_argument("--micro-batch", type=int, default=8, help="rows in memory at once")
    options = parser.parse_args()
    limits = ["data.max_source_tokens=256", "data.max_target_tokens=256"]
    config = composed(f"data={options.data}", "adapter.rank=16", *limits)
    cache_dir = default_cache_dir()
    tokenizer = load_tokenizer(config.model, cache_dir)
    data = prepare_data(
        config.data,
        config.evaluation,
        prompt_format=config.model.prompt_format,
        tokenizer=tokenizer,
        seed=0,
        cache_dir=cache_dir,
        data_dir=Path(os.environ["QLORA_LAB_DATA"]),
    )
    model = load_model(
        config.model, config.quant, compute_dtype=torch.float32, device="cpu", cache_dir=cache_dir, seed=0
    )
    add_adapters(model, config.adapter, torch.Generator().manual_seed(0))
    check_packing(model)
    optimizer = build_optimizer(OptimConfig(learning_rate=1e-5), trainable_parameters(model))
    model.train()

    def step(batch: StepBatch) -> None:
        for micro_batch in batch.micro_batches:
            loss, _ = target_loss(model, micro_batch, config.trainer.loss_chunk_tokens)
            loss.backward()
        optimizer.step(gradient_scale=1.0 / batch.target_tokens)
        optimizer.zero_grad()

    steps = {}
    for kind, (grouped, packed) in KINDS.items():
        plan = plan_steps(
            data.train_lengths,
            batch_size=options.rows,
            max_steps=options.rounds,
            max_tokens=None,
            seed=0,
            group_by_length=grouped,
        )
        pack_tokens = config.data.longest_row_tokens if packed else None
        steps[kind] = StepDataset(data.train, plan, 0, options.micro_batch, tokenizer.pad_token_id, pack_tokens)
    step(steps["random order"][0])  # warm
    seconds, tokens, positions = (dict.fromkeys(KINDS, 0.0) for _ in range(3))
    for number in range(options.rounds):
        for kind in KINDS:
            batch = steps[kind][number]
            started = time.perf_counter()
            step(batch)
            seconds[kind] += time.perf_counter() - started
            tokens[kind] += batch.tokens
            positions[kind] += sum(micro_batch["input_ids"].numel() for micro_batch in batch.micro_batches)
    mean = sum(data.train_lengths) / len(data.train_lengths)
    print(f"{options.data}: rows of {mean:.0f} tokens on average, {max(data.train_lengths)} at most")
    for kind in KINDS:
        padding = 1 - tokens[kind] / positions[kind]
        print(f"{kind:22}{tokens[kind] / seconds[kind]:8.1f} tokens/s  {padding:6.1%} padding")


if __name__ == "__main__":
    main()
