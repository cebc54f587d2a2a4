"""A tokenizer without files, for models with random weights."""

import re
from typing import Any

from transformers import ByT5Tokenizer

from qlora_lab.config.schema import BYTE_LEVEL

__all__ = ["BYTE_LEVEL", "ByteLevelTokenizer"]


class ByteLevelTokenizer(ByT5Tokenizer):
    """One token per UTF-8 byte, after pad, eos and unk; 384 tokens with ByT5's 125 extra ones.

    A model with more tokens, as big random ones have, may generate those too: they read as unk.
    """

    def tokenize(self, text: str, **options: Any) -> list[str]:  # type: ignore[override]  # as the Python tokenizers do
        """Split a text; as in fast tokenizers, what `split_special_tokens` splits is special tokens alone."""
        added = [str(token) for token in self.added_tokens_decoder.values() if not token.special]
        plain = sorted(set(added).difference(self.all_special_tokens), key=len, reverse=True)
        if not (plain and options.get("split_special_tokens")):
            return list(super().tokenize(text, **options))
        parts = re.split(f"({'|'.join(map(re.escape, plain))})", text)  # every second one is a plain added token
        return [
            token
            for number, part in enumerate(parts)
            for token in ([part] if number % 2 else super(ByteLevelTokenizer, self).tokenize(part, **options))
        ]

    def _convert_id_to_token(self, index: int) -> str:
        known = index < self.vocab_size + self.offset
        return str(super()._convert_id_to_token(index)) if known else str(self.unk_token)
