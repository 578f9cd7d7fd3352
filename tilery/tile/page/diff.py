"""The stages of a lowering as aligned lines: what each pass changed, ready to be shown side by side."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tilery.tile.ir import Kernel
from tilery.tile.printer import print_kernel

_COMMENT = re.compile(r"  # ([^\s:]+\.py):(\d+)(?:: .*)?$")
_DEFINED = re.compile(r"\s*(\w+(?:, \w+)*)(?:: [^=]+)? = |\s*for (.+?) in ")

Line = tuple[str, str]
"""A line's text, and the line of the source it comes from: "45", "lib.py:12" from another file, or ""."""


def lines_of(kernel: Kernel, file: str) -> list[Line]:
    """A stage's text without its comments, each line with the source line it was made by. `file`: the kernel's own."""
    out: list[Line] = []
    last = ""
    for row in print_kernel(kernel).splitlines():
        found = _COMMENT.search(row)
        if found is not None:
            row, last = row[: found.start()], found[2] if found[1] == file else f"{found[1]}:{found[2]}"
        out.append((row, last))
    return out


def align(before: Sequence[Line], after: Sequence[Line]) -> Iterator[tuple[int, int]]:
    """Pairs of line numbers (-1: nothing there): equal lines side by side, and changed ones that define one name."""
    texts = [[text for text, _ in lines] for lines in (before, after)]
    for tag, a, b, c, d in difflib.SequenceMatcher(None, texts[0], texts[1], autojunk=False).get_opcodes():
        if tag == "equal":
            yield from zip(range(a, b), range(c, d))
        else:
            yield from _align_changed(texts[0], texts[1], range(a, b), range(c, d))


def _align_changed(before: list[str], after: list[str], left: range, right: range) -> Iterator[tuple[int, int]]:
    keys = [[_key(lines[n]) for n in part] for lines, part in ((before, left), (after, right))]
    for tag, a, b, c, d in difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_opcodes():
        if tag == "equal":
            yield from zip(left[a:b], right[c:d])
        else:
            yield from ((n, -1) for n in left[a:b])
            yield from ((-1, n) for n in right[c:d])


def _key(line: str) -> str:
    """What makes two lines the same line, changed: the names they define, or how they begin."""
    found = _DEFINED.match(line)
    return (found[1] or found[2]) if found else line.strip().partition("(")[0]


def stage_table(stages: Sequence[tuple[str, Kernel]], file: str) -> dict[str, Any]:
    """{"lines": [[text, source line]], "stages": [{"name", "rows": [[left, right]], "changed"}]}: each row has the
    numbers of its two lines in "lines", -1 for none. The first stage stands beside itself; a later one that prints like
    the one before it is left out."""
    numbers: dict[Line, int] = {}
    table: list[dict[str, Any]] = []
    before = lines_of(stages[0][1], file)
    for name, kernel in stages:
        after = lines_of(kernel, file)
        rows, changed = [], 0
        for a, b in align(before, after):
            pair = [
                -1 if n < 0 else numbers.setdefault(lines[n], len(numbers)) for lines, n in ((before, a), (after, b))
            ]
            changed += a < 0 or b < 0 or before[a][0] != after[b][0]
            rows.append(pair)
        if changed or not table:
            table.append({"name": name, "rows": rows, "changed": changed})
        before = after
    return {"lines": [list(line) for line in numbers], "stages": table}
