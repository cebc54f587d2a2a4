"""Perplexity and bits per byte of a text, document by document.

A document's first token is scored after the start token (bos, or eos where the tokenizer has no bos), so that every
byte counts; the start token itself is never scored. A document longer than a window is cut into windows of
`window_tokens`, one after the other by `stride_tokens`: each token is scored once, after what of its window stands
before it, and the last window reaches back so far that it is full. With no overlap that is how lm-evaluation-harness
cuts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora_lab.config.schema import CAUSAL, BenchmarkConfig
from qlora_lab.data.prompts import data_ids
from qlora_lab.data.records import text_of
from qlora_lab.data.tokenization import Example
from qlora_lab.errors import ConfigError, DataError
from qlora_lab.evaluation.benchmarks.examinee import Examinee, Texts
from qlora_lab.evaluation.benchmarks.items import BenchmarkScores, ItemReader, Ready, spread
from qlora_lab.evaluation.benchmarks.likelihood import Advance, check_finite
from qlora_lab.evaluation.target_loss import score_examples

LARGEST_EXPONENT = 700.0  # of e, in a 64-bit float


def perplexity(examinee: Examinee, config: BenchmarkConfig, reader: ItemReader) -> Ready:
    """Make every document ready, those without text left out; items are windows.

    Raises:
        DataError: rows without the column of the text, or no text at all.
        ConfigError: a window is longer than what the model reads, or a stride than a window.
    """
    place = reader.place
    room = examinee.max_length_tokens - 1  # the start token, or that before the window, takes one
    window = room if config.window_tokens is None else config.window_tokens
    if window > room:
        raise ConfigError(
            f"{place}.window_tokens must be at most {room}, model.max_length_tokens less the start token; got {window}"
        )
    stride = config.stride_tokens or window
    if stride > window:
        raise ConfigError(
            f"{place}.stride_tokens must be at most {window}, the tokens of a window, or tokens between windows would "
            f"not be scored; got {stride}"
        )

    def text(columns: Mapping[str, Any]) -> str:
        return text_of(columns, config.text_column)

    documents = reader.read(config, text)
    chosen = {number: document for number, document in spread(documents, config.rows).items() if document.strip()}
    if not chosen:
        raise DataError(f"{place} has no text to score: all of its {len(documents)} documents are empty")
    start = Texts.of(examinee).start_id
    tokens = data_ids(list(chosen.values()), examinee.tokenizer)
    cut = [list(windows([start, *ids], window, stride)) for ids in tokens]
    examples = [example for document in cut for example in document]

    def score(advance: Advance) -> BenchmarkScores:
        scores = score_examples(
            examinee.model,
            examples,
            pad_id=examinee.pad_id,
            batch_tokens=examinee.batch_tokens,
            chunk_tokens=examinee.loss_chunk_tokens,
            device=examinee.device,
            advance=advance,
        )
        losses = iter([scored.loss_sum for scored in scores])
        check_finite([scored.loss_sum for scored in scores])
        items = [
            {
                "item": number,
                "loss_sum": math.fsum(next(losses) for _ in document),
                "tokens": len(ids),
                "bytes": len(chosen[number].encode()),
                "windows": len(document),
            }
            for number, ids, document in zip(chosen, tokens, cut, strict=True)
        ]
        return BenchmarkScores(pooled(items), items)

    return Ready(len(examples), score)


def pooled(items: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Pool documents: every token weighs the same, and every byte."""
    loss_sum = math.fsum(item["loss_sum"] for item in items)
    tokens, in_bytes = sum(item["tokens"] for item in items), sum(item["bytes"] for item in items)
    loss = loss_sum / tokens
    return {
        "perplexity": math.exp(loss) if loss < LARGEST_EXPONENT else math.inf,
        "bits_per_byte": loss_sum / math.log(2) / in_bytes,
        "loss": loss,
        "tokens": tokens,
        "bytes": in_bytes,
        "documents": len(items),
    }


def windows(ids: Sequence[int], window: int, stride: int) -> Iterator[Example]:
    """Cut a document into windows that together score every token after the first once.

    Args:
        ids: the start token and the document's.
        window: most tokens scored in a window, and read before the last of them.
        stride: tokens from a window's end to the next one's.
    """
    scored, end = 0, min(window, len(ids) - 1)  # number of the last token that is scored so far, and in this window
    while scored < len(ids) - 1:
        first = max(0, end - window)
        yield Example(
            ids[first : end + 1],
            target_start=scored + 1 - first,
            loss_start=scored + 1 - first,
            key="",
            family=None,
            target_bytes=0,
            task=CAUSAL,
        )
        scored, end = end, min(end + stride, len(ids) - 1)
