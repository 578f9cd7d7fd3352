"""Element types, by the field's names: `f32`, `bf16`, `e4m3`, `i32` and so on."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DType:
    """`kind`: "b" bool, "i" signed, "u" unsigned, "f" float. `bits`: storage size."""

    name: str
    kind: str
    bits: int
    torch: torch.dtype
    triton: str
    cpp: str

    def __repr__(self) -> str:
        return self.name

    @property
    def bytes(self) -> int:
        return self.bits // 8

    @property
    def is_float(self) -> bool:
        return self.kind == "f"

    @property
    def is_int(self) -> bool:
        return self.kind in "iu"

    @property
    def is_fp8(self) -> bool:
        return self.kind == "f" and self.bits == 8

    @property
    def lowest(self) -> float | int:
        """The identity of max: -inf for floats, the smallest integer else."""
        return float("-inf") if self.is_float else (0 if self.kind in "bu" else -(1 << (self.bits - 1)))

    @property
    def highest(self) -> float | int:
        """The identity of min."""
        if self.is_float:
            return float("inf")
        return 1 if self.kind == "b" else (1 << (self.bits - (self.kind == "i"))) - 1


b1 = DType("b1", "b", 8, torch.bool, "tl.int1", "bool")
i8 = DType("i8", "i", 8, torch.int8, "tl.int8", "int8_t")
u8 = DType("u8", "u", 8, torch.uint8, "tl.uint8", "uint8_t")
i16 = DType("i16", "i", 16, torch.int16, "tl.int16", "int16_t")
i32 = DType("i32", "i", 32, torch.int32, "tl.int32", "int32_t")
i64 = DType("i64", "i", 64, torch.int64, "tl.int64", "int64_t")
f16 = DType("f16", "f", 16, torch.float16, "tl.float16", "f16")
bf16 = DType("bf16", "f", 16, torch.bfloat16, "tl.bfloat16", "bf16")
f32 = DType("f32", "f", 32, torch.float32, "tl.float32", "float")
f64 = DType("f64", "f", 64, torch.float64, "tl.float64", "double")
e4m3 = DType("e4m3", "f", 8, torch.float8_e4m3fn, "tl.float8e4nv", "e4m3")
e5m2 = DType("e5m2", "f", 8, torch.float8_e5m2, "tl.float8e5", "e5m2")

ALL = (b1, i8, u8, i16, i32, i64, f16, bf16, f32, f64, e4m3, e5m2)
BY_NAME = {d.name: d for d in ALL}
BY_TORCH = {d.torch: d for d in ALL}
Float = (bf16, f16, f32)
"""The dtypes an activation may have: `x: Tensor[T, H, Float]` accepts any of them."""


def promote(a: DType, b: DType) -> DType | None:
    """The dtype of arithmetic between tiles of `a` and `b`; None where the user must cast (FP8 has no arithmetic)."""
    if a == b:
        return None if a.is_fp8 else a
    if a.is_fp8 or b.is_fp8:
        return None
    if a.is_float and b.is_float:
        return f32 if a.bits == b.bits else max(a, b, key=lambda d: d.bits)
    if a.is_float or b.is_float:
        return a if a.is_float else b
    if a.kind == "b" or b.kind == "b":
        return b if a.kind == "b" else a
    if a.kind == b.kind:
        return max(a, b, key=lambda d: d.bits)
    signed, unsigned = (a, b) if a.kind == "i" else (b, a)
    return signed if signed.bits > unsigned.bits else {8: i16, 16: i32}.get(unsigned.bits, i64)
