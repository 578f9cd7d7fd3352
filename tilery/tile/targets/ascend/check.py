"""Refuses what triton-ascend does not lower: each operation against the capability record, with the user's line."""

from __future__ import annotations

from tilery.tile.errors import LoweringError
from tilery.tile.ir import Kernel, Op, TensorType, TileType, Value, operands_of, walk
from tilery.tile.ops import OPS
from tilery.tile.size import as_size
from tilery.tile.targets.ascend.capabilities import Capabilities

_STRUCTURE = {"parallel", "for", "if", "size", "count", "tap", "arange"}
_FP8 = (
    "FP8 ({dtype}), which cores of A2 and A3 neither load, convert nor multiply; take the kernel's int8 or bf16 form, "
    "or convert before it"
)


def check(kernel: Kernel, record: Capabilities) -> None:
    """Raises `LoweringError` at the first operation of a padded kernel that the record does not allow."""
    used = {v.id for op in walk(kernel.body) for v in operands_of(op)}
    for op in walk(kernel.body):
        _fp8(op)
        _ranks(op, record)
        if op.name in _STRUCTURE:
            continue
        if op.name == "view":
            _view(op)
            continue
        name = f"{op.name}:{op.attr('kind')}" if op.name in ("reduce", "scan", "atomic") else op.name
        if name in record.refused:
            raise LoweringError(f"ascend: {name}: {record.refused[name]}", op.loc)
        if name not in record.dtypes:
            raise LoweringError(_unknown(op.name), op.loc)
        for dtype in _dtypes(op):
            if dtype not in record.dtypes[name]:
                raise LoweringError(
                    f"ascend: {name} of {dtype}: triton-ascend documents it for "
                    f"{', '.join(sorted(record.dtypes[name]))}; cast to one of these",
                    op.loc,
                )
        _special(op, used)


def _dtypes(op: Op) -> list[str]:
    """The dtypes that count: of what an operation computes on; of a load or store also that of the memory."""
    if op.name in ("load", "store", "atomic"):
        return [op.tensor.tensor.dtype.name]
    operands = op.operands[1:] if op.name == "where" else op.operands[:1] if op.name == "take" else op.operands
    found = [o.tile.dtype.name for o in operands if isinstance(o, Value)]
    if op.name in ("cast", "full", "bitcast", "where"):
        found += [r.tile.dtype.name for r in op.results]
    return found if op.name != "dot" else found[:2]


def _fp8(op: Op) -> None:
    for value in (*(o for o in op.operands if isinstance(o, Value)), *op.results):
        if value.type.dtype.is_fp8:
            raise LoweringError(f"ascend: {_FP8.format(dtype=value.type.dtype)}", op.loc)


def _ranks(op: Op, record: Capabilities) -> None:
    for value in op.results:
        if isinstance(value.type, TileType) and len(value.type.shape) > record.rank:
            raise LoweringError(
                f"ascend: {value.name!r} has {len(value.type.shape)} axes, triton-ascend takes {record.rank}; merge "
                "some with reshape",
                op.loc,
            )


def _view(op: Op) -> None:
    source, result = op.tensor.type, op.result.type
    assert isinstance(source, TensorType)
    assert isinstance(result, TensorType)
    if source.dtype != result.dtype:
        raise LoweringError(
            f"ascend: a view of {source.dtype} memory as {result.dtype}: triton-ascend does not convert a pointer "
            "between widths; keep the fields of packed rows in tensors of their own",
            op.loc,
        )


def _unknown(name: str) -> str:
    if name in OPS and "libdevice." in OPS[name].triton:
        return (
            f"ascend: {name} is a libdevice function, and which of these triton-ascend has is not documented; compose "
            "it of exp, log, sqrt, sin, cos and erf"
        )
    return (
        f"ascend: {name} is not among the operations that triton-ascend documents; compose it of those, or add it to "
        "Capabilities.dtypes if its Triton text uses nothing else"
    )


def _special(op: Op, used: set[int]) -> None:
    """Limits that are not of dtypes."""
    if op.name in ("load", "store"):
        for kind, operand in op.index:
            shape = operand.tile.shape if kind == "gather" and isinstance(operand, Value) else ()
            if shape and all(e == as_size(1) for e in shape):
                raise LoweringError(
                    "ascend: a gather of one row, which triton-ascend cannot lower; take a block of two in the "
                    "schedule, or index with the scalar",
                    op.loc,
                )
    if op.name == "transpose":
        perm = tuple(op.attr("perm"))
        moved = [at for at, axis in enumerate(perm) if at != axis]
        if moved and (len(moved) != 2 or moved[1] - moved[0] != 1):
            raise LoweringError(
                f"ascend: transpose{perm}: triton-ascend swaps neighbouring axes only; transpose twice", op.loc
            )
    elif op.name == "take":
        source = op.operands[0]
        assert isinstance(source, Value)
        if op.attr("axis") != len(source.tile.shape) - 1:
            raise LoweringError("ascend: take works along the last axis only; transpose first", op.loc)
    elif op.name == "scan" and op.attr("kind") == "max" and op.attr("reverse"):
        raise LoweringError("ascend: a reverse cummax needs unmasked loads in triton-ascend; reverse the input", op.loc)
    elif op.name == "atomic" and op.result.id in used:
        raise LoweringError(
            "ascend: the old value of an atomic: triton-ascend does not return it when several cores add; give each "
            "program a place of its own and sum in a second kernel",
            op.loc,
        )
