"""QLoRA as the original study measured it, for tables and figures that compare models.

NF4 with double quantization, adapters of rank 64 in bfloat16 on every linear layer, AdamW with 32-bit states, gradient
checkpointing, bfloat16 on a GPU, one row of 512 tokens.

Source: Dettmers et al. 2023, "QLoRA", Fig. 6.
"""

from qlora_lab.config.schema import (
    CAUSAL,
    CLASSIFICATION,
    AdapterConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    QuantConfig,
    RunConfig,
    SourceConfig,
    TrainerConfig,
)
from qlora_lab.memory.layer import Shape

RANK, TOKENS = 64, 512
USUAL_SHAPE = Shape(1, TOKENS)


def usual_run(model: ModelConfig) -> RunConfig:
    """Return the run whose memory stands for the model's."""
    labels = ["no", "yes"] if model.task == CLASSIFICATION else []
    # what an encoder reads and its decoder writes; a causal model has them in one row
    source, target = (TOKENS // 2, TOKENS // 2) if model.task != CLASSIFICATION else (TOKENS - 2, 2)
    data = DataConfig(
        "usual",
        SourceConfig("procedural", template="procedural"),
        rows=1,
        max_source_tokens=source,
        max_target_tokens=target,
        loss_on="everything" if model.task == CAUSAL else "target",
        labels=labels,
    )
    trainer = TrainerConfig(device="cuda", compute_dtype="bfloat16", micro_batch_size=1, gradient_checkpointing=True)
    evaluation = EvaluationConfig(max_source_tokens=8, max_target_tokens=8, max_new_tokens=8)
    return RunConfig(
        model, QuantConfig(), AdapterConfig(rank=RANK, dtype="bfloat16"), data, OptimConfig(), trainer, evaluation
    )
