"""What the tile language raises: what was wrong, what was expected, what to do; the user's line comes first."""

from __future__ import annotations

import linecache
from dataclasses import dataclass


@dataclass(frozen=True)
class Loc:
    """A place in the user's source."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    def text(self) -> str:
        return linecache.getline(self.file, self.line).strip()


class TileError(Exception):
    """Base of all errors of the tile language. `loc` is the user's line, where there is one."""

    def __init__(self, message: str, loc: Loc | None = None) -> None:
        self.message, self.loc = message, loc
        where = f"{loc}: " if loc else ""
        source = f"\n    {loc.text()}" if loc and loc.text() else ""
        super().__init__(f"{where}{message}{source}")


class TraceError(TileError):
    """The kernel's source cannot be turned into IR: wrong types, unwritten outputs, unsupported Python."""


class LaunchError(TileError):
    """The arguments of a call do not fit the kernel's signature."""


class LoweringError(TileError):
    """A target cannot express what the kernel asks for; the message says which limit and what to change."""


class ParseError(TileError):
    """Text that should be IR is not."""


class SanitizeError(TileError):
    """`sanitize=True` found an out-of-bounds access, overlapping writes, an unwritten element or a NaN."""


class VerifyError(TileError):
    """A stage's result differs from the reference by more than the tolerance."""
