"""What a run works with before its first step: the quantized model with its adapters, the data, the plan of steps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_lab.adapters.lora import add_adapters, train_everything
from qlora_lab.config.schema import RunConfig
from qlora_lab.data.batching import plan_steps
from qlora_lab.data.prepare import PreparedData, data_of_run
from qlora_lab.evaluation.candidates import base_of
from qlora_lab.evaluation.run_model import base_model
from qlora_lab.models.load import load_tokenizer
from qlora_lab.models.loss import check_output_head
from qlora_lab.models.packing import check_packing
from qlora_lab.models.warm import WarmBase, base_key
from qlora_lab.ops.registry import CUDA_KERNELS, KERNELS
from qlora_lab.quant.quantizer import QuantizedShare, count_quantized
from qlora_lab.runs.fingerprint import check_model_fingerprint
from qlora_lab.wheels import default_cache_dir

HEAD_CHECK_TOKENS = 8
LITTLE_QUANTIZED = 0.5  # of the matrix weights; below it the run says so


@dataclass(frozen=True)
class Workbench:
    """The model, its tokenizer, the data, the rows of each step, and how much of the model is quantized."""

    model: PreTrainedModel
    tokenizer: Any
    data: PreparedData
    plan: list[list[int]]
    quantized: QuantizedShare

    def plan_metrics(self) -> dict[str, float]:
        """Return how much of the training data the plan holds."""
        drawn = [row for step in self.plan for row in step]
        return {"train/rows_seen": len(set(drawn)), "train/epochs": len(drawn) / len(self.data.train)}


def build(config: RunConfig, bases: WarmBase | None = None) -> Workbench:
    """Load, quantize and adapt the model, and prepare the data and the plan of steps."""
    cache_dir = Path(config.paths.cache_dir) if config.paths.cache_dir else default_cache_dir()
    check_model_fingerprint(config.model)
    tokenizer = load_tokenizer(config.model, cache_dir)
    data = data_of_run(config, tokenizer, cache_dir)
    model = base_model(
        base_of(config),
        tokenizer,
        cache_dir=cache_dir,
        cache_bases=config.paths.cache_bases,
        bases=bases,
        key=base_key(config),
    )
    check_output_head(model, torch.tensor([data.train[0].input_ids[:HEAD_CHECK_TOKENS]], device=model.device))
    if config.data.packing:
        check_packing(model)
    quantized = count_quantized(model)
    if config.adapter.kind == "lora":
        add_adapters(model, config.adapter, torch.Generator().manual_seed(config.seed))
    else:
        train_everything(model)
    plan = plan_steps(
        data.train_lengths,
        batch_size=config.trainer.batch_size,
        max_steps=config.trainer.max_steps,
        max_tokens=config.trainer.max_train_tokens,
        seed=config.seed,
        group_by_length=config.trainer.group_by_length,
    )
    return Workbench(model, tokenizer, data, plan, quantized)


def say_what_was_built(bench: Workbench, config: RunConfig, run_id: str) -> None:
    """Print what the data holds, and where little of the model is quantized."""
    print(f"run {run_id}: kernels: {CUDA_KERNELS if config.trainer.device == 'cuda' else KERNELS}", flush=True)
    print(f"run {run_id}: {bench.data.report.summary()}", flush=True)
    share = bench.quantized
    if config.quant.format != "none" and share.share < LITTLE_QUANTIZED:
        print(
            f"run {run_id}: only {share.share:.0%} of the {share.matrices:,} matrix weights outside embeddings and "
            "head are quantized; the others are in no plain linear layers (fused experts, for example) and stay dense",
            flush=True,
        )
