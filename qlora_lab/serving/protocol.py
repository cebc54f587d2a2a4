"""OpenAI's protocol: what requests may say, and the shape of replies and errors."""

import re
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_STOPS = 4  # as OpenAI's own
OWNER = "qlora_lab"
UNION = re.compile(r"str$|list\[")  # where pydantic tells which of several types it tried
JSON_TYPES = {"json_invalid": "the body is no JSON", "extra_forbidden": "is not known here; leave it out"}

Body = TypeVar("Body", bound="Common")


class RefusedError(Exception):
    """A request that is refused, in OpenAI's shape."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            status, "invalid_request_error" if status < 500 else "server_error"
        )
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Part(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class Common(_Strict):
    """Fields of both endpoints; those of a single allowed value are taken so that clients may send their defaults."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    user: str | None = None  # not used

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatRequest(Common):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None


class CompletionRequest(Common):
    prompt: str | list[str] | list[int]
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None


def read_request(kind: type[Body], body: bytes) -> Body:
    """Read a body.

    Raises:
        RefusedError: it is no JSON, or says what cannot be.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"] if not UNION.match(str(part)))
        said = JSON_TYPES.get(first["type"], first["msg"])
        if first["type"] == "json_invalid":
            raise RefusedError(400, f"{said}: {first['msg'].removeprefix('Invalid JSON: ')}") from None
        where = f"{place}: " if place else "the body: "
        raise RefusedError(400, f"{where}{said[:1].lower()}{said[1:]}", param=place or None) from None
    stops = request.stops
    if len(stops) > MAX_STOPS or "" in stops:
        raise RefusedError(400, f"stop must be at most {MAX_STOPS} texts, none of them empty", param="stop")
    return request


class Reply:
    """The bodies of one reply, whole or in pieces.

    Args:
        chat: whether it is to a chat.
        model: as it was asked for.
        prompt_tokens: of the prompt.
    """

    def __init__(self, *, chat: bool, model: str, prompt_tokens: int) -> None:
        self.is_chat = chat
        self._prompt_tokens = prompt_tokens
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, finish_reason: str | None, tokens: int) -> dict[str, Any]:
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._body(kind, said, finish_reason) | {"usage": self.usage(tokens)}

    def opening(self) -> dict[str, Any]:
        """Return the first piece of a chat, which says who speaks."""
        return self._body("chat.completion.chunk", {"delta": {"role": "assistant", "content": ""}}, None)

    def piece(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        if not self.is_chat:
            return self._body("text_completion", {"text": text}, finish_reason)
        return self._body("chat.completion.chunk", {"delta": {"content": text} if text else {}}, finish_reason)

    def closing(self, tokens: int) -> dict[str, Any]:
        """Return the piece that counts, without a choice."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": [], "usage": self.usage(tokens)}

    def usage(self, tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self._prompt_tokens + tokens,
        }

    def _body(self, kind: str, said: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": kind, "choices": [choice]}


def model_card(name: str, base: str, description: str, created: int) -> dict[str, Any]:
    """Return a model as /v1/models lists it."""
    parent = None if name == base else base
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "parent": parent,
        "description": description,
    }


def models_body(cards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": list(cards)}
