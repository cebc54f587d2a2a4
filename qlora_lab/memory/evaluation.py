"""What evaluation takes: for a small model more than training, because it keeps the expanded weights."""

from qlora_lab.config.architecture import stacks
from qlora_lab.config.families import Linear, head_size
from qlora_lab.config.schema import ArchitectureConfig, RunConfig

DENSE_LIMIT_BYTES = 2_000_000_000  # of expanded weights that evaluation keeps (evaluation/weights.py)
VECTORS = 4  # of feed-forward width for each position, of the layer at hand


def evaluation_bytes(
    config: RunConfig, architecture: ArchitectureConfig, linears: list[Linear], compute_bytes: int
) -> int:
    """Return what is there while a batch of held-out rows is scored or answered, besides the model and its adapters."""
    expanded = 0
    if config.quant.format != "none":
        expanded = sum(rows * columns for _, rows, columns in linears) * compute_bytes
    evaluation = config.evaluation
    answers_all = any(chosen.exact_match for chosen in evaluation.sets.values()) or config.data.exact_match
    longest = evaluation.max_source_tokens + max(evaluation.max_target_tokens, evaluation.max_new_tokens)
    scored, answered = (
        max(longest, min(evaluation.batch_tokens, rows * longest))
        for rows in (evaluation.rows, evaluation.rows if answers_all else evaluation.sample_generations)
    )
    keys_and_values = 2 * layers_of(architecture) * architecture.num_kv_heads * head_size(architecture)
    numbers = scored * VECTORS * architecture.feed_forward_size + answered * keys_and_values
    return (expanded if expanded <= DENSE_LIMIT_BYTES else 0) + numbers * compute_bytes


def layers_of(architecture: ArchitectureConfig) -> int:
    return sum(number for _, number in stacks(architecture))
