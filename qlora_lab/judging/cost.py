"""What asking costs: expected before anything is sent, bounded while it is sent, and counted from what was used.

Tokens of a prompt are expected at one for 4 bytes of UTF-8, and bounded by one for 2 bytes, which no text of a known
language reaches in the vocabularies of today's models; a reply is bounded by max_tokens, and expected to have
`EXPECTED_REPLY_TOKENS`, about what GPT-4's released reviews have.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qlora_lab.judging.prompts import Message
from qlora_lab.judging.settings import Price

EXPECTED_BYTES, FEWEST_BYTES = 4, 2  # of a token
MESSAGE_TOKENS = 8  # for a message's role and frame
EXPECTED_REPLY_TOKENS = 250
MILLION = 1e6


@dataclass(frozen=True)
class Estimate:
    """Tokens and US dollars of some requests that are not sent yet; dollars are None where the price is not known."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    most: float | None


def prompt_tokens(messages: Sequence[Message], bytes_per_token: int = EXPECTED_BYTES) -> int:
    return sum(MESSAGE_TOKENS + math.ceil(len(message["content"].encode()) / bytes_per_token) for message in messages)


def cost_of(price: Price | None, prompt: int, completion: int) -> float | None:
    """Return the US dollars of so many tokens."""
    return None if price is None else (price.prompt * prompt + price.completion * completion) / MILLION


def most_cost(price: Price | None, messages: Sequence[Message], max_tokens: int) -> float | None:
    """Return what a request can cost at most."""
    return cost_of(price, prompt_tokens(messages, FEWEST_BYTES), max_tokens)


def estimate(requests: Iterable[Sequence[Message]], price: Price | None, max_tokens: int) -> Estimate:
    """Add up what requests will cost, reminders after replies that cannot be read not counted."""
    asked = list(requests)
    prompts = sum(prompt_tokens(messages) for messages in asked)
    replies = len(asked) * min(EXPECTED_REPLY_TOKENS, max_tokens)
    most = [most_cost(price, messages, max_tokens) or 0.0 for messages in asked]
    return Estimate(
        len(asked), prompts, replies, cost_of(price, prompts, replies), None if price is None else sum(most)
    )
