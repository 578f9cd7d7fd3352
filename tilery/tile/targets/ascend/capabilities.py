"""What triton-ascend documents that it lowers, and what a core of an Atlas A2 or A3 holds: the target's limits as data.

Sources, both public documentation of triton-ascend (MIT licence, read 2026-11):

    table   docs/sources/python-api/outline.md: operations by dtype as of 3.2, with its notes at the end
    pages   docs/zh/triton_api/<group>/<operation>.md: newer, one page per operation
    guide   docs/en/programming_guide.md, docs/en/migration_guide/*.md: cores, alignment, on-chip memory

Where table and pages disagree, only what both allow counts. What neither says is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field

KIB = 1024

_INT = frozenset({"i8", "i16", "i32", "i64"})
_FLOAT = frozenset({"f16", "bf16", "f32"})
_NUMBER = _INT | _FLOAT
_ANY = _NUMBER | {"b1"}
_NARROW = _ANY - {"i64"}


def _table() -> dict[str, frozenset[str]]:
    """dtypes by operation of the Tile IR; a reduction is "reduce:sum", an atomic "atomic:add"."""
    rows: dict[str, frozenset[str]] = {}
    for names, dtypes in (
        ("load store full cast reshape broadcast join split eq ne lt le gt ge", _ANY),
        ("transpose where", _NARROW),
        ("add sub mul neg abs maximum minimum reduce:sum reduce:max reduce:min reduce:argmax reduce:argmin", _NUMBER),
        ("reduce:prod scan:sum scan:prod bitcast", _NUMBER),
        ("scan:max", _NUMBER - {"bf16"}),
        ("floordiv shl shr", _INT),
        ("mod", _INT - {"i64"}),  # of int64 the table allows only numbers within 2^24
        ("bit_and bit_or bit_xor bit_not", _INT | {"b1"}),
        ("div reciprocal exp exp2 log log2 sqrt rsqrt sin cos erf sigmoid floor ceil", _FLOAT),
        ("trunc round sign isnan isfinite", _FLOAT),  # composed of where, abs, floor, ceil and comparisons
        ("reduce:any reduce:all", frozenset({"b1"})),
        ("take", _FLOAT),
        ("dot", _FLOAT | {"i8"}),
        ("atomic:add atomic:max atomic:min", _NUMBER - {"i64"}),
    ):
        rows.update(dict.fromkeys(names.split(), dtypes))
    return rows


REFUSED = {
    "sort": "triton-ascend's table of 3.2 has no dtype for sort and its newer page has no 32-bit integers; rank by "
    "comparisons, as tile.sum(a[:, None] < a[None, :])",
    "histogram": "tl.histogram of triton-ascend 3.2 takes no mask and only numbers inside the bins; count with "
    "comparisons, as tile.sum((x[:, None] == bins[None, :]).to(i32), axis=0)",
    "mul_rn": "whether bisheng keeps the rounding of a product that a sum takes is not documented; write a * b if the "
    "last bit does not matter",
    "atomic:or": "triton-ascend takes this atomic outside loops only, and every kernel here loops over its tiles",
    "atomic:xchg": "triton-ascend takes this atomic outside loops only, and every kernel here loops over its tiles",
}
"""Operations that no dtype helps, with the reason."""


@dataclass(frozen=True)
class Capabilities:
    """Sizes are bytes of one core. `unified`: the unified buffer of a vector core; `l1`, `l0a`, `l0b`, `l0c`: of a cube
    core. `buffers`: copies of each tile that the default compile option `multibuffer` keeps. `align`: the last axis of
    a tile is padded to so many bytes. `cores`: (vector, cube); `grid`: the most programs a launch may have.
    """

    device: str = "Atlas A2/A3 (Ascend910B)"
    unified: int = 192 * KIB
    l1: int = 512 * KIB
    l0a: int = 64 * KIB
    l0b: int = 64 * KIB
    l0c: int = 128 * KIB
    buffers: int = 2
    align: int = 32
    cores: tuple[int, int] = (48, 24)
    grid: int = 65535
    rank: int = 5
    dtypes: dict[str, frozenset[str]] = field(default_factory=_table)
    refused: dict[str, str] = field(default_factory=lambda: dict(REFUSED))

    def programs(self, cube: bool) -> int:
        """Programs of a launch: one per vector core, or per cube core for kernels with products."""
        return min(self.cores[cube], self.grid)


A2 = Capabilities()
