"""The model under test, and how texts become the tokens that it is scored on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_lab.config.schema import CAUSAL, RunConfig
from qlora_lab.data.prompts import data_ids, markup_ids, own_surroundings
from qlora_lab.errors import DataError
from qlora_lab.evaluation.benchmarks.likelihood import Advance, Pair, log_likelihoods
from qlora_lab.models.tasks import task_of
from qlora_lab.wheels import default_cache_dir


@dataclass(frozen=True)
class Examinee:
    """A model with what it needs to be scored.

    Attributes:
        prompt_format: name of the format in which it is given tasks to answer in words.
        max_length_tokens: most tokens it reads at once.
        batch_tokens: most tokens in a batch, padding included.
        loss_chunk_tokens: rows of logits in memory at once.
        cache_dir: where fetched wheels lie.
        data_dir: where relative paths are looked up first.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompt_format: str
    max_length_tokens: int
    batch_tokens: int
    loss_chunk_tokens: int
    cache_dir: Path
    data_dir: Path

    @classmethod
    def of_run(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RunConfig) -> "Examinee":
        """Take what a run's configuration says."""
        return cls(
            model,
            tokenizer,
            prompt_format=config.data.prompt_format or config.model.prompt_format,
            max_length_tokens=config.model.max_length_tokens,
            batch_tokens=config.evaluation.batch_tokens,
            loss_chunk_tokens=config.trainer.loss_chunk_tokens,
            cache_dir=Path(config.paths.cache_dir) if config.paths.cache_dir else default_cache_dir(),
            data_dir=Path(config.paths.data_dir),
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def log_likelihoods(self, pairs: Sequence[Pair], advance: Advance) -> list[float]:
        return log_likelihoods(
            self.model,
            pairs,
            pad_id=self.pad_id,
            batch_tokens=self.batch_tokens,
            chunk_tokens=self.loss_chunk_tokens,
            device=self.device,
            advance=advance,
        )


@dataclass(frozen=True)
class Texts:
    """How texts become tokens: as the tokenizer puts them itself, without prompt format or chat template.

    Names of control tokens inside a text are plain text.

    Attributes:
        before: token ids that the tokenizer puts before a text, such as bos.
        after: those it puts after one, which an encoder reads; () for a causal model.
        start_id: stands before a text that has no context: bos, or eos where there is no bos.
    """

    tokenizer: PreTrainedTokenizerBase
    before: tuple[int, ...]
    after: tuple[int, ...]
    start_id: int
    causal: bool

    @classmethod
    def of(cls, examinee: Examinee) -> "Texts":
        tokenizer = examinee.tokenizer
        before, after = (markup_ids(text, tokenizer) for text in own_surroundings(tokenizer))
        causal = task_of(examinee.model) == CAUSAL
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return cls(tokenizer, before, () if causal else after, start, causal)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize texts that nothing precedes."""
        return [[*self.before, *ids] for ids in data_ids(texts, self.tokenizer)]

    def pairs(self, texts: Sequence[tuple[str, str]]) -> list[Pair]:
        """Tokenize contexts and their continuations.

        A causal model gets both as one text, split where the context's tokens end; white space at the end of a context
        goes with the continuation. An encoder-decoder gets them apart. An empty context is the start token. So does
        lm-evaluation-harness (Gao et al. 2024).

        Raises:
            DataError: a continuation adds no token.
        """
        if not self.causal:
            read, written = (data_ids(side, self.tokenizer) for side in zip(*texts, strict=True))
            return [
                Pair([*self.before, *context, *self.after], continuation)
                for context, continuation in zip(read, written, strict=True)
            ]
        contexts = self.ids([context.rstrip() for context, _ in texts])
        wholes = self.ids([context + continuation for context, continuation in texts])
        found = [
            Pair(context, whole[len(context) :]) if text.strip() else Pair([self.start_id], whole[len(self.before) :])
            for (text, _), context, whole in zip(texts, contexts, wholes, strict=True)
        ]
        for pair, (_, continuation) in zip(found, texts, strict=True):
            if not pair.continuation_ids:
                raise DataError(
                    f"'{continuation[:80]}' has no token of its own after its context, so there is nothing to score; "
                    "leave its question out"
                )
        return found


def check_fits(pair_tokens: int, examinee: Examinee, what: str) -> None:
    """Refuse an item that the model cannot read whole; cutting it would score another one.

    Raises:
        DataError: it is longer than the model's context.
    """
    if pair_tokens > examinee.max_length_tokens:
        raise DataError(
            f"{what} takes {pair_tokens:,} tokens, and model.max_length_tokens is {examinee.max_length_tokens:,}; "
            "items are never cut: raise it where the model has more positions, or leave the item out"
        )
