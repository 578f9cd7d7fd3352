"""Small pieces of Triton source: literals, casts, parentheses, where new axes go."""

from __future__ import annotations

import math

from tilery.tile.dtypes import DType, f32


def literal(value: float | int | bool) -> str:
    """A Python number as Triton source."""
    if isinstance(value, float):
        if math.isnan(value):
            return 'float("nan")'
        if math.isinf(value):
            return 'float("inf")' if value > 0 else 'float("-inf")'
    return repr(value)


def is_atom(text: str) -> bool:
    """Whether an expression binds tighter than any operator: a name, a number, a call, a subscript, parentheses."""
    depth, quote = 0, ""
    for at, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        elif c in "([":
            depth += 1
        elif c in ")]":
            depth -= 1
        elif depth == 0 and not (c.isalnum() or c in "_."):
            return False
        if depth == 0 and c in ")]" and at + 1 < len(text) and text[at + 1] not in ".[(":
            return False
    return bool(text)


def atom(text: str) -> str:
    """The expression, in parentheses if it needs them."""
    return text if is_atom(text) else f"({text})"


def convert(text: str, source: DType, target: DType, scalar: bool) -> str:
    """A cast. FP8 is reached through f32, the conversion the hardware has, which saturates."""
    if target.is_fp8 and source != f32:
        return convert(convert(text, source, f32, scalar), f32, target, scalar)
    if source.is_fp8 and not (target.is_float and target.bits <= 32):
        return convert(convert(text, source, f32, scalar), f32, target, scalar)
    if scalar:  # loop indices are plain ints in Triton's interpreter, so no method
        return f"tl.cast({text}, {target.triton})"
    return f"{atom(text)}.to({target.triton})"


def place(rank: int, at: int, joint: int = 1) -> str:
    """The subscript that puts a tile of `joint` axes at axis `at` of `rank` axes; "" where nothing changes."""
    if rank == joint:
        return ""
    items = ["None"] * at + [":"] * joint + ["None"] * (rank - at - joint)
    return f"[{', '.join(items)}]"


def comment(text: str, width: int) -> str:
    """The user's source as a trailing comment that fits."""
    return text if len(text) <= width else text[: max(width - 3, 0)] + "..."


def is_name(text: str) -> bool:
    return text.isidentifier()


def bare(text: str) -> str:
    """The expression without parentheses around the whole of it."""
    while text.startswith("(") and text.endswith(")") and is_atom(text) and _closes(text) == len(text) - 1:
        text = text[1:-1]
    return text


def _closes(text: str) -> int:
    """Where the parenthesis that opens a text is closed."""
    depth, quote = 0, ""
    for at, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        else:
            depth += (c in "([") - (c in ")]")
            if depth == 0:
                return at
    return -1
