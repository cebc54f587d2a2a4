"""What evaluation takes: with expanded weights, or the keys and values of many answers, at times more than training."""

from qlora_lab.config.architecture import stacks
from qlora_lab.config.families import Linear, head_size
from qlora_lab.config.schema import CLASSIFICATION, ArchitectureConfig, RunConfig
from qlora_lab.memory.profiles import PROFILES

DENSE_LIMIT_BYTES = 2_000_000_000  # of expanded weights that evaluation keeps (evaluation/weights.py)
VECTORS, MORE_VECTORS = 2, 4  # of feed-forward width for each position, of the layer at hand; more where it is gated


def evaluation_bytes(
    config: RunConfig, architecture: ArchitectureConfig, linears: list[Linear], compute_bytes: int
) -> int:
    """Return what is there while a batch of held-out rows is scored or answered, besides the model and its adapters.

    Up to a quarter too much: rows are taken to be as long as they may be, and the layer at hand and all keys and values
    to be there together.
    """
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
    (*_, (_, layers)) = stacks(architecture)  # of an encoder-decoder, its decoder
    if config.model.task == CLASSIFICATION:  # which writes nothing
        layers = 0
    keys_and_values = 2 * layers * architecture.num_kv_heads * head_size(architecture)
    profile = PROFILES[architecture.model_type]
    vectors = MORE_VECTORS if profile.gated or profile.decoder is not None else VECTORS
    numbers = scored * vectors * architecture.feed_forward_size + answered * keys_and_values
    return (expanded if expanded <= DENSE_LIMIT_BYTES else 0) + numbers * compute_bytes
