"""Answers of models become HTML that does nothing."""

from html.parser import HTMLParser

import pytest

from qlora_lab.annotation.markdown import rendered

LISTS_AND_TABLES = {"ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td"}
SAFE_TAGS = {"p", "br", "em", "strong", "s", "a", "code", "pre", "blockquote", "hr", "h1", "h2"} | LISTS_AND_TABLES
SAFE_ATTRIBUTES = {"href", "rel", "target", "class", "title", "start"}

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "text <b onmouseover='alert(1)'>bold</b>",
    "<svg/onload=alert(1)>",
    "[click](javascript:alert(1))",
    "[click](JaVaScRiPt:alert(1))",
    "[click](java\nscript:alert(1))",
    "[click](&#106;avascript:alert(1))",
    "[click](data:text/html;base64,PHNjcmlwdD4=)",
    "[click](vbscript:x)",
    "[click](//evil.example/x)",
    "<javascript:alert(1)>",
    "![image](https://evil.example/pixel.png)",
    '![image](https://evil.example/p.png "x\\" onerror=\\"alert(1)")',
    '[a](https://example.org "x\\" onclick=\\"alert(1)")',
    "[a](https://example.org/\"onmouseover='alert(1)')",
    '```"><script>alert(1)</script>\ncode\n```',
    "`<script>alert(1)</script>`",
    "    <script>alert(1)</script>",
    "<!-- --><iframe src=https://evil.example></iframe>",
    "</div></main><form action=https://evil.example><button>",
    "| a |\n|---|\n| <script>alert(1)</script> |",
    "[r]: javascript:alert(1)\n\n[r]",
    "<style>body{display:none}</style>",
    "{{ 7 * 7 }} {% raw %}",
]


class Checked(HTMLParser):
    """Every tag and attribute of a page, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("answer", HOSTILE)
def test_hostile_text_stays_text(answer):
    page = Checked(rendered(answer))
    for tag, attributes in page.tags:
        assert tag in SAFE_TAGS
        assert set(attributes) <= SAFE_ATTRIBUTES
        assert attributes.get("href", "https://").startswith(("https://", "mailto:"))


def test_tags_are_shown_as_they_were_written():
    assert Checked(rendered("<script>alert(1)</script>")).text.strip() == "<script>alert(1)</script>"


def test_what_models_write_is_readable():
    html = rendered(
        "## Title\none\ntwo\n\n1. x\n\n```python\nif a < b: pass\n```\n\n| a | b |\n|---|---|\n| **1** | ~~2~~ |"
    )
    for part in (
        "<h2>Title</h2>",
        "one<br>\ntwo",
        "<ol>\n<li>x</li>",
        "if a &lt; b: pass",
        "<strong>1</strong>",
        "<s>2",
    ):
        assert part in html


def test_a_column_is_aligned_without_the_inline_style_that_the_page_forbids():
    html = rendered("| a | b | c |\n|--:|:-:|---|\n| 1 | 2 | 3 |")
    assert '<td class="right">1</td>' in html and '<th class="center">b</th>' in html and "<td>3</td>" in html
    assert "style" not in html


def test_a_link_tells_the_other_site_nothing():
    (_, (tag, attributes)) = Checked(rendered("[a](https://example.org)")).tags
    assert tag == "a" and attributes["rel"] == "noopener noreferrer nofollow" and attributes["target"] == "_blank"
