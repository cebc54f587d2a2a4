"""Templates of conversations: dialogues in one text, lists of messages, and trees of ranked replies.

A reply's row holds the turns before it as its history, so that a prompt format can put each turn as the model knows
it, and the question that opened the conversation as `asked`, so that replies of one conversation are held out together.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from qlora_lab.data.records import BrokenRowError, BrokenRows, Record, family_of, kind_of, list_of, text_of
from qlora_lab.data.rows import ASSISTANT, SYSTEM, USER, Row, Turn
from qlora_lab.errors import unknown_name

Columns = Mapping[str, Any]

HH_TURN = re.compile(r"\n\n(Human|Assistant):")  # Bai et al. 2022, the format of the HH-RLHF files
OASST_TURN = re.compile(r"### (Human|Assistant):")  # the openassistant-guanaco files of the QLoRA study
OASST_ROLES = {"prompter": USER, "assistant": ASSISTANT}  # of the messages of Open Assistant (Köpf et al. 2023)


def turns_of(dialogue: str, mark: re.Pattern[str]) -> list[tuple[str, str]]:
    """Cut a dialogue at its marks into (speaker, text) turns; what stands before the first is left out."""
    parts = mark.split(dialogue)
    return [(speaker, text.strip()) for speaker, text in zip(parts[1::2], parts[2::2], strict=True)]


def opening_question(dialogue: str, mark: re.Pattern[str]) -> str | None:
    turns = turns_of(dialogue, mark)
    return turns[0][1] or None if turns else None


def chosen_dialogue(columns: Columns) -> list[Row]:
    """HH-RLHF as the study trained on it: the whole preferred dialogue, nothing before it."""
    dialogue = text_of(columns, "chosen")
    return [Row("", dialogue, asked=opening_question(dialogue, HH_TURN))]


def reply_to(turns: list[tuple[str, str]], reply: str) -> list[Row]:
    """Make a reply's row: to the bare question where one turn stands before it, else to a transcript."""
    if not turns:
        return []
    transcript = "\n\n".join(f"{speaker}: {text}" for speaker, text in turns)
    source = turns[0][1] if len(turns) == 1 else transcript
    return [Row(source, reply.strip(), asked=turns[0][1] or None)]


def hh_last_turn(columns: Columns) -> list[Row]:
    """Ours: the last reply of the preferred dialogue to what stands before it."""
    turns = turns_of(text_of(columns, "chosen"), HH_TURN)
    if not turns or turns[-1][0] != "Assistant":
        return []
    return reply_to(turns[:-1], turns[-1][1])


def conversation_text(columns: Columns) -> list[Row]:
    """OASST1 as the study trained on it: the whole conversation, nothing before it."""
    conversation = text_of(columns, "text")
    return [Row("", conversation, asked=opening_question(conversation, OASST_TURN))]


def conversation_first_turn(columns: Columns) -> list[Row]:
    """Ours: the first question of a conversation and its answer."""
    turns = turns_of(text_of(columns, "text"), OASST_TURN)
    if [speaker for speaker, _ in turns[:2]] != ["Human", "Assistant"]:
        return []
    return [Row(turns[0][1], turns[1][1])]


def conversation_reply(columns: Columns) -> list[Row]:
    """Ours: the reply to a conversation that ends with "### Assistant:", as in the study's OASST1 prompts."""
    turns = turns_of(text_of(columns, "input"), OASST_TURN)
    reply = text_of(columns, "output")
    return reply_to(turns[:-1], reply) if turns and turns[-1] == ("Assistant", "") else []


# Lists of messages


def messages_every_reply(columns: Columns) -> list[Row]:
    """Chat in messages: a row for each reply of the assistant, which is scored, after all turns before it."""
    return every_reply(messages_of(columns), family=family_of(columns))


def messages_last_reply(columns: Columns) -> list[Row]:
    """Chat in messages: one row, whose last reply of the assistant is scored."""
    return messages_every_reply(columns)[-1:]


def messages_of(columns: Columns) -> list[Turn]:
    """Return the turns in the column `messages`, each an object with `role` and `content`.

    Raises:
        BrokenRowError: the column or one of its messages is not so, or has another role.
    """
    turns = []
    for message in list_of(columns, "messages"):
        role = text_of(message, "role")
        if role not in (SYSTEM, USER, ASSISTANT):
            raise BrokenRowError(unknown_name("the role of a message", role, (SYSTEM, USER, ASSISTANT)))
        turns.append(Turn(role, text_of(message, "content").strip()))
    return turns


def every_reply(turns: Sequence[Turn], *, family: str | None = None, language: str | None = None) -> list[Row]:
    """Return the rows of a conversation; none where user and assistant do not take turns, the user first."""
    first = 1 if turns and turns[0].role == SYSTEM else 0
    if any(turn.role != (USER, ASSISTANT)[place % 2] for place, turn in enumerate(turns[first:])):
        return []
    asked = turns[first].text or None if len(turns) > first else None
    return [
        Row(
            turns[place - 1].text,
            turns[place].text,
            family=family,
            language=language,
            # of a single question the row knows without being told
            asked=asked if place > first + 1 else None,
            history=tuple(turns[: place - 1]),
        )
        for place in range(first + 1, len(turns), 2)
        if turns[place - 1].text
    ]


# Trees of ranked replies


def oasst_trees(records: Iterable[Record], broken: BrokenRows) -> Iterator[Record]:
    """Put the messages of Open Assistant together into trees; a record that is a tree already passes as it is.

    Messages name their parent, so they may come in any order. A tree stands where its first message does.
    """
    messages: dict[str, list[Record]] = {}
    for record in records:
        if "message_id" not in record.columns:
            yield record
            continue
        try:
            text_of(record.columns, "message_id")
            messages.setdefault(text_of(record.columns, "message_tree_id"), []).append(record)
        except BrokenRowError as error:
            broken.add(record.place, str(error))
    for tree, members in messages.items():
        columns = [member.columns for member in members]
        roots = [message for message in columns if message.get("parent_id") is None]
        if len(roots) != 1:
            broken.add(members[0].place, f"tree '{tree}' has {len(roots)} messages without a parent; it needs one")
        elif len({message["message_id"] for message in columns}) < len(columns):
            broken.add(members[0].place, f"tree '{tree}' holds a message twice")
        else:
            yield Record(members[0].place, {"prompt": roots[0], "children": by_parent(columns)})


def by_parent(messages: Iterable[Columns]) -> dict[str | None, list[Columns]]:
    children: dict[str | None, list[Columns]] = {}
    for message in messages:
        children.setdefault(message.get("parent_id"), []).append(message)
    return children


def best_path(columns: Columns) -> list[Columns]:
    """Return the messages from a tree's prompt along the best-ranked replies to the end.

    Rank 0 is the best; a reply without a rank (an only one, or one that nobody ranked) comes after those that have
    one, and the first listed wins among equals. Deleted messages, and those that reviewers refused, end no path: they
    are passed over.
    """
    message = columns["prompt"] if "prompt" in columns else text_of(columns, "prompt")
    if not isinstance(message, Mapping):
        raise BrokenRowError(f"column 'prompt' must hold a message; got {kind_of(message)}")
    path = [message]
    while replies := [reply for reply in replies_to(message, columns) if is_kept(reply)]:
        message = min(replies, key=rank_of)
        path.append(message)
    return path


def replies_to(message: Columns, columns: Columns) -> Sequence[Columns]:
    if "children" in columns:
        found: Sequence[Columns] = columns["children"].get(message["message_id"], [])
        return found
    return list_of(message, "replies") if "replies" in message else []


def is_kept(message: Columns) -> bool:
    return not message.get("deleted") and message.get("review_result") is not False


def rank_of(message: Columns) -> float:
    rank = message.get("rank")
    return float("inf") if rank is None else float(rank)


def path_turns(columns: Columns) -> list[Turn]:
    turns = []
    for message in best_path(columns):
        role = text_of(message, "role")
        if role not in OASST_ROLES:
            raise BrokenRowError(unknown_name("the role of a message", role, OASST_ROLES))
        turns.append(Turn(OASST_ROLES[role], text_of(message, "text")))
    return turns


def oasst_best_path(columns: Columns) -> list[Row]:
    """OASST1 as the study trained on it, from the trees: the best-ranked path as one text, nothing before it.

    One row a tree: the release's 9,846 trees for training give the study's 9,846 rows, in all languages.
    """
    turns = path_turns(columns)
    names = {USER: "Human", ASSISTANT: "Assistant"}
    text = "".join(f"### {names[turn.role]}: {turn.text}" for turn in turns)
    language = language_of(columns)
    return [Row("", text, family=language, asked=turns[0].text.strip() or None, language=language)]


def oasst_best_replies(columns: Columns) -> list[Row]:
    """Ours: a row for each reply of the assistant on the best-ranked path, after all turns before it."""
    turns = [Turn(turn.role, turn.text.strip()) for turn in path_turns(columns)]
    language = language_of(columns)
    return every_reply(turns, family=language, language=language)


def language_of(columns: Columns) -> str | None:
    language = columns["prompt"].get("lang")
    return language if isinstance(language, str) else None
