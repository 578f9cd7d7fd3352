"""One loop nest of C++: its variables, the statements at each depth, and index arithmetic that avoids divisions.

A statement is put at the depth of the innermost variable it depends on, so what does not change in the inner loop is
computed outside of it, and an expression asked for twice is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class NeedSplit(Exception):
    """An index would need a division; cutting loop axis `axis` into parts of `size` avoids it."""

    def __init__(self, axis: int, size: int) -> None:
        super().__init__(axis, size)
        self.axis, self.size = axis, size


@dataclass(frozen=True)
class Ext:
    """An extent in C++: `text`; `const` where it is known; `cap`: at most that many."""

    text: str
    const: int | None
    cap: int


@dataclass(frozen=True)
class Affine:
    """An index as a sum of loop variables times factors, plus a constant."""

    terms: tuple[tuple[str, int], ...] = ()
    const: int = 0

    @staticmethod
    def make(terms: dict[str, int], const: int) -> Affine:
        return Affine(tuple(sorted((v, c) for v, c in terms.items() if c)), const)

    def __add__(self, other: Affine) -> Affine:
        terms = dict(self.terms)
        for v, c in other.terms:
            terms[v] = terms.get(v, 0) + c
        return Affine.make(terms, self.const + other.const)

    def __mul__(self, factor: int) -> Affine:
        return Affine.make({v: c * factor for v, c in self.terms}, self.const * factor)

    @property
    def text(self) -> str:
        parts = [v if c == 1 else f"{v} * {c}" for v, c in self.terms]
        if self.const or not parts:
            parts.append(str(self.const))
        return " + ".join(parts)


@dataclass(frozen=True)
class E:
    """A C++ expression and the depth of the innermost loop variable in it (0: none)."""

    text: str
    level: int = 0

    @property
    def simple(self) -> bool:
        return self.text.replace("_", "").replace(".", "").isalnum()


@dataclass
class Loop:
    """A variable of the nest; it counts steps of `stride` along `axis` of the shape."""

    var: str
    extent: Ext
    axis: int
    stride: int = 1


class Nest:
    """Loops over `shape`, axes of extent 1 left out. `splits[axis]`: part sizes, outer to inner. `checked`: accesses
    that may leave their tensor are guarded one by one; otherwise the conditions under which none does are in `inside`.
    """

    def __init__(self, shape: Sequence[Ext], splits: dict[int, list[int]], checked: bool, unroll: int = 2) -> None:
        self.checked, self.splits = checked, splits
        self.inside: list[str] = []
        self.loops: list[Loop] = []
        self.index: list[Affine] = []
        self.levels: dict[str, int] = {}
        self.bounds: dict[str, int | None] = {}
        self.memo: dict[object, E] = {}
        self.unrolled: Loop | None = None
        for axis, extent in enumerate(shape):
            if extent.const == 1:
                self.index.append(Affine())
                continue
            whole, rest = Affine(), extent
            for size in splits.get(axis, []):
                assert rest.const is not None
                count = rest.const // size
                whole = whole + self._loop(Ext(str(count), count, count), axis, size) * size
                rest = Ext(str(size), size, size)
            self.index.append(whole + self._loop(rest, axis))
        last = self.loops[-1] if self.loops else None
        if (
            last is not None
            and len(self.loops) > 1
            and last.extent.const is not None
            and 0 < last.extent.const <= unroll
        ):
            self.unrolled = self.loops.pop()
        self.lines: list[list[str]] = [[] for _ in range(len(self.loops) + 1)]
        self.after: list[list[str]] = [[] for _ in range(len(self.loops) + 1)]
        self.counter = 0
        self.pragmas: Sequence[str] | None = None

    def _loop(self, extent: Ext, axis: int, stride: int = 1) -> Affine:
        var = f"i{len(self.loops)}"
        self.loops.append(Loop(var, extent, axis, stride))
        self.levels[var] = len(self.loops)
        self.bounds[var] = extent.const
        return Affine(((var, 1),))

    def points(self) -> list[list[Affine]]:
        """The index of each element that the innermost body handles: one, or one per unrolled iteration."""
        if self.unrolled is None:
            return [list(self.index)]
        assert self.unrolled.extent.const is not None
        var, out = self.unrolled.var, []
        for value in range(self.unrolled.extent.const):
            point = []
            for index in self.index:
                terms = dict(index.terms)
                factor = terms.pop(var, 0)
                point.append(Affine.make(terms, index.const + factor * value))
            out.append(point)
        return out

    def level(self, *indices: Affine) -> int:
        return max((self.levels[v] for index in indices for v, _ in index.terms), default=0)

    def let(self, ctype: str, text: str, level: int, hint: str = "v") -> E:
        """A constant for an expression, declared at its depth; the same expression gives the same constant."""
        if text.replace("_", "").isalnum():
            return E(text, level)
        key = (ctype, text)
        if key not in self.memo:
            self.counter += 1
            name = f"{hint}{self.counter}_"
            self.lines[level].append(f"const {ctype} {name} = {text};")
            self.memo[key] = E(name, level)
        return self.memo[key]

    def opaque(self, text: str, level: int) -> Affine:
        """An index that is no sum of loop variables."""
        name = self.let("int64_t", text, level, "at").text
        if name.isdigit():
            return Affine((), int(name))
        self.levels[name] = level
        self.bounds.setdefault(name, None)
        return Affine(((name, 1),))

    def divmod(self, index: Affine, divisor: int) -> tuple[Affine, Affine]:
        """(quotient, remainder) of an index; raises `NeedSplit` where cutting a loop makes it exact."""
        if divisor == 1:
            return index, Affine()
        quotient = {v: c // divisor for v, c in index.terms if c % divisor == 0}
        rest = [(v, c) for v, c in index.terms if c % divisor]
        top, known = index.const % divisor, True
        for v, c in rest:
            bound = self.bounds[v]
            known = known and bound is not None and c > 0
            top += c * ((bound or 1) - 1)
        if known and top < divisor:
            return Affine.make(quotient, index.const // divisor), Affine.make(dict(rest), index.const % divisor)
        for v, c in rest:
            bound = self.bounds[v]
            loop = next((loop for loop in self.loops if loop.var == v), None)
            if loop is None or not bound or c < 0 or divisor % c:
                continue
            part = divisor // c
            nested = all(
                max(o, part * loop.stride) % min(o, part * loop.stride) == 0 for o in self.splits.get(loop.axis, [])
            )
            if part < bound and bound % part == 0 and nested:
                raise NeedSplit(loop.axis, part * loop.stride)
        level = self.level(index)
        return (
            self.opaque(f"({index.text}) / {divisor}", level),
            self.opaque(f"({index.text}) % {divisor}", level),
        )

    def render(self, pragmas: Sequence[str] = ("#pragma omp simd",)) -> list[str]:
        """The loops as lines. `pragmas` go before the innermost loop."""

        def body(depth: int) -> list[str]:
            out = list(self.lines[depth])
            if depth < len(self.loops):
                loop = self.loops[depth]
                if depth == len(self.loops) - 1:
                    out += pragmas if self.pragmas is None else self.pragmas
                head = f"for (int64_t {loop.var} = 0; {loop.var} < {loop.extent.text}; {loop.var}++)"
                inner = body(depth + 1)
                if len(inner) == 1:
                    out += [head, "    " + inner[0]]
                else:
                    out += [head + " {", *("    " + line for line in inner), "}"]
            return out + self.after[depth]

        return body(0)
