"""python -m qlora_lab.chat run=ID: talk with a base and its adapters in the terminal."""

import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from qlora_lab.config.command import command
from qlora_lab.config.load import typed_from_hydra
from qlora_lab.config.schema import ChatConfig
from qlora_lab.data.rows import ASSISTANT, SYSTEM, USER, Turn
from qlora_lab.errors import ModelError, QloraLabError, unknown_name
from qlora_lab.serve import open_shared

if TYPE_CHECKING:  # torch: only once there is somebody to talk with
    from qlora_lab.serving.scheduler import Piece
    from qlora_lab.serving.shared_base import SharedBase

COMMANDS = """\
/adapter        which adapters there are
/adapter NAME   go on with another one, or with the base by its name; the conversation stays
/reset          forget the conversation
/help           this list
/quit           end, as Ctrl-D does; Ctrl-C ends an answer"""


class Chat:
    """One conversation, answered by an adapter that can be changed between turns."""

    def __init__(self, shared: "SharedBase", config: ChatConfig) -> None:
        from qlora_lab.serving.asking import Asking
        from qlora_lab.serving.scheduler import Scheduler
        from qlora_lab.serving.writing import Choice

        self._shared = shared
        self._asking = Asking(shared, config.max_new_tokens)
        self._new_scheduler = lambda: Scheduler(shared, max_rows=1)
        self._choice = Choice(config.temperature, config.top_p, config.seed)
        self._opening = [] if config.system is None else [Turn(SYSTEM, config.system)]
        self._turns = list(self._opening)
        self._adapter = next(iter(shared.names), None)
        if config.adapter is not None:
            self.switch(config.adapter)

    @property
    def name(self) -> str:
        """Who answers."""
        return self._adapter or self._shared.name

    def switch(self, name: str) -> None:
        """Let another adapter answer, or the base.

        Raises:
            ModelError: there is none of that name.
        """
        known = [self._shared.name, *self._shared.names]
        if name not in known:
            raise ModelError(unknown_name("the adapter", name, known))
        self._adapter = None if name == self._shared.name else name

    def reset(self) -> None:
        self._turns = list(self._opening)

    def listed(self) -> str:
        names = [self._shared.name, *self._shared.names]
        return "\n".join(f"{'*' if name == self.name else ' '} {name}" for name in names)

    def ask(self, text: str) -> None:
        """Print the answer as it is written; Ctrl-C ends it, and what was written stays in the conversation.

        Raises:
            DataError: the conversation has become too long.
        """
        turns = [*self._turns, Turn(USER, text)]
        job = self._asking.chat(self._adapter, turns, self._choice, _show)
        scheduler = self._new_scheduler()  # Ctrl-C may leave one in the middle of a step
        scheduler.submit(job)
        with suppress(KeyboardInterrupt):
            while scheduler.work():
                pass
        print()
        self._turns = [*turns, Turn(ASSISTANT, job.writing.text)]


def chat(node: DictConfig) -> None:
    """Open what the configuration names, and talk until the input ends."""
    config = typed_from_hydra(node, ChatConfig)
    shared = open_shared(config)
    with shared.opened.computing():
        converse(Chat(shared, config))


def converse(talk: Chat) -> None:
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"{talk.name} answers; /help lists what else you can do.")
    while True:
        try:
            line = input("\n> " if terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/quit":
            return
        try:
            respond(talk, line)
        except QloraLabError as error:
            print(f"error: {error}", flush=True)


def respond(talk: Chat, line: str) -> None:
    """Do what a line asks for, or answer it."""
    word, _, rest = line.partition(" ")
    if word == "/adapter" and rest:
        talk.switch(rest.strip())
        print(f"{talk.name} answers from now on.")
    elif word == "/adapter":
        print(talk.listed())
    elif word == "/reset":
        talk.reset()
        print("The conversation is forgotten.")
    elif word.startswith("/"):
        print(COMMANDS)
    elif line:
        talk.ask(line)


def _show(piece: "Piece") -> None:
    """Print a piece; control characters of a model's text could change the terminal."""
    safe = "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in piece.text)
    print(safe, end="", flush=True)


def main() -> None:
    command("chat", chat, schema=ChatConfig, schema_name="chat_schema")


if __name__ == "__main__":
    main()
