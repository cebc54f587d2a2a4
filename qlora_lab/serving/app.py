"""The endpoints, and the page that chats with two adapters side by side."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from qlora_lab.data.rows import SYSTEM, Turn
from qlora_lab.errors import QloraLabError, unknown_name
from qlora_lab.listening import is_loopback
from qlora_lab.serving.asking import Asking, TooLongError
from qlora_lab.serving.engine import Engine
from qlora_lab.serving.protocol import (
    ChatRequest,
    Common,
    CompletionRequest,
    Message,
    RefusedError,
    Reply,
    model_card,
    models_body,
    read_request,
)
from qlora_lab.serving.scheduler import Job, Piece
from qlora_lab.serving.shared_base import SharedBase
from qlora_lab.serving.writing import Choice

PAGE = Path(__file__).parent / "page"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
RETRY_AFTER_S = 5
STOPPED = "the server stopped before the answer was whole"
DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Limits:
    """What one server takes.

    Attributes:
        max_waiting: requests that wait for a place in the batch.
        max_body_bytes: of a request.
        max_new_tokens: of an answer; also where a request does not say.
        max_cache_tokens: of all prompts and answers that are worked on together; None: no limit.
    """

    max_waiting: int = 128
    max_body_bytes: int = 1_000_000
    max_new_tokens: int = 512
    max_cache_tokens: int | None = None


def create_app(shared: SharedBase, engine: Engine, limits: Limits, *, token: str | None) -> FastAPI:
    """Return the server of a base and its adapters.

    Args:
        token: what requests must bring as "Authorization: Bearer TOKEN"; None: nothing, and only addresses of this
            machine are answered, so that no web page can reach it under another name.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _word_refusals(app)
    asking = Asking(shared, limits.max_new_tokens, limits.max_cache_tokens)
    started = int(time.time())

    async def allowed_body(request: Request) -> bytes:
        _check_sender(request, token)
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > limits.max_body_bytes:
                raise RefusedError(413, f"a request has at most {limits.max_body_bytes:,} bytes here")
        return body

    AllowedBody = Annotated[bytes, Depends(allowed_body)]

    def cards() -> list[dict[str, Any]]:
        known = {shared.name: f"the base, {shared.base.name}"}
        known |= {name: one.description for name, one in shared.pool.registered.items()}
        return [model_card(name, shared.name, description, started) for name, description in known.items()]

    def adapter_of(body: Common) -> str | None:
        if body.model != shared.name and body.model not in shared.pool.registered:
            known = [shared.name, *shared.names]
            raise RefusedError(404, unknown_name("model", body.model, known), param="model", code="model_not_found")
        return None if body.model == shared.name else body.model

    async def answer(request: Request, body: Common, make: Callable[[Callable[[Piece], None]], Job]) -> Response:
        if not engine.is_open:
            raise RefusedError(503, "the server is stopping")
        if engine.waiting >= limits.max_waiting:
            raise RefusedError(429, f"{engine.waiting} requests are waiting; try again later", code="queue_full")
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(piece: Piece) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        try:
            job = make(deliver)
        except TooLongError as error:
            raise RefusedError(400, f"{error}", param="messages", code="context_length_exceeded") from error
        except QloraLabError as error:  # also a tokenizer without a template, or one that takes no system turn
            raise RefusedError(400, f"{error}") from error
        reply = Reply(chat=isinstance(body, ChatRequest), model=body.model, prompt_tokens=len(job.prompt))
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            events = _events(reply, job, pieces, with_usage=with_usage)
            engine.submit(job)  # before anything else runs, so that no more wait than may
            return _Events(events, job)
        await _ended_or_left(engine, request, job, pieces)
        if job.writing.finish_reason is None:
            raise _cut_off(job)
        tokens = len(job.writing.token_ids)
        return JSONResponse(reply.whole(job.writing.text, job.writing.finish_reason, tokens))

    @app.get("/v1/models")
    def models(_: AllowedBody) -> dict[str, Any]:
        return models_body(cards())

    @app.get("/v1/models/{name:path}")
    def model(name: str, _: AllowedBody) -> dict[str, Any]:
        found = [card for card in cards() if card["id"] == name]
        if not found:
            known = [shared.name, *shared.names]
            raise RefusedError(404, unknown_name("model", name, known), param="model", code="model_not_found")
        return found[0]

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: AllowedBody) -> Response:
        asked = read_request(ChatRequest, body)
        if asked.max_tokens is not None and asked.max_completion_tokens is not None:
            raise RefusedError(400, "give max_tokens or max_completion_tokens, not both", param="max_tokens")
        adapter, turns = adapter_of(asked), [_turn(message) for message in asked.messages]
        max_tokens = asked.max_tokens or asked.max_completion_tokens
        return await answer(
            request,
            asked,
            lambda deliver: asking.chat(
                adapter, turns, _choice(asked), deliver, max_tokens=max_tokens, stops=asked.stops
            ),
        )

    @app.post("/v1/completions")
    async def completions(request: Request, body: AllowedBody) -> Response:
        asked = read_request(CompletionRequest, body)
        adapter, prompt = adapter_of(asked), _one_prompt(asked.prompt)
        return await answer(
            request,
            asked,
            lambda deliver: asking.completion(
                adapter, prompt, _choice(asked), deliver, max_tokens=asked.max_tokens, stops=asked.stops
            ),
        )

    @app.get("/")
    def page() -> FileResponse:
        return FileResponse(PAGE / "chat.html", headers=HEADERS)

    app.mount("/page", StaticFiles(directory=PAGE / "static", packages=[("qlora_lab", "page")]))
    return app


def _check_sender(request: Request, token: str | None) -> None:
    """Refuse a request without the token, and those that other pages make a browser send."""
    if token is not None:
        given = request.headers.get("authorization", "")
        if not secrets.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise RefusedError(
                401, "this server wants its token as an API key (Authorization: Bearer TOKEN)", code="invalid_api_key"
            )
    elif not is_loopback(request.url.hostname or ""):
        raise RefusedError(403, f"this server is asked as localhost or 127.0.0.1; got {request.url.hostname}")
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise RefusedError(403, "this request came from another page")


def _choice(asked: Common) -> Choice:
    """As OpenAI's endpoints, draw at temperature 1 unless the request says otherwise."""
    temperature = 1.0 if asked.temperature is None else asked.temperature
    return Choice(temperature, 1.0 if asked.top_p is None else asked.top_p, asked.seed)


def _turn(message: Message) -> Turn:
    return Turn(SYSTEM if message.role == "developer" else message.role, message.text)


def _one_prompt(prompt: str | list[str] | list[int]) -> str | list[int]:
    if isinstance(prompt, str):
        return prompt
    texts = [part for part in prompt if isinstance(part, str)]
    if texts and len(prompt) > 1:
        raise RefusedError(400, f"a request has one prompt here; got {len(prompt)}", param="prompt")
    return texts[0] if texts else [part for part in prompt if isinstance(part, int)]


class _Events(StreamingResponse):
    """An answer as server-sent events; a client that leaves, also before the first of them, ends its job."""

    def __init__(self, events: AsyncIterator[str], job: Job) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancelled = True


async def _events(reply: Reply, job: Job, pieces: "asyncio.Queue[Piece]", *, with_usage: bool) -> AsyncIterator[str]:
    if reply.is_chat:
        yield _event(reply.opening())
    while True:
        text, last = await pieces.get()
        if last and job.writing.finish_reason is None:
            yield _event(_cut_off(job).body)
            return
        yield _event(reply.piece(text, job.writing.finish_reason if last else None))
        if last:
            break
    if with_usage:
        yield _event(reply.closing(len(job.writing.token_ids)))
    yield DONE


async def _ended_or_left(engine: Engine, request: Request, job: Job, pieces: "asyncio.Queue[Piece]") -> None:
    """Wait until an answer has ended; its row leaves the batch if the client leaves before."""

    async def ended() -> None:
        while not (await pieces.get()).last:
            pass

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    engine.submit(job)
    tasks = [asyncio.ensure_future(wait()) for wait in (ended, left)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        job.cancelled = True
        for task in tasks:
            task.cancel()


def _cut_off(job: Job) -> RefusedError:
    return RefusedError(503, STOPPED) if job.failure is None else RefusedError(500, job.failure, code="step_failed")


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _word_refusals(app: FastAPI) -> None:
    """Give every refusal OpenAI's shape."""

    @app.exception_handler(RefusedError)
    def refuse(request: Request, error: RefusedError) -> JSONResponse:
        headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status in (429, 503) else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(HTTPException)
    def refuse_path(request: Request, error: HTTPException) -> JSONResponse:
        said = f"{request.method} {request.url.path}: {str(error.detail).lower()}"
        return JSONResponse(RefusedError(error.status_code, said).body, error.status_code)

    @app.exception_handler(Exception)
    def tell_failure(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(RefusedError(500, f"the server failed ({type(error).__name__}: {error})").body, 500)
