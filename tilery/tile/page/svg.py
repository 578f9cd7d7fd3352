"""The pictures of a page as inline SVG. Colours come from the page's style sheet, by class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from tilery.tile.explain import Machine
from tilery.tile.page.memory import MemoryMap
from tilery.tile.page.trace import Trace, lanes_of


def number(value: float) -> str:
    """Short, for attributes."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def amount(value: float, unit: str) -> str:
    """`1.23 kB`, `4.5 TFLOP/s`."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{number(x)}" y="{number(y)}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def frame(width: float, height: float, parts: Sequence[str], label: str) -> str:
    """A picture that shrinks with the window; `label`: what it shows, for those who do not see it."""
    head = f'<svg viewBox="0 0 {number(width)} {number(height)}" width="{number(width)}" role="img"'
    return "\n".join([f'{head} aria-label="{escape(label)}">', *parts, "</svg>"])


# --- roofline ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """FLOP per byte, FLOP per second. `hollow`: an estimate."""

    name: str
    intensity: float
    rate: float
    hollow: bool = False


def roofline(machine: Machine, dtypes: Sequence[str], points: Sequence[Point]) -> str:
    """The machine's roofs (copy rate, vector units, matrix units of the dtypes) and where the points lie below them."""
    width, height, left, top, right, bottom = 640.0, 340.0, 70.0, 16.0, 620.0, 300.0
    shown = [p for p in points if p.intensity > 0 and p.rate > 0]
    low = math.floor(min([-2.0, *(math.log10(p.intensity) for p in shown)]))
    high = math.ceil(max([3.5, *(math.log10(p.intensity) for p in shown)]))
    roofs = {"other arithmetic": machine.vector} | {
        f"{d} products": machine.matrix[d] for d in dtypes if d in machine.matrix
    }
    most = math.ceil(math.log10(max(roofs.values())))
    least = math.floor(min(math.log10(machine.copy) + low, *(math.log10(p.rate) for p in shown), most - 1.0))

    def x(intensity: float) -> float:
        return left + (math.log10(intensity) - low) / (high - low) * (right - left)

    def y(rate: float) -> float:
        return bottom - (math.log10(rate) - least) / (most - least) * (bottom - top)

    parts = []
    for power in range(low, high + 1):
        at = x(10.0**power)
        parts.append(f'<line x1="{number(at)}" x2="{number(at)}" y1="{top}" y2="{bottom}" class="grid"/>')
        parts.append(text(at, bottom + 16, f"{10.0**power:g}", "tick", "middle"))
    for power in range(least, most + 1):
        at = y(10.0**power)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{number(at)}" y2="{number(at)}" class="grid"/>')
        parts.append(text(left - 6, at + 4, amount(10.0**power, "F/s"), "tick", "end"))
    parts.append(text((left + right) / 2, bottom + 34, "FLOP per byte", "axis", "middle"))
    slope = f"{number(left)},{number(y(machine.copy * 10.0**low))}"
    for name, rate in sorted(roofs.items(), key=lambda r: r[1]):
        knee = min(max(rate / machine.copy, 10.0**low), 10.0**high)
        line = f"{slope} {number(x(knee))},{number(y(min(rate, machine.copy * knee)))} {right},{number(y(rate))}"
        parts.append(f'<polyline points="{line}" class="roof"/>')
        parts.append(text(right - 4, y(rate) - 5, f"{name} {amount(rate, 'FLOP/s')}", "label", "end"))
    near = 10.0 ** (low + 1.3)
    parts.append(text(x(near) + 6, y(machine.copy * near) + 16, f"memory {amount(machine.copy, 'B/s')}", "label"))
    for p in shown:
        told = f"{p.name}: {p.intensity:.3g} FLOP per byte, {amount(p.rate, 'FLOP/s')}"
        kind = "point hollow" if p.hollow else "point"
        parts.append(
            f'<circle cx="{number(x(p.intensity))}" cy="{number(y(p.rate))}" r="6" class="{kind}">'
            f"<title>{escape(told)}</title></circle>"
        )
        side, anchor = (10, "start") if p.hollow else (-10, "end")
        parts.append(text(x(p.intensity) + side, y(p.rate) + 4, p.name, "label strong", anchor))
    return frame(width, height, parts, f"Roofline of {machine.name}")


# --- memory -----------------------------------------------------------------------------------------------------


def memory(found: MemoryMap, shared: bool) -> str:
    """Each tile's bytes (height) over the operations (width) during which it lives."""
    placed = [(at, t) for at, t in found.offsets(shared)]
    if not placed:
        return ""
    width, height, left, top = 960.0, 260.0 if not shared else 120.0, 70.0, 8.0
    total = max(at + t.bytes for at, t in placed)
    across, up = (width - left - 8) / max(1, found.operations + 1), (height - top - 24) / total
    base = height - 24
    parts = [f'<line x1="{left}" x2="{width - 8}" y1="{base}" y2="{base}" class="axisline"/>']
    for part in range(5):
        at = base - up * total * part / 4
        parts.append(f'<line x1="{left}" x2="{width - 8}" y1="{number(at)}" y2="{number(at)}" class="grid"/>')
        parts.append(text(left - 6, at + 4, amount(total * part / 4, "B"), "tick", "end"))
    for at, t in placed:
        x, w = left + t.start * across, max(1.0, (t.end - t.start) * across - 0.5)
        h = max(0.8, t.bytes * up - 0.5)
        y = base - (at + t.bytes) * up
        told = f"{t.name}: {t.type}, {t.bytes:,} bytes" + (f", line {t.line}" if t.line else "")
        kind = "tile shared" if shared else f"tile t{sum(map(ord, t.name)) % 4}"
        parts.append(
            f'<rect x="{number(x)}" y="{number(y)}" width="{number(w)}" height="{number(h)}" class="{kind}">'
            f"<title>{escape(told)}</title></rect>"
        )
        if w > 7 * len(t.name) + 6 and h > 11:
            parts.append(text(x + 4, y + min(h - 3, h / 2 + 4), t.name, "inside"))
    parts.append(text(width - 8, height - 6, "operations, in program order", "axis", "end"))
    return frame(width, height, parts, "Tiles that live at once, in bytes per program")


# --- lanes ------------------------------------------------------------------------------------------------------

SHOWN = 3000
"""Programs that are drawn one by one; of more, neighbours of a lane are drawn as one."""


def lanes(trace: Trace) -> str:
    """One lane per multiprocessor, from a trace in the Chrome format, estimated or measured."""
    rows = lanes_of(trace)
    if not rows:
        return ""
    width, left, top, step = 960.0, 62.0, 8.0, 4.0
    bottom = top + step * len(rows)
    end = max((start + length for row in rows.values() for start, length, _, _ in row), default=1.0)
    across = (width - left - 10) / end
    launches = list(dict.fromkeys(name for row in rows.values() for _, _, _, name in row))
    together = max(1, -(-sum(map(len, rows.values())) // SHOWN))
    paths: dict[str, list[str]] = {}
    hovers = []
    for number_, (lane, row) in enumerate(rows.items()):
        y = top + step * number_ + step / 2
        for first in range(0, len(row), together):
            part = row[first : first + together]
            x, till = left + part[0][0] * across, left + (part[-1][0] + part[-1][1]) * across
            kind = f"lane l{launches.index(part[0][3]) % 4}{'ab'[first // together % 2]}"
            paths.setdefault(kind, []).append(f"M{number(x)} {number(y)}H{number(till)}")
        if lane % 12 == 0:
            parts_y = number(y + 3)
            hovers.append(f'<text x="{left - 6}" y="{parts_y}" class="tick" text-anchor="end">SM {lane}</text>')
        busy = sum(length for _, length, _, _ in row)
        told = f"SM {lane}: {sum(n for _, _, n, _ in row)} programs, busy {busy:.2f} of {end:.2f} us"
        hovers.append(
            f'<rect x="{left}" y="{number(y - step / 2)}" width="{number(width - left)}" height="{step}" class="hover">'
            f"<title>{told}</title></rect>"
        )
    parts = []
    for fifth in range(6):
        at = left + end * fifth / 5 * across
        parts.append(f'<line x1="{number(at)}" x2="{number(at)}" y1="{top}" y2="{bottom}" class="grid"/>')
        parts.append(text(at, bottom + 16, f"{end * fifth / 5:.2f} us", "tick", "middle" if fifth < 5 else "end"))
    parts += [f'<path d="{"".join(d)}" class="{kind}"/>' for kind, d in sorted(paths.items())]
    return frame(width, bottom + 24, [*parts, *hovers], "Programs over multiprocessors and time")


# --- graph ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """`kind`: "tensor", "kernel" or "view". `after`: (node, tensor, kind of edge) that must come first."""

    name: str
    kind: str
    lines: tuple[str, ...]
    after: tuple[tuple[int, str, str], ...] = ()
    link: str = ""


@dataclass
class _Placed:
    node: Node
    layer: int
    width: float
    height: float
    x: float = 0.0
    y: float = 0.0


def graph(nodes: Sequence[Node], edge_titles: Mapping[str, str] | None = None) -> str:
    """Nodes in layers (each below all it comes after) and the edges between them."""
    titles = edge_titles or {}
    placed: list[_Placed] = []
    for node in nodes:
        layer = max((placed[before].layer + 1 for before, _, _ in node.after), default=0)
        across = max(7.0 * max(map(len, node.lines)) + 20, 60)
        placed.append(_Placed(node, layer, across, 14.0 * len(node.lines) + 10))
    for own in reversed(placed):  # an input stands right above the first that takes it
        if own.node.kind == "tensor" and not own.node.after:
            users = [p.layer for p in placed if any(placed[b] is own for b, _, _ in p.node.after)]
            own.layer = max(0, min(users, default=1) - 1)
    layers: dict[int, list[_Placed]] = {}
    for own in placed:
        layers.setdefault(own.layer, []).append(own)
    width = max(sum(p.width + 16 for p in row) for row in layers.values()) + 16
    y = 10.0
    for _, row in sorted(layers.items()):
        x = (width - sum(p.width + 16 for p in row)) / 2 + 8
        for own in row:
            own.x, own.y = x, y
            x += own.width + 16
        y += max(p.height for p in row) + 44
    parts = []
    for own in placed:
        for before, tensor, kind in own.node.after:
            a = placed[before]
            x1, y1, x2, y2 = a.x + a.width / 2, a.y + a.height, own.x + own.width / 2, own.y
            middle = (y1 + y2) / 2
            a1, a2, b1, b2, half = map(number, (x1, y1, x2, y2, middle))
            path = f"M{a1} {a2}C{a1} {half} {b1} {half} {b1} {b2}"
            told = f"{kind} {tensor}: {a.node.name} to {own.node.name}. {titles.get(kind, '')}"
            parts.append(
                f'<path d="{path}" class="edge {kind.lower()}" marker-end="url(#tip)">'
                f"<title>{escape(told)}</title></path>"
            )
            if a.node.kind != "tensor" and own.node.kind != "tensor":
                parts.append(text((x1 + x2) / 2 + 4, middle + 3, tensor, "tick"))
    for own in placed:
        node, radius = own.node, 4 if own.node.kind == "kernel" else own.height / 2
        box = (
            f'<rect x="{number(own.x)}" y="{number(own.y)}" width="{number(own.width)}" height="{number(own.height)}" '
            f'rx="{number(radius)}" class="node {node.kind}"/>'
        )
        words = [
            text(own.x + own.width / 2, own.y + 16 + 14 * n, line, "strong" if n == 0 and node.kind == "kernel" else "",
                 "middle")
            for n, line in enumerate(node.lines)
        ]  # fmt: skip
        inner = box + "".join(words)
        parts.append(f'<a href="#{node.link}">{inner}</a>' if node.link else f"<g>{inner}</g>")
    tip = '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    return frame(width, y - 24, [tip + '<path d="M0 0L8 4L0 8z" class="tip"/></marker></defs>', *parts], "Graph")
