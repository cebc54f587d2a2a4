"""What evaluation takes: with expanded weights, or the keys and values of many answers, at times more than training."""

from collections.abc import Iterator
from dataclasses import dataclass

from qlora_lab.config.architecture import stacks
from qlora_lab.config.families import Linear, head_size
from qlora_lab.config.schema import CLASSIFICATION, ArchitectureConfig, BenchmarkConfig, EvaluationConfig, RunConfig
from qlora_lab.memory.layer import FLOAT32_BYTES
from qlora_lab.memory.profiles import PROFILES

DENSE_LIMIT_BYTES = 2_000_000_000  # of expanded weights that evaluation keeps (evaluation/weights.py)
VECTORS, MORE_VECTORS = 2, 4  # of feed-forward width for each position, of the layer at hand; more where it is gated
LOGIT_BYTES = 2 * FLOAT32_BYTES  # and what their softmax makes of them
LONGEST_ITEM_TOKENS = 4096  # of a benchmark without limits of its own; five-shot MMLU has the longest, of 2,700


@dataclass(frozen=True)
class Batch:
    """The tokens that a model works on together, those whose keys and values are kept, and the rows that it answers."""

    scored: int
    kept: int
    answered: int


def evaluation_bytes(
    config: RunConfig, architecture: ArchitectureConfig, linears: list[Linear], compute_bytes: int
) -> int:
    """Return what is there while the largest batch is scored or answered, besides the model and its adapters.

    Up to a quarter too much: rows are taken to be as long as they may be, and the layer at hand (or the logits, which
    come after it) and all keys and values to be there together.
    """
    expanded = 0
    if config.quant.format != "none":
        expanded = sum(rows * columns for _, rows, columns in linears) * compute_bytes
    (*_, (_, layers)) = stacks(architecture)  # of an encoder-decoder, its decoder
    if config.model.task == CLASSIFICATION:  # which writes nothing
        layers = 0
    keys_and_values = 2 * layers * architecture.num_kv_heads * head_size(architecture)
    profile = PROFILES[architecture.model_type]
    vectors = MORE_VECTORS if profile.gated or profile.decoder is not None else VECTORS
    most = max(
        max(
            batch.scored * vectors * architecture.feed_forward_size * compute_bytes,
            _logits_bytes(config, batch, architecture.vocab_size, compute_bytes),
        )
        + batch.kept * keys_and_values * compute_bytes
        for batch in _batches(config)
    )
    return (expanded if expanded <= DENSE_LIMIT_BYTES else 0) + most


def _logits_bytes(config: RunConfig, batch: Batch, vocab_size: int, compute_bytes: int) -> int:
    """Return the bytes of the logits of a chunk that is scored, or of the next token of all answers, in float32 too."""
    if config.model.task == CLASSIFICATION:
        return 0
    chunk = min(config.trainer.loss_chunk_tokens, batch.scored) * LOGIT_BYTES
    return vocab_size * max(chunk, batch.answered * (compute_bytes + FLOAT32_BYTES))


def _batches(config: RunConfig) -> Iterator[Batch]:
    """Yield the largest batch of the held-out rows, and of each benchmark."""
    evaluation = config.evaluation
    answers_all = any(chosen.exact_match for chosen in evaluation.sets.values()) or config.data.exact_match
    longest = evaluation.max_source_tokens + max(evaluation.max_target_tokens, evaluation.max_new_tokens)
    answered = evaluation.rows if answers_all else evaluation.sample_generations
    yield Batch(
        _together(evaluation, longest, evaluation.rows),
        _together(evaluation, longest, answered),
        _answered_together(evaluation, evaluation.max_new_tokens, answered),
    )
    for benchmark in evaluation.benchmarks.values():
        yield _of_benchmark(benchmark, evaluation, config.model.max_length_tokens)


def _of_benchmark(benchmark: BenchmarkConfig, evaluation: EvaluationConfig, context_tokens: int) -> Batch:
    if benchmark.task == "perplexity":  # a window and the token before it; one document may have any number
        window = context_tokens if benchmark.window_tokens is None else benchmark.window_tokens + 1
        return Batch(max(window, evaluation.batch_tokens), kept=0, answered=0)
    if benchmark.is_answered_in_words:
        longest = min(benchmark.max_source_tokens + benchmark.max_new_tokens, context_tokens)
        together = _together(evaluation, longest, benchmark.rows)
        answered = _answered_together(evaluation, benchmark.max_new_tokens, benchmark.rows)
        return Batch(together, kept=together, answered=answered)
    longest = min(LONGEST_ITEM_TOKENS, context_tokens)
    return Batch(max(longest, evaluation.batch_tokens), kept=longest if benchmark.shots else 0, answered=0)


def _together(evaluation: EvaluationConfig, longest: int, rows: int | None) -> int:
    """Return the most tokens of a batch of rows; None: any number of them."""
    most = evaluation.batch_tokens if rows is None else min(evaluation.batch_tokens, rows * longest)
    return max(longest, most)


def _answered_together(evaluation: EvaluationConfig, max_new_tokens: int, rows: int | None) -> int:
    """Return the most rows of a batch of answers, whose prompts may be short; None: any number of them."""
    most = max(1, evaluation.batch_tokens // (max_new_tokens + 1))
    return most if rows is None else min(most, rows)
