"""Answers of models as HTML that can do nothing: they are not to be trusted."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

SAFE_LINK = re.compile(r"(https?://|mailto:)", re.IGNORECASE)


def _markdown() -> MarkdownIt:
    # HTML in the text is shown as text. Images would be fetched from wherever the model says: they become links.
    markdown = MarkdownIt("js-default", {"html": False, "breaks": True, "linkify": False}).disable("image")
    markdown.validateLink = lambda url: SAFE_LINK.match(url) is not None  # type: ignore[method-assign]
    markdown.add_render_rule("link_open", _link_open)
    for cell in ("th_open", "td_open"):
        markdown.add_render_rule(cell, _cell_open)
    return markdown


def _link_open(
    self: RendererHTML, tokens: Sequence[Token], index: int, options: Mapping[str, Any], env: Mapping[str, Any]
) -> str:
    tokens[index].attrSet("rel", "noopener noreferrer nofollow")
    tokens[index].attrSet("target", "_blank")
    return self.renderToken(tokens, index, options, env)  # type: ignore[arg-type]


def _cell_open(
    self: RendererHTML, tokens: Sequence[Token], index: int, options: Mapping[str, Any], env: Mapping[str, Any]
) -> str:
    """Say a column's alignment by a class: the page forbids inline styles."""
    style = str(tokens[index].attrs.pop("style", ""))
    if style:
        tokens[index].attrSet("class", style.removeprefix("text-align:"))
    return self.renderToken(tokens, index, options, env)  # type: ignore[arg-type]


MARKDOWN = _markdown()


def rendered(answer: str) -> str:
    """Return an answer's Markdown as HTML in which everything that is not Markdown is escaped."""
    return str(MARKDOWN.render(answer))
