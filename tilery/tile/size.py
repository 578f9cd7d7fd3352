"""Symbolic sizes: integers made of named dimensions, in a normal form, so that equal sizes compare equal.

A `Size` is a polynomial with integer coefficients over *atoms*; an atom is a dimension divided by its known factor
(`H = Dim("H", multiple_of=128)` has the atom H/128), or an inexact quotient. `H // 128 * 128 == H` holds by
construction, and `T // 128` of an arbitrary T stays a quotient.
"""

from __future__ import annotations

import ast
import keyword
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from tilery.tile.errors import LaunchError, TraceError

IntLike: TypeAlias = "int | Size | Dim"


@dataclass(frozen=True)
class Dim:
    """A named dimension, bound at launch by the tensors that have it.

    `min`, `max`: inclusive range; `multiple_of`: a known divisor. All are checked at launch with a message that names
    the tensor. Two Dims of one name in one kernel must agree.
    """

    name: str
    min: int = 0
    max: int | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or keyword.iskeyword(self.name):
            raise TraceError(f"a Dim's name must be a Python identifier, got {self.name!r}")
        if self.multiple_of < 1:
            raise TraceError(f"Dim {self.name!r}: multiple_of must be at least 1, got {self.multiple_of}")

    @property
    def size(self) -> Size:
        return Size.make({(_Unit(self),): self.multiple_of})

    def check(self, value: int, where: str) -> None:
        """Raises `LaunchError` unless `value` is in range and divisible."""
        if value < self.min or (self.max is not None and value > self.max):
            upper = "" if self.max is None else f" and at most {self.max}"
            raise LaunchError(f"{where}: dimension {self.name} must be at least {self.min}{upper}, got {value}")
        if value % self.multiple_of:
            raise LaunchError(f"{where}: dimension {self.name} must be a multiple of {self.multiple_of}, got {value}")

    def __repr__(self) -> str:
        return self.name

    def __add__(self, other: IntLike) -> Size:
        return self.size + other

    def __radd__(self, other: IntLike) -> Size:
        return self.size + other

    def __sub__(self, other: IntLike) -> Size:
        return self.size - other

    def __rsub__(self, other: IntLike) -> Size:
        return as_size(other) - self.size

    def __mul__(self, other: IntLike) -> Size:
        return self.size * other

    def __rmul__(self, other: IntLike) -> Size:
        return self.size * other

    def __floordiv__(self, other: int) -> Size:
        return self.size // other

    def __mod__(self, other: int) -> Size:
        return self.size % other


@dataclass(frozen=True)
class _Unit:
    """The atom dim / multiple_of."""

    dim: Dim

    def evaluate(self, env: Mapping[str, int]) -> int:
        return env[self.dim.name] // self.dim.multiple_of

    def __str__(self) -> str:
        return self.dim.name if self.dim.multiple_of == 1 else f"{self.dim.name} // {self.dim.multiple_of}"


@dataclass(frozen=True)
class _Quotient:
    """The atom floor(size / divisor), where the division is not known to be exact."""

    size: Size
    divisor: int

    def evaluate(self, env: Mapping[str, int]) -> int:
        return self.size.evaluate(env) // self.divisor

    def __str__(self) -> str:
        return f"({self.size}) // {self.divisor}"


Atom = _Unit | _Quotient


@dataclass(frozen=True)
class Size:
    """A polynomial over atoms: `terms` maps a sorted product of atoms to its coefficient; the empty product is 1."""

    terms: tuple[tuple[tuple[Atom, ...], int], ...] = field(default=())

    @staticmethod
    def make(terms: Mapping[tuple[Atom, ...], int]) -> Size:
        kept = [(atoms, c) for atoms, c in terms.items() if c]
        return Size(tuple(sorted(kept, key=lambda term: (len(term[0]), [str(a) for a in term[0]]), reverse=True)))

    @property
    def const(self) -> int | None:
        """The value, if no dimension is involved."""
        if not self.terms:
            return 0
        return self.terms[0][1] if len(self.terms) == 1 and not self.terms[0][0] else None

    @property
    def dims(self) -> frozenset[Dim]:
        found: set[Dim] = set()
        for atoms, _ in self.terms:
            for atom in atoms:
                found |= {atom.dim} if isinstance(atom, _Unit) else atom.size.dims
        return frozenset(found)

    @property
    def factor(self) -> int:
        """A known divisor: the greatest common divisor of the coefficients (0 for size 0)."""
        return math.gcd(*(c for _, c in self.terms)) if self.terms else 0

    def evaluate(self, env: Mapping[str, int]) -> int:
        """The value with dimension names bound by `env`."""
        return sum(c * math.prod(a.evaluate(env) for a in atoms) for atoms, c in self.terms)

    def bind(self, env: Mapping[str, int]) -> Size:
        """The size with the dimensions named in `env` replaced by their values."""
        if not any(d.name in env for d in self.dims):
            return self
        total = Size()
        for atoms, c in self.terms:
            product = as_size(c)
            for atom in atoms:
                product = product * _bind_atom(atom, env)
            total = total + product
        return total

    def __add__(self, other: IntLike) -> Size:
        terms = dict(self.terms)
        for atoms, c in as_size(other).terms:
            terms[atoms] = terms.get(atoms, 0) + c
        return Size.make(terms)

    __radd__ = __add__

    def __neg__(self) -> Size:
        return self * -1

    def __sub__(self, other: IntLike) -> Size:
        return self + as_size(other) * -1

    def __rsub__(self, other: IntLike) -> Size:
        return as_size(other) - self

    def __mul__(self, other: IntLike) -> Size:
        terms: dict[tuple[Atom, ...], int] = {}
        for a, c in self.terms:
            for b, d in as_size(other).terms:
                key = tuple(sorted(a + b, key=str))
                terms[key] = terms.get(key, 0) + c * d
        return Size.make(terms)

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> Size:
        if not isinstance(other, int) or other < 1:
            raise TraceError(f"a size can only be divided by a positive Python int, got {other!r}")
        if self.const is not None:
            return as_size(self.const // other)
        whole = {atoms: c // other for atoms, c in self.terms if c % other == 0}
        rest = Size.make({atoms: c for atoms, c in self.terms if c % other})
        quotient = Size.make(whole)
        if not rest.terms:
            return quotient
        if rest.const is not None:
            return quotient + rest.const // other
        return quotient + Size.make({(_Quotient(rest, other),): 1})

    def __mod__(self, other: int) -> Size:
        return self - (self // other) * other

    def __str__(self) -> str:
        return " + ".join(_show(atoms, c) for atoms, c in self.terms) if self.terms else "0"

    def __repr__(self) -> str:
        return str(self)


def _bind_atom(atom: Atom, env: Mapping[str, int]) -> Size:
    if isinstance(atom, _Quotient):
        return atom.size.bind(env) // atom.divisor
    return as_size(atom.evaluate(env)) if atom.dim.name in env else Size.make({(atom,): 1})


def _show(atoms: tuple[Atom, ...], coefficient: int) -> str:
    if not atoms:
        return str(coefficient)
    parts = []
    for atom in atoms:
        if isinstance(atom, _Unit) and atom.dim.multiple_of > 1:
            if coefficient % atom.dim.multiple_of == 0:
                coefficient //= atom.dim.multiple_of
                parts.append(atom.dim.name)
            elif coefficient > 0 and atom.dim.multiple_of % coefficient == 0:
                parts.append(f"({atom.dim.name} // {atom.dim.multiple_of // coefficient})")
                coefficient = 1
            else:
                parts.append(f"({atom})")
        else:
            parts.append(str(atom) if isinstance(atom, _Unit) else f"({atom})")
    text = " * ".join(parts)
    return text if coefficient == 1 else f"{coefficient} * {text}"


def as_size(value: IntLike) -> Size:
    """An int, Dim or Size as a Size. Raises `TraceError` for anything else."""
    if isinstance(value, Size):
        return value
    if isinstance(value, Dim):
        return value.size
    if isinstance(value, int) and not isinstance(value, bool):
        return Size(((((), value)),)) if value else Size()
    raise TraceError(f"expected a size (an int, a Dim or arithmetic of them), got {type(value).__name__} {value!r}")


def cdiv(size: IntLike, divisor: int) -> Size:
    """The quotient rounded up."""
    return (as_size(size) + (divisor - 1)) // divisor


def parse_size(node: ast.expr, dims: Mapping[str, Dim]) -> Size:
    """A size from its printed form (Python arithmetic over dimension names)."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return as_size(node.value)
    if isinstance(node, ast.Name) and node.id in dims:
        return dims[node.id].size
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -parse_size(node.operand, dims)
    if isinstance(node, ast.BinOp):
        left, right = parse_size(node.left, dims), parse_size(node.right, dims)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.FloorDiv) and right.const:
            return left // right.const
    raise TraceError(f"not a size: {ast.unparse(node)}")
