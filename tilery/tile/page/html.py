"""Pieces of a page and the page itself: everything escaped here, everything inline, nothing loaded from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from tilery.tile.page.trace import Trace

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """`body`: HTML. `id`: what links name."""

    id: str
    title: str
    body: str


@dataclass(frozen=True)
class Page:
    """A finished page. `trace`: what its lanes show, None where it has none."""

    title: str
    html: str = field(repr=False)
    trace: Trace | None = field(default=None, repr=False)

    def save(self, path: str | Path) -> Path:
        """Writes the page to a file that any browser opens."""
        out = Path(path)
        out.write_text(self.html, encoding="utf-8")
        return out

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{escape(self.html)}" style="width:100%;height:48rem;border:0"></iframe>'


def document(title: str, about: str, sections: Sequence[Section], made_by: str) -> str:
    """`about`: one paragraph of text under the title; `made_by`: the command that makes the page again."""
    links = "".join(f'<a href="#{s.id}">{escape(s.title)}</a>' for s in sections)
    parts = "\n".join(f'<section id="{s.id}"><h2>{escape(s.title)}</h2>\n{s.body}\n</section>' for s in sections)
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("style.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(title)}</h1>\n<p class="soft">{escape(about)}</p>\n<nav>{links}</nav></header>\n'
        f"<main>\n{parts}\n</main>\n"
        f'<footer><p class="soft">Made by <code>{escape(made_by)}</code></p></footer>\n'
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def facts(items: Sequence[tuple[str, str]]) -> str:
    """(what, value) as a row of boxes."""
    boxes = "".join(f"<div><b>{escape(value)}</b><span>{escape(what)}</span></div>" for what, value in items)
    return f'<div class="facts">{boxes}</div>'


@dataclass(frozen=True)
class Raw:
    """A table's cell that is HTML already."""

    html: str


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Numbers stand right."""
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = []
    for row in rows:
        cells = []
        for cell in row:
            kind = ' class="n"' if isinstance(cell, (int, float)) else ""
            words = f"{cell:,.4g}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else str(cell)
            cells.append(f"<td{kind}>{cell.html if isinstance(cell, Raw) else escape(words)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table class="plain"><tr>{head}</tr>{"".join(body)}</table></div>'


def bar(share: float) -> Raw:
    """A horizontal bar, `share` from 0 to 1."""
    return Raw(f'<span class="bar" style="width:{max(0.0, min(1.0, share)) * 14:.2f}rem"></span>')


def note(words: str) -> str:
    return f'<p class="soft">{escape(words)}</p>'


def badge(words: str) -> str:
    return f'<span class="badge">{escape(words)}</span>'


def code(words: str) -> str:
    return f'<div class="scroll"><pre>{escape(words)}</pre></div>'


def source(lines: Sequence[tuple[str, str]]) -> str:
    """(number, text) of source lines; a click shows what a line became."""
    rows = "".join(
        f'<tr data-line="{escape(n)}"><td>{escape(n)}</td><td>{escape(line) or " "}</td></tr>' for n, line in lines
    )
    return f'<div class="scroll"><table class="source code">{rows}</table></div>'


def stages(data: dict[str, Any]) -> str:
    """The stage slider over what `diff.stage_table` gives; without scripts, the last stage."""
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    last = "\n".join(data["lines"][right][0] for _, right in data["stages"][-1]["rows"] if right >= 0)
    return (
        '<div class="stages"><div class="controls"><div class="steps"></div></div>'
        '<div class="controls"><input type="range" min="0" max="0" value="0" aria-label="stage">'
        '<output class="soft"></output><label><input type="checkbox"> all lines</label></div>'
        '<div class="scroll panes"><table class="diff code"><thead><tr><th class="at">line</th><th class="name"></th>'
        '<th class="at">line</th><th class="name"></th></tr></thead><tbody></tbody></table></div>'
        f'<script type="application/json">{text}</script><noscript>{code(last)}</noscript></div>'
    )
