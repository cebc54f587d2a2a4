"""Prompt formats: what stands before and after a source, in text and in tokens.

Four formats, named by model.prompt_format:

- chatml: one user turn and the opening of the assistant's, without a system line;
- chat_template: the same by the tokenizer's own template;
- plain: bos where the tokenizer has one, the source, and a line break unless the source ends in white space;
- encoder: what the tokenizer itself puts around a text, such as <s> and </s>; for models that read before they write.

A source may follow earlier turns of a conversation. The chat formats put each turn as a message; `plain` and `encoder`
as a line "Human:" or "Assistant:" (a system's text without one) and the text below it.

A row without a source is a text to train on as a whole: in every format nothing is put around it, and it
starts after bos (eos where there is no bos), so that its first token has something to be predicted from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qlora_lab.config.schema import PROMPT_FORMATS
from qlora_lab.data.rows import ASSISTANT, SYSTEM, USER, Turn
from qlora_lab.errors import ConfigError, ModelError, unknown_name

PLACEHOLDER = "qlora-lab-source-7f3a"  # stands for the source while a tokenizer's surroundings are found
OTHER_FORMATS = "try chatml or plain as model.prompt_format (or data.prompt_format, where the data sets it)"
PLAIN_LABELS = {SYSTEM: "", USER: "Human:\n", ASSISTANT: "Assistant:\n"}

# The markup before each message of these roles, the last of which is the source, and after that one.
Markup = Callable[[tuple[str, ...]], list[str]]


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
    markup: Markup
    tokenizer: PreTrainedTokenizerBase
    after_unless_space: bool = False  # `after` is left out where the source ends in white space
    turns_left_out: int = 0  # of the history that `before` holds

    def following(self, history: Sequence[Turn], room_tokens: int | None = None) -> "PromptFormat":
        """Return the format of a source that comes after earlier turns.

        Args:
            history: turns before the source: perhaps a system's, then questions and replies by turns.
            room_tokens: for all that surrounds the source; None: no limit. The oldest question and reply are left
                out until the rest fits, at last the system's turn too.
        """
        if not history:
            return self
        contents = data_ids([turn.text for turn in history], self.tokenizer)
        first = 1 if history[0].role == SYSTEM else 0
        oldest_first = [[place, place + 1] for place in range(first, len(history), 2)] + [[0]] * first
        kept = dict(enumerate(history))
        shown = self._after_turns(kept, contents)
        while room_tokens is not None and kept and shown.overhead_tokens > room_tokens:
            for place in oldest_first.pop(0):
                kept.pop(place, None)
            shown = self._after_turns(kept, contents)
        return replace(shown, turns_left_out=len(history) - len(kept))

    def _after_turns(self, kept: dict[int, Turn], contents: Sequence[Sequence[int]]) -> "PromptFormat":
        if not kept:
            return self
        *openings, after = self.markup((*(turn.role for turn in kept.values()), USER))
        before, before_ids = "", []
        for opening, (place, turn) in zip(openings, kept.items(), strict=False):
            before += opening + turn.text
            before_ids += [*markup_ids(opening, self.tokenizer), *contents[place]]
        return replace(
            self,
            before=before + openings[-1],
            after=after,
            before_ids=(*before_ids, *markup_ids(openings[-1], self.tokenizer)),
            after_ids=markup_ids(after, self.tokenizer),
            after_unless_space=False,
        )

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
    markup = find_markup(name, tokenizer)
    before, after = markup((USER,))
    return PromptFormat(
        name=name,
        before=before,
        after=after,
        before_ids=markup_ids(before, tokenizer),
        after_ids=markup_ids(after, tokenizer),
        start_id=tokenizer.eos_token_id if bos_id is None else bos_id,
        markup=markup,
        tokenizer=tokenizer,
        after_unless_space=name == "plain",
    )


def find_markup(name: str, tokenizer: PreTrainedTokenizerBase) -> Markup:
    if name == "chatml":
        return chatml_markup
    if name == "chat_template":
        return chat_template_markup(tokenizer)
    surroundings = own_surroundings(tokenizer) if name == "encoder" else (tokenizer.bos_token or "", "\n")
    return transcript_markup(*surroundings, replies_in_place=name == "plain")


def chatml_markup(roles: tuple[str, ...]) -> list[str]:
    openings = [f"<|im_start|>{role}\n" for role in (*roles, ASSISTANT)]
    return [openings[0], *(f"<|im_end|>\n{opening}" for opening in openings[1:])]


def transcript_markup(before: str, after: str, *, replies_in_place: bool) -> Markup:
    """Return the markup of texts that stand alone, or below each other with their speakers.

    Args:
        replies_in_place: whether the reply is written right after the prompt, and so gets a speaker's line too.
    """

    def markup(roles: tuple[str, ...]) -> list[str]:
        if len(roles) == 1:
            return [before, after]
        openings = [before + PLAIN_LABELS[roles[0]], *(f"\n\n{PLAIN_LABELS[role]}" for role in roles[1:])]
        return [*openings, f"\n\n{PLAIN_LABELS[ASSISTANT]}" if replies_in_place else after]

    return markup


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


def chat_template_markup(tokenizer: PreTrainedTokenizerBase) -> Markup:
    """Return what a tokenizer's chat template puts around the messages of a conversation."""
    if not tokenizer.chat_template:
        raise ModelError(f"the tokenizer has no chat template; {OTHER_FORMATS}")

    @cache
    def markup(roles: tuple[str, ...]) -> list[str]:
        messages = [{"role": role, "content": f"<{place} {PLACEHOLDER}>"} for place, role in enumerate(roles)]
        try:
            rest = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise ModelError(
                f"the tokenizer's chat template refuses messages of {', '.join(roles)} ({error}); {OTHER_FORMATS}"
            ) from error
        parts = []
        for message in messages:
            before, found, rest = rest.partition(message["content"])
            if not found or message["content"] in rest:
                times = 2 if found else 0
                raise ModelError(
                    f"the tokenizer's chat template repeats or drops the {message['role']}'s message ({times} times "
                    f"in the prompt); {OTHER_FORMATS}"
                )
            parts.append(before)
        return [*parts, rest]

    return markup


def markup_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokenize text of our own, in which control tokens are meant."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()


def data_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenize texts of a data set, in which a control token's name is only text."""
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
