"""JSON read value by value: in memory are a piece of the file and the value at hand, not the whole."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple, NoReturn

from qlora_lab.errors import DataError

CHUNK_BYTES = 2**20
SPACE = re.compile(r"[ \t\n\r]*")
HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # a surrogate, which only makes a character with another
TOO_MUCH = "JSON that is nested too deep, or has a number of too many digits"
# What is cut short is found wrong where it begins: words such as "-Infinity" and the two escapes of a character in
# the last few characters, a string anywhere.
LONGEST_PART_CHARACTERS = 16
OPEN_STRING = "Unterminated string"


class JsonValue(NamedTuple):
    """A value, and whether an escape in it may stand for half a character."""

    value: Any
    may_be_no_text: bool


class JsonText:
    """The values of a JSON file in order. What is wrong is told as `json.loads` of the whole would, when it is reached.

    Args:
        stream: UTF-8 text, at its beginning.
        origin: names the file in errors.
        chunk_bytes: read at once, and as many as are there already while a value goes on.
    """

    def __init__(self, stream: BinaryIO, origin: str, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._stream = stream
        self._origin = origin
        self._chunk_bytes = chunk_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text = ""
        self._place = 0  # in the text, up to which it is used
        self._lines = 0  # that end in what was dropped before the text
        self._columns = 0  # of the last line of that, which goes on
        self._is_whole = False  # nothing is left to be read

    def next_character(self) -> str:
        """Skip white space and return what comes then, without taking it; nothing at the end of the file."""
        while True:
            found = SPACE.match(self._text, self._place)
            assert found is not None  # of any length, also none
            self._place = found.end()
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._read_on():
                return ""

    def items(self) -> Iterator[JsonValue]:
        """Yield the items of an array, which the text is at, and take what ends it and the file.

        Raises:
            DataError: as `value` does.
        """
        self._place += len("[")
        if self.next_character() == "]":
            self._place += len("]")
        else:
            yield from self._items()
        if self.next_character():
            self._refuse("Extra data", self._place)

    def _items(self) -> Iterator[JsonValue]:
        separator = ","
        while separator == ",":
            self.next_character()
            yield self.value()
            separator = self.next_character()
            if separator not in (",", "]"):
                self._refuse("Expecting ',' delimiter", self._place)
            self._place += len(separator)

    def value(self) -> JsonValue:
        """Take the value that the text is at.

        Raises:
            DataError: it is no JSON, too much of it, or no text.
        """
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                near_the_end = error.pos + LONGEST_PART_CHARACTERS > len(self._text)
                may_be_cut = near_the_end or error.msg.startswith(OPEN_STRING)
                after = error.pos - self._place
                if not may_be_cut or not self._read_on():
                    self._refuse(error.msg, self._place + after)
                continue
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self._origin} holds {TOO_MUCH}") from error
            characters = end - self._place
            if end < len(self._text) or not self._read_on():  # a number may go on
                end = self._place + characters
                half = HALF_CHARACTER.search(self._text, self._place, end)
                self._place = end
                return JsonValue(value, half is not None)

    def _read_on(self) -> bool:
        """Drop the text before the place, which is 0 then, and read more; say whether there was any."""
        if self._is_whole:
            return False
        used, self._text = self._text[: self._place], self._text[self._place :]
        self._place = 0
        self._columns = len(used) - used.rindex("\n") - 1 if "\n" in used else self._columns + len(used)
        self._lines += used.count("\n")
        content = self._stream.read(max(self._chunk_bytes, len(self._text)))
        self._is_whole = not content
        try:
            self._text += self._decoder.decode(content, final=self._is_whole)
        except UnicodeDecodeError as error:
            line = self._lines + self._text.count("\n") + error.object[: error.start].count(b"\n") + 1
            raise DataError(f"{self._origin} is not UTF-8 text at line {line} ({error.reason})") from error
        return not self._is_whole

    def _refuse(self, fault: str, place: int) -> NoReturn:
        line_start = self._text.rfind("\n", 0, place) + 1
        line = self._lines + self._text.count("\n", 0, place) + 1
        column = place - line_start + 1 + (0 if line_start else self._columns)
        raise DataError(f"{self._origin} is invalid JSON at line {line}, column {column} ({fault})") from None
