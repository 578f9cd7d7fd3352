"""The process that runs Triton's interpreter: reads (source, function, grid, arguments), writes the arguments after.

The interpreter computes with numpy, which has neither bf16 nor FP8: Triton 3.6 cuts f32 off to bf16 instead of
rounding, rounds FP8 wrongly, multiplies the bit patterns of bf16 in `tl.dot`, and lacks libdevice. The builder here
does these as the hardware does, through torch, so that the very source that runs on the GPU can be checked.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from tilery.tile.targets.triton.build import load_source
from tilery.tile.targets.triton.interp import pack, unpack

_CODED = {
    "bf16": (torch.bfloat16, torch.int16, np.uint16), "fp8e4nv": (torch.float8_e4m3fn, torch.uint8, np.uint8),
    "fp8e5": (torch.float8_e5m2, torch.uint8, np.uint8),
}  # fmt: skip
_LIMIT = {"fp8e4nv": 448.0, "fp8e5": 57344.0}
_NUMPY = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "asinh": "arcsinh", "acosh": "arccosh",
          "atanh": "arctanh", "atan2": "arctan2", "pow": "power", "mul_rn": "multiply",
          "popc": "bitwise_count"}  # fmt: skip


def decode(data: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """The numbers that the bit patterns of a 16- or 8-bit float stand for; other types as they are."""
    if dtype.name not in _CODED:
        return data
    kind, bits, _ = _CODED[dtype.name]
    raw = np.ascontiguousarray(data).view(np.int16 if bits is torch.int16 else np.uint8)
    return torch.from_numpy(raw.copy()).view(kind).float().numpy().reshape(data.shape)


def encode(data: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Numbers as the bit patterns of `dtype`, rounded to nearest even; FP8 saturates."""
    if dtype.name not in _CODED:
        return data.astype(interpreter._get_np_dtype(dtype))
    kind, bits, out = _CODED[dtype.name]
    values = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32).reshape(-1))
    limit = _LIMIT.get(dtype.name)
    if limit is not None:
        values = values.clamp(-limit, limit)
    return values.to(kind).view(bits).numpy().view(out).reshape(data.shape)


class Builder(interpreter.InterpreterBuilder):
    """Triton's interpreter with the conversions and products of the hardware."""

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        target = dst_type.scalar
        return interpreter.TensorHandle(encode(decode(src.data, src.dtype.scalar), target), target)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        return self.cast_impl(src, dst_type)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        left, right = decode(a.data, a.dtype.scalar), decode(b.data, b.dtype.scalar)
        out = np.matmul(left.astype(d.data.dtype), right.astype(d.data.dtype)) + d.data
        return interpreter.TensorHandle(out, d.dtype.scalar)

    def create_histogram(self, data: Any, bins: int, mask: Any) -> Any:
        values = data.data if mask is None else data.data[mask.data]
        return interpreter.TensorHandle(np.bincount(values, minlength=bins)[:bins].astype(np.int32), tl.int32)

    def create_atomic_rmw(self, rmwOp: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        kind = val.data.dtype
        if kind.kind == "f" and rmwOp == ir.ATOMIC_OP.XCHG:  # an exchange moves bits, whatever they mean
            bits = interpreter.TensorHandle(
                val.data.view(f"i{kind.itemsize}"), tl.int64 if kind.itemsize == 8 else tl.int32
            )
            old = super().create_atomic_rmw(rmwOp, ptr, bits, mask, sem, scope)
            return interpreter.TensorHandle(old.data.view(kind), val.dtype.scalar)
        return super().create_atomic_rmw(rmwOp, ptr, val, mask, sem, scope)


class Libdevice:
    """libdevice's functions by name, in numpy."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(np, _NUMPY.get(name, name), None)
        if function is None:
            raise AttributeError(f"libdevice.{name} is not known to the interpreter; use an operation of the language")

        def call(*args: Any) -> Any:
            tensors = [interpreter.interpreter_semantic.to_tensor(a) for a in args]
            shaped = max(tensors, key=lambda t: t.handle.data.size)
            out = function(*(t.handle.data for t in tensors)).astype(shaped.handle.data.dtype)
            return tl.tensor(interpreter.TensorHandle(out, shaped.dtype.scalar), shaped.type)

        return call


def answer(source: str, name: str, grid: int, arguments: list[Any], folder: Path, number: int) -> list[Any]:
    """Runs one kernel on packed arguments and packs them again."""
    path = folder / f"kernel_{number}.py"
    path.write_text(source)
    module = load_source(path, path.stem)
    if hasattr(module, "libdevice"):
        vars(module)["libdevice"] = Libdevice()
    with np.errstate(all="ignore"):
        values = [unpack(a) for a in arguments]
        getattr(module, name)[(grid,)](*values)
    return [pack(v) for v in values]


def main() -> None:
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a kernel prints goes to stderr, not between the answers
    torch.set_num_threads(1)
    interpreter.interpreter_builder = Builder()
    interpreter.interpreter_semantic = TritonSemantic(interpreter.interpreter_builder)
    number = 0
    with tempfile.TemporaryDirectory() as folder:
        while True:
            try:
                question = pickle.load(questions)
            except EOFError:
                return
            number += 1
            try:
                source, name, grid, arguments = question
                result: Any = answer(source, name, grid, arguments, Path(folder), number)
            except Exception as error:
                result = f"{type(error).__name__}: {error}"
            pickle.dump(result, answers)
            answers.flush()


if __name__ == "__main__":
    main()
