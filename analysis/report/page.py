"""The look of a report: one HTML page that asks nothing of the network."""

from collections.abc import Collection, Sequence
from html import escape

CSS = """
:root { color-scheme: light dark; --ink: #1f2428; --soft: #57606a; --faint: #9aa4ad; --line: #dfe3e7;
  --page: #ffffff; --panel: #f5f7f9; --accent: #4477aa; --good: #1a7f37; --bad: #b42336; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #a3adb7; --faint: #727d88; --line: #343b43;
  --page: #15191d; --panel: #1d2328; --accent: #7fb0e0; --good: #5cc878; --bad: #ff8a94; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 57rem; margin: 0 auto; padding: 2.5rem 1.25rem 3rem; }
.study { margin: 0; color: var(--soft); font-size: .9rem; letter-spacing: .03em; }
h1 { margin: .2rem 0 1.2rem; font-size: 1.65rem; line-height: 1.25; font-weight: 650; text-wrap: balance; }
h1, h2, h3, p, li, figcaption { overflow-wrap: anywhere; }
h2 { margin: 2.6rem 0 .6rem; font-size: 1.12rem; font-weight: 650; }
h3 { margin: 1.6rem 0 .4rem; font-size: 1rem; font-weight: 600; }
p { margin: .5rem 0; }
a { color: var(--accent); }
.answer { margin: 0 0 1rem; padding: .9rem 1.1rem; background: var(--panel); border-left: 4px solid var(--accent);
  border-radius: 0 6px 6px 0; font-size: 1.08rem; overflow-wrap: anywhere; }
.notes { margin: .8rem 0; padding: .6rem 1.1rem .6rem 2.2rem; border: 1px solid var(--bad); border-radius: 6px; }
.soft, figcaption { color: var(--soft); font-size: .88rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); }
th, td { padding: .38rem .75rem .38rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
.number { text-align: right; white-space: nowrap; }
td:not(.number) { min-width: 5rem; } td code { white-space: nowrap; }
figure { margin: 1.4rem 0 0; }
figure > svg, figure > div > svg { width: 100%; height: auto; display: block; }
figcaption { margin-top: .35rem; }
@media (max-width: 34rem) { figure { overflow-x: auto; } figure > svg, figure > div > svg { min-width: 30rem; }
  figcaption { position: sticky; left: 0; } }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--accent); }
th[aria-sort] button::after { content: " \25B2"; font-size: .7em; }
th[aria-sort=descending] button::after { content: " \25BC"; }
.filter { display: flex; flex-wrap: wrap; gap: .8rem; align-items: baseline; }
input[type=search], select { max-width: 100%; font: inherit; color: inherit; background: var(--page);
  border: 1px solid var(--faint); border-radius: 5px; padding: .25rem .5rem; }
.chart { display: block; font-size: .88rem; } .chart svg.marks { max-width: 100%; height: auto; }
.sample { margin: 0 0 1.2rem; border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }
.sample .prompt { padding: .6rem .9rem; font-size: .92rem; background: var(--panel);
  white-space: pre-wrap; overflow-wrap: anywhere; }
.sample dl { margin: 0; padding: .5rem .9rem; display: grid; grid-template-columns: minmax(8rem, 16rem) 1fr;
  gap: .25rem .9rem; font-size: .9rem; }
.sample .wide, .sample summary { padding: 0 .9rem; }
.sample dt { color: var(--soft); overflow-wrap: anywhere; }
.sample dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 34rem) { .sample dl { grid-template-columns: 1fr; } .sample dd { margin-bottom: .4rem; } }
.right { color: var(--good); } .wrong, .failed { color: var(--bad); }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
pre { overflow-x: auto; padding: .7rem .9rem; background: var(--panel); border-radius: 6px; font-size: .8rem; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .88em; overflow-wrap: anywhere; }
footer { margin-top: 2.6rem; padding-top: .8rem; border-top: 1px solid var(--line); color: var(--soft);
  font-size: .85rem; overflow-wrap: anywhere; }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --page: #fff; --panel: #f5f5f5; }
  body { font-size: 11pt; } main { max-width: none; padding: 0; } h2 { break-after: avoid; }
  figure, .sample, tr { break-inside: avoid; } .wide { overflow: visible; }
  .filter, .vega-bindings, .chart details { display: none; } }
"""


# Nothing may be loaded, whatever stands in the page. Vega makes functions of its expressions, hence 'unsafe-eval'.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
SCRIPTS_POLICY = "; script-src 'unsafe-inline' 'unsafe-eval'"


def page(title: str, body: str, scripts: str = "") -> str:
    """Return a whole HTML document; `body` is HTML, `title` is text, `scripts` are script elements to end with."""
    policy = POLICY + (SCRIPTS_POLICY if scripts else "")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{body}</main>\n{scripts}</body>\n</html>\n"
    )


def section(heading: str, *content: str) -> str:
    """Return the content under a heading; nothing where there is no content."""
    inside = "".join(content)
    return f"<section>\n<h2>{escape(heading)}</h2>\n{inside}</section>\n" if inside else ""


def subsection(heading: str, *content: str) -> str:
    """Return the content under a lesser heading; nothing where there is no content."""
    inside = "".join(content)
    return f"<h3>{escape(heading)}</h3>\n{inside}" if inside else ""


def paragraph(text: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{escape(text)}</p>\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str], kind: str = "") -> str:
    """Return a table that scrolls where the page is narrow.

    Args:
        columns: headings, as text.
        rows: cells, as HTML.
        left: the columns that hold text; the others hold numbers and are set to the right.
        kind: its class; a page's script makes tables of the class `many` sortable.
    """
    attribute = f' class="{kind}"' if kind else ""
    kinds = ["" if column in left else ' class="number"' for column in columns]
    head = "".join(f"<th{kind}>{escape(column)}</th>" for kind, column in zip(kinds, columns, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>\n"
        for row in rows
    )
    inside = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>"
    return f'<div class="wide"><table{attribute}>\n{inside}\n</table></div>\n'


def figure(svg: str, caption: str, name: str = "") -> str:
    """Return a picture with its caption; a page's script may draw the chart called `name` in its place."""
    picture = f'<div id="{name}">{svg}</div>' if name else svg
    return f"<figure>\n{picture}\n<figcaption>{escape(caption)}</figcaption>\n</figure>\n"


def details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>\n{content}</details>\n"


def bullet_list(items: list[str], kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<ul{attribute}>\n" + "".join(f"<li>{escape(item)}</li>\n" for item in items) + "</ul>\n" if items else ""
