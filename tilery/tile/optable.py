"""Which of the ~150 operations that PyPTO's tensor language offers exist here: writes `docs/tile/operations.md`.

    python -m tilery.tile.optable            writes the page
    python -m tilery.tile.optable --check    fails if the committed page is out of date

Only names are compared; meanings are this project's own (torch's, where the names agree).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tile" / "operations.md"


class State(Enum):
    DONE = "done"
    COMPOSED = "composed"
    NOT_PLANNED = "not planned"


@dataclass(frozen=True)
class Row:
    """One operation. `how`: the name or expression here; for what is not planned, the reason."""

    name: str
    state: State
    how: str


@dataclass(frozen=True)
class Group:
    name: str
    rows: tuple[Row, ...]


def _group(name: str, done: str = "", composed: dict[str, str] | None = None, not_planned: dict[str, str] | None = None,
           renamed: dict[str, str] | None = None) -> Group:  # fmt: skip
    """`done`: names that `tile.<name>` has; `renamed`: done under another name or as syntax."""
    rows = [Row(n, State.DONE, f"`tile.{n}`") for n in done.split()]
    rows += [Row(n, State.DONE, how) for n, how in (renamed or {}).items()]
    rows += [Row(n, State.COMPOSED, how) for n, how in (composed or {}).items()]
    rows += [Row(n, State.NOT_PLANNED, why) for n, why in (not_planned or {}).items()]
    return Group(name, tuple(rows))


_NO_CONV = "no convolution occurs in the models served"
_COMM = "a communication layer of its own, with one meaning on CPU and NVLink, is the place for it"
_SHMEM = (
    "create_shmem_tensor create_shmem_signal shmem_view shmem_put shmem_get shmem_signal shmem_wait_until "
    "shmem_barrier_all shmem_clear_data shmem_clear_signal my_symbolic_pe experimental.shmem_store "
    "experimental.shmem_load"
)

GROUPS = (
    _group(
        "Creation",
        "arange full zeros",
        composed={
            "ones": "`tile.full(shape, 1, dtype)`",
            "uniform": "`tile.lib.uniform`",
            "normal": "`tile.lib.normal`",
        },
    ),
    _group(
        "Elementwise arithmetic",
        "abs sign copysign hypot fmod reciprocal maximum minimum neg pow",
        renamed={"add": "`a + b`", "sub": "`a - b`", "mul": "`a * b`", "div": "`a / b` (floats)"},
        composed={
            "axpy_": "`tile.lib.axpy`",
            "signbit": "`tile.lib.signbit`",
            "remainder": "`tile.lib.remainder` (`a % b` has the dividend's sign)",
            "floor_div": "`tile.lib.floor_div` (`a // b` rounds toward zero)",
            "ceil_div": "`tile.lib.ceil_div`",
            "gcd": "`tile.lib.gcd`",
            "clip": "`tile.lib.clip`",
        },
    ),
    _group("Exponential, logarithm, root", "exp exp2 expm1 log log2 log10 log1p sqrt rsqrt cbrt"),
    _group(
        "Trigonometric",
        "sin cos tan sinh cosh tanh asin acos atan atan2 asinh acosh atanh erf",
        composed={"erfc": "`tile.lib.erfc`"},
    ),
    _group("Rounding and predicates", "round floor ceil trunc isfinite isnan"),
    _group(
        "Activation",
        "sigmoid",
        composed={
            "relu": "`tile.lib.relu`",
            "lrelu": "`tile.lib.leaky_relu`",
            "prelu": "`tile.lib.prelu`",
            "softmax": "`tile.lib.softmax`",
            "rms_norm": "`tile.lib.rms_norm`",
        },
    ),
    _group(
        "Bitwise and logical",
        renamed={
            "bitwise_and": "`a & b`",
            "bitwise_or": "`a | b`",
            "bitwise_xor": "`a ^ b`",
            "bitwise_not": "`~a`",
            "bitwise_left_shift": "`a << b`",
            "bitwise_right_shift": "`a >> b` (arithmetic for signed types)",
        },
        composed={"logical_and": "`tile.lib.logical_and`", "logical_not": "`tile.lib.logical_not`"},
    ),
    _group(
        "Comparison and selection",
        "where",
        renamed={
            "eq": "`a == b`",
            "ne": "`a != b`",
            "lt": "`a < b`",
            "le": "`a <= b`",
            "gt": "`a > b`",
            "ge": "`a >= b`",
            "greater": "`a > b`",
        },
    ),
    _group(
        "Reduction and scan",
        "sum amax amin prod argmax argmin cumsum cumprod",
        composed={"var": "`tile.lib.var`"},
    ),
    _group(
        "Sorting",
        renamed={"sort32": "`tile.sort` (any length up to a few thousand)"},
        composed={
            "topk": "`tile.lib.top_k_small` for small k; for long rows a selection by histogram in a kernel",
            "argsort": "`tile.lib.argsort` (stable)",
            "mrgsort": "`tile.sort` of the joined rows",
        },
    ),
    _group(
        "Shape and movement",
        renamed={
            "view": "slicing: `x[i, block, :]`, `x[tile.span(start, n)]`; other dtypes: `tensor.view(...)`",
            "reshape": "`x.reshape(...)`",
            "transpose": "`x.T`, `x.transpose(...)`",
            "permute": "`x.transpose(...)`",
            "unsqueeze": "`x[:, None]`",
            "expand_clone": "`x.broadcast_to(...)`; operators broadcast by themselves",
            "assemble": "`y[i, block, :] = v`",
            "cast": "`x.to(dtype)`",
        },
        composed={
            "clone": "not needed: tiles are values and never change",
            "concat": "write each part to its slice of the output",
            "pad": "`tensor.load(index, other=value)` past the end",
            "fillpad": "masks are derived; a value for them: `tensor.load(index, where, other)`",
            "tril": "`tile.lib.tril`",
            "triu": "`tile.lib.triu`",
            "pack": "`tile.lib.pack_int4`; whole bytes: `tensor.view(u8, ...)`",
            "unpack": "`tile.lib.unpack_int4`; whole bytes: `tensor.view(dtype, ...)`",
            "interleave": "`tile.join(a, b).reshape(...)`",
            "deinterleave": "`tile.split(x.reshape(..., n, 2))`",
            "one_hot": "`tile.lib.one_hot`",
        },
    ),
    _group(
        "Indexing",
        renamed={
            "gather": "`tile.take(x, index, axis)` of a tile; `x[index_tile, :]` of a tensor",
            "index_select": "`x[index_tile, :]`",
            "index_add": "`y.atomic_add((index_tile, ...), v)`",
            "index_add_": "`y.atomic_add((index_tile, ...), v)`",
            "index_put_": "`y[index_tile, :] = v`",
            "scatter": "`y[index_tile, :] = v`",
            "scatter_": "`y[index_tile, :] = v`",
            "scatter_update": "`y.store((index_tile, ...), v, where=mask)`",
        },
        composed={
            "index_add_(_)_ub": "`y.atomic_add(...)`; there is no separate on-chip form",
            "gathermask": "`place = tile.cumsum(mask) - 1; y.store((place,), v, where=mask)`",
        },
    ),
    _group("Atomics", renamed={"atomic_add": "`tensor.atomic_add(...)`; also `atomic_max`, `_min`, `_or`, `_xchg`"}),
    _group(
        "Matrix",
        renamed={"matmul": "`tile.dot(a, b, acc)`: f32, f16, bf16, e4m3, e5m2, i8; any epilogue in the same kernel"},
        composed={
            "scaled_mm": "`acc + tile.dot(a[:, group], b[group, :]) * scale_a * scale_b` over groups of 32 or 128",
            "experimental.transposed_batchmatmul": "a batch axis in `tile.parallel`, `.T` on an operand",
        },
        not_planned={"conv": _NO_CONV},
    ),
    _group(
        "Quantisation",
        composed={
            "quantize": "`tile.lib.quantize_int8`, `tile.lib.quantize_int4`, `tile.lib.quantize_fp8`",
            "dequantize": "`tile.lib.dequantize`",
            "quant_mx": "`tile.lib.quantize_fp8(g, pow2=True)` of groups of 32",
        },
    ),
    _group(
        "Attention helpers",
        composed={
            "expand_exp_dif": "`tile.exp(a - b[:, None])`",
            "experimental.online_softmax": "`tile.lib.online_softmax`",
            "experimental.online_softmax_update": "`tile.lib.merge_softmax`",
        },
        not_planned={"experimental.nop": "a scheduling aid of that compiler; nothing to compute"},
    ),
    _group(
        "Paged gather",
        renamed={
            "experimental.gather_in_l1": "`kv[table[b, t // P], t % P, :]` with a tile of tokens, then `tile.dot`",
            "experimental.gather_in_ub": "`kv.load((page, offset, ...), where=token >= 0)`",
        },
    ),
    _group(
        "Distributed",
        not_planned=dict.fromkeys(_SHMEM.split(), _COMM),
    ),
    _group(
        "Debugging",
        renamed={
            "pass_verify_print": "`tile.tap(name, v)` and `kernel.verify`",
            "pass_verify_save": "`tile.tap(name, v)` in the interpreter",
        },
    ),
)  # fmt: skip
"""Every operation of that language's master branch by group, as of August 2026."""


def render() -> str:
    """The page."""
    rows = [row for group in GROUPS for row in group.rows]
    counts = {state: sum(row.state is state for row in rows) for state in State}
    lines = [
        "# Operations",
        "",
        "<!-- Written by `python -m tilery.tile.optable`; edit that file, not this one. -->",
        "",
        "The operations of PyPTO's tensor language, and what this tile language has for each: *done* (an operation or "
        "syntax of the language), *composed* (a helper in `tile.lib` or one line), or *not planned*, with the reason.",
        "",
        f"{len(rows)} operations: {', '.join(f'{count} {state.value}' for state, count in counts.items())}.",
    ]
    for group in GROUPS:
        lines += ["", f"## {group.name}", "", "| operation | state | here, or why not |", "|---|---|---|"]
        lines += [f"| `{row.name}` | {row.state.value} | {row.how.replace('|', chr(92) + '|')} |" for row in group.rows]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Writes the page, or checks it. Returns the exit status."""
    text = render()
    if arguments == ["--check"]:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            print(f"{PAGE} is out of date: run python -m tilery.tile.optable")
            return 1
        return 0
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
