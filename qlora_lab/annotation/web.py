"""The annotation page. It works as a plain form; page.js adds keys, saving again after a failure, and exact times.

The link an annotator gets holds a token, which is all that lets anybody vote: there are no cookies, so no other page
can make a browser vote. Answers are text of models and are treated as hostile.
"""

import logging
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated
from urllib.parse import parse_qsl

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.middleware.base import RequestResponseEndpoint

from qlora_lab.annotation.database import NotSavedError
from qlora_lab.annotation.markdown import rendered
from qlora_lab.annotation.store import Annotator, Store
from qlora_lab.errors import DataError

LOGGER = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
LARGEST_FORM = 4096  # bytes
NUMBER = re.compile(r"[0-9]{1,15}")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Pages:
    """The templates, filled in."""

    def __init__(self) -> None:
        self._templates = Environment(
            loader=FileSystemLoader(PAGE), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        self._templates.filters["markdown"] = lambda answer: Markup(rendered(answer))

    def item(self, **values: object) -> HTMLResponse:
        return HTMLResponse(self._templates.get_template("item.html").render(values))

    def refused(self, status: int, sentence: str, token: str | None = None) -> HTMLResponse:
        """Say why something does not work; `token` is of the link to go back to."""
        return HTMLResponse(self._templates.get_template("refused.html").render(sentence=sentence, token=token), status)


async def form_of(request: Request) -> dict[str, str]:
    """Return the fields of a form that this page has sent."""
    # Browsers say where a post comes from, at least on loopback and under TLS.
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise HTTPException(403, "This came from another page. Open the link you were given.")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_FORM:
            raise HTTPException(413, f"A vote has at most {LARGEST_FORM} bytes.")
    try:
        return dict(parse_qsl(body.decode("ascii"), max_num_fields=10))
    except ValueError as error:
        raise HTTPException(400, "This is no form of this page. Open your link again.") from error


def number(form: dict[str, str], name: str) -> int:
    value = form.get(name, "")
    if not NUMBER.fullmatch(value):
        raise DataError(f"{name} must be a whole number; got {value[:20]!r}")
    return int(value)


Form = Annotated[dict[str, str], Depends(form_of)]


def create_app(store: Store, now_s: Callable[[], float] = time.time) -> FastAPI:
    """Return the page of a study.

    Args:
        now_s: the clock, in seconds since 1970.
    """
    app, pages = FastAPI(docs_url=None, redoc_url=None, openapi_url=None), Pages()
    _guard(app, pages)

    def annotator_of(token: str) -> Annotator:
        found = store.annotator(token)
        if found is None:
            raise HTTPException(404, "This link is of no annotator of this study. Open the one you were given.")
        return found

    Asking = Annotated[Annotator, Depends(annotator_of)]

    @app.get("/")
    def front() -> HTMLResponse:
        return pages.refused(200, "Every annotator has a link of their own. Open the one you were given.")

    @app.get("/a/{token}")
    def show(annotator: Asking, note: str = "") -> HTMLResponse:
        return pages.item(
            annotator=annotator,
            item=store.next_item(annotator),
            progress=store.progress(annotator),
            shown_ms=int(now_s() * 1000),
            kept=note == "kept",
        )

    @app.post("/a/{token}/vote")
    def vote(annotator: Asking, form: Form) -> RedirectResponse:
        voted_ms = int(now_s() * 1000)
        elapsed_ms = max(0, voted_ms - number(form, "shown"))
        # Without the script there is only the time since the page was sent, which counts a coffee break too.
        visible_ms = number(form, "milliseconds") if form.get("milliseconds") else elapsed_ms
        now = datetime.fromtimestamp(voted_ms / 1000, UTC)
        counts = store.vote(
            annotator, number(form, "position"), form.get("verdict", ""), min(visible_ms, elapsed_ms), now
        )
        return RedirectResponse(f"/a/{annotator.token}" + ("" if counts else "?note=kept"), 303)

    @app.post("/a/{token}/undo")
    def undo(annotator: Asking, form: Form) -> RedirectResponse:
        store.undo(annotator, number(form, "vote"))
        return RedirectResponse(f"/a/{annotator.token}", 303)

    app.mount("/page", StaticFiles(directory=PAGE / "static", packages=[("qlora_lab", "page")]))
    return app


def _guard(app: FastAPI, pages: Pages) -> None:
    """Give every answer the headers, and every refusal a page."""

    @app.middleware("http")
    async def secure(request: Request, call_next: RequestResponseEndpoint) -> Response:
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(HTTPException)
    def refuse(request: Request, error: HTTPException) -> HTMLResponse:
        token = None if error.status_code == 404 else request.path_params.get("token")
        return pages.refused(error.status_code, error.detail, token)

    @app.exception_handler(DataError)
    def refuse_data(request: Request, error: DataError) -> HTMLResponse:
        token = request.path_params.get("token")
        if isinstance(error, NotSavedError):
            LOGGER.error("%s", error)  # for who runs the study; where it lies is not the annotators' business
            return pages.refused(507, "This was not saved: the server cannot write. Go back and try again.", token)
        return pages.refused(400, f"{error}.", token)
