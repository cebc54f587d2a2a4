"""Prompt formats: what stands before and after a source, in text and in tokens.

Four formats, named by model.prompt_format:

- chatml: one user turn and the opening of the assistant's, without a system line;
- chat_template: the same by the tokenizer's own template;
- plain: bos where the tokenizer has one, the source, and a line break unless the source ends in white space;
- encoder: what the tokenizer itself puts around a text, such as <s> and </s>; for models that read before they write.

A row without a source is a text to train on as a whole: in every format nothing is put around it, and it
starts after bos (eos where there is no bos), so that its first token has something to be predicted from.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qlora_lab.config.schema import PROMPT_FORMATS
from qlora_lab.errors import ConfigError, ModelError, unknown_name

CHATML_BEFORE = "<|im_start|>user\n"
CHATML_AFTER = "<|im_end|>\n<|im_start|>assistant\n"
PLACEHOLDER = "qlora-lab-source-7f3a"  # stands for the source while a chat template is taken apart


@dataclass(frozen=True)
class PromptFormat:
    """What surrounds a source. Surroundings and source are tokenized apart: cutting one never cuts the
    other, and marks such as <|im_end|> inside a source are plain text, not control tokens."""

    name: str
    before: str
    after: str
    before_ids: tuple[int, ...]
    after_ids: tuple[int, ...]
    start_id: int  # before a text that has no source
    after_unless_space: bool = False  # `after` is left out where the source ends in white space

    @property
    def overhead_tokens(self) -> int:
        return len(self.before_ids) + len(self.after_ids)

    def text(self, source: str) -> str:
        """Return the prompt as text, for people to read."""
        if not source.strip():
            return ""
        return f"{self.before}{source}{self.after if self.closes(source) else ''}"

    def ids(self, source: str, source_ids: Sequence[int]) -> list[int]:
        """Return the prompt's tokens around the (possibly truncated) tokens of its source; never empty."""
        if not source.strip():
            return [self.start_id]
        after = self.after_ids if self.closes(source) else ()
        return [*self.before_ids, *source_ids, *after] or [self.start_id]

    def closes(self, source: str) -> bool:
        return not (self.after_unless_space and source[-1:].isspace())


def find_prompt_format(name: str, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """Prepare a prompt format for a tokenizer.

    Raises:
        ConfigError: no such format.
        ModelError: the tokenizer has no eos token, or no (usable) chat template where one is asked for.
    """
    if name not in PROMPT_FORMATS:
        raise ConfigError(unknown_name("model.prompt_format", name, PROMPT_FORMATS))
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no eos token, so no answer could end; set model.tokenizer to one that has")
    bos_id = tokenizer.bos_token_id
    if name == "plain":
        before, after = tokenizer.bos_token or "", "\n"
    elif name == "chatml":
        before, after = CHATML_BEFORE, CHATML_AFTER
    elif name == "encoder":
        before, after = own_surroundings(tokenizer)
    else:
        before, after = chat_template_surroundings(tokenizer)
    return PromptFormat(
        name=name,
        before=before,
        after=after,
        before_ids=markup_ids(before, tokenizer),
        after_ids=markup_ids(after, tokenizer),
        start_id=tokenizer.eos_token_id if bos_id is None else bos_id,
        after_unless_space=name == "plain",
    )


def own_surroundings(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return the special tokens that a tokenizer puts before and after a text, as text."""
    inside = tokenizer(PLACEHOLDER, add_special_tokens=False)["input_ids"]
    whole = tokenizer(PLACEHOLDER)["input_ids"]
    starts = [at for at in range(len(whole) - len(inside) + 1) if whole[at : at + len(inside)] == inside]
    if not starts:
        raise ModelError(
            "the tokenizer changes a text when it puts special tokens around it; try model.prompt_format=plain"
        )
    before, after = whole[: starts[0]], whole[starts[0] + len(inside) :]
    return "".join(tokenizer.convert_ids_to_tokens(before)), "".join(tokenizer.convert_ids_to_tokens(after))


def chat_template_surroundings(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return what a tokenizer's chat template puts before and after one user message."""
    if not tokenizer.chat_template:
        raise ModelError("the tokenizer has no chat template; try model.prompt_format=chatml or plain")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PLACEHOLDER}], tokenize=False, add_generation_prompt=True
    )
    parts = str(prompt).split(PLACEHOLDER)
    if len(parts) != 2:
        raise ModelError(
            f"the tokenizer's chat template repeats or drops the user's message ({len(parts) - 1} times in the "
            "prompt); try model.prompt_format=chatml or plain"
        )
    return parts[0], parts[1]


def markup_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokenize text of our own, in which control tokens are meant."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()


def data_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenize texts of a data set, in which a control token's name is only text."""
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
