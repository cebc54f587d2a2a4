"""From messages or a text to the tokens that a model is asked, in the prompt format of its adapter."""

import copy
from collections.abc import Callable, Sequence

from qlora_lab.data.prompts import data_ids, find_prompt_format, markup_ids, own_surroundings
from qlora_lab.data.rows import ASSISTANT, SYSTEM, USER, Turn
from qlora_lab.errors import DataError
from qlora_lab.evaluation.generate import Stops
from qlora_lab.evaluation.prompt_sets import turn_ends
from qlora_lab.serving.scheduler import Job, Piece
from qlora_lab.serving.shared_base import SharedBase
from qlora_lab.serving.writing import Choice, Writing


class TooLongError(DataError):
    """A prompt without room for an answer."""


class Asking:
    """Makes jobs for a base and its adapters; they are answered as evaluation would.

    Args:
        most_new_tokens: of an answer.
        most_tokens: of prompt and answer together, where the model could take more; None: what the model takes.
    """

    def __init__(self, shared: SharedBase, most_new_tokens: int, most_tokens: int | None = None) -> None:
        self._shared = shared
        self._most_new_tokens = most_new_tokens
        self._most_tokens = most_tokens
        # The model's thread decodes while others encode, which changes settings inside a tokenizer.
        self._decoder = copy.deepcopy(shared.tokenizer)
        self._before = markup_ids(own_surroundings(shared.tokenizer)[0], shared.tokenizer)

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and answer together."""
        of_the_model = self._shared.base.model.max_length_tokens
        return of_the_model if self._most_tokens is None else min(of_the_model, self._most_tokens)

    def chat(
        self,
        adapter: str | None,
        turns: Sequence[Turn],
        choice: Choice,
        deliver: Callable[[Piece], None],
        *,
        max_tokens: int | None = None,
        stops: Sequence[str] = (),
    ) -> Job:
        """Ask for the assistant's next turn.

        Args:
            max_tokens: of the answer; None: as many as are allowed and as there is room for.
            stops: texts that end it, besides the end of the turn.

        Raises:
            DataError: the turns are no conversation that waits for an answer, or are too long.
            ModelError: there is no such adapter.
        """
        check_turns(turns)
        name, tokenizer = self._shared.prompt_format(adapter), self._shared.tokenizer
        asked = turns[-1].text
        prompt_format = find_prompt_format(name, tokenizer).following(turns[:-1])
        prompt = prompt_format.ids(asked, data_ids([asked], tokenizer)[0])
        return self._job(adapter, prompt, choice, deliver, max_tokens, turn_ends(name, tokenizer, stops))

    def completion(
        self,
        adapter: str | None,
        prompt: str | Sequence[int],
        choice: Choice,
        deliver: Callable[[Piece], None],
        *,
        max_tokens: int | None = None,
        stops: Sequence[str] = (),
    ) -> Job:
        """Ask for the continuation of a text, in which names of control tokens are these, or of tokens.

        A text gets what the tokenizer puts before one, such as bos, and nothing of what it may put after it.

        Raises:
            DataError: it is empty or too long, or holds numbers that are no tokens.
        """
        tokenizer = self._shared.tokenizer
        ids = list(prompt) if not isinstance(prompt, str) else [*self._before, *markup_ids(prompt, tokenizer)]
        vocabulary = self._shared.model.config.get_text_config().vocab_size
        if not ids or not 0 <= min(ids) <= max(ids) < vocabulary:
            raise DataError(f"the prompt must have at least one token, each from 0 to {vocabulary - 1}")
        return self._job(adapter, ids, choice, deliver, max_tokens, Stops((), tuple(stops)))

    def _job(
        self,
        adapter: str | None,
        prompt: list[int],
        choice: Choice,
        deliver: Callable[[Piece], None],
        max_tokens: int | None,
        stops: Stops,
    ) -> Job:
        most, of_the_model = self.context_tokens, self._shared.base.model.max_length_tokens
        room = most - len(prompt)
        if room < (max_tokens or 1):
            by = "" if most == of_the_model else f" by the server's cache_budget_mb ({of_the_model} by its model)"
            lower = " or lower max_tokens" if room > 0 else ""
            raise TooLongError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {max_tokens or 'not given'}, but prompt and "
                f"answer have at most {most} together{by}; shorten the prompt{lower}"
            )
        if max_tokens is not None and max_tokens > self._most_new_tokens:
            raise DataError(f"max_tokens must be at most {self._most_new_tokens} here; got {max_tokens}")
        writing = Writing(self._decoder, choice, stops, max_tokens or min(room, self._most_new_tokens))
        return Job(prompt, adapter, writing, deliver)


def check_turns(turns: Sequence[Turn]) -> None:
    """Refuse what is no conversation that waits for an answer.

    Raises:
        DataError: with the roles that it has.
    """
    spoken = turns[1:] if turns and turns[0].role == SYSTEM else turns
    by_turns = all(turn.role == (USER, ASSISTANT)[place % 2] for place, turn in enumerate(spoken))
    if not by_turns or len(spoken) % 2 == 0:
        raise DataError(
            "messages must be a system's or none, then a user's and an assistant's by turns, and end with a user's; "
            f"got {', '.join(turn.role for turn in turns)}"
        )
    if not turns[-1].text.strip():
        raise DataError("the last message must not be empty")
