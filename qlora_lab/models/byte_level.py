"""A tokenizer without files, for models with random weights."""

from transformers import ByT5Tokenizer

from qlora_lab.config.schema import BYTE_LEVEL

__all__ = ["BYTE_LEVEL", "ByteLevelTokenizer"]


class ByteLevelTokenizer(ByT5Tokenizer):
    """One token per UTF-8 byte, after pad, eos and unk; 384 tokens with ByT5's 125 extra ones.

    A model with more tokens, as big random ones have, may generate those too: they read as unk.
    """

    def _convert_id_to_token(self, index: int) -> str:
        known = index < self.vocab_size + self.offset
        return str(super()._convert_id_to_token(index)) if known else str(self.unk_token)
