"""How close a result must be to its reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """An element passes where |value - reference| <= atol + rtol * |reference|; `bad` is the allowed fraction of
    elements that do not (values on a rounding boundary of FP8 or INT8, ties of a top-k)."""

    atol: float = 1e-5
    rtol: float = 1e-5
    bad: float = 0.0

    def __post_init__(self) -> None:
        if self.atol < 0 or self.rtol < 0 or not 0 <= self.bad < 1:
            raise ValueError(f"a tolerance needs atol >= 0, rtol >= 0 and 0 <= bad < 1, got {self}")

    def compare(self, value: Tensor, reference: Tensor) -> Difference:
        """Element by element; NaN equals NaN and an infinity only itself."""
        a, b = value.detach().cpu().double().reshape(-1), reference.detach().cpu().double().reshape(-1)
        if a.numel() == 0:
            return Difference(0.0, 0.0, 0.0, True)
        same = (a == b) | (a.isnan() & b.isnan())
        error = torch.where(same, 0.0, (a - b).abs())
        error = torch.where(error.isnan(), float("inf"), error)
        limit = self.atol + self.rtol * torch.where(b.isfinite(), b.abs(), 0.0)
        relative = torch.where(same, 0.0, error / b.abs().clamp_min(1e-30))
        wrong = int((error > limit).sum())
        share = wrong / a.numel()
        return Difference(float(error.max()), float(relative.nan_to_num(float("inf")).max()), share, share <= self.bad)


@dataclass(frozen=True)
class Difference:
    """The largest absolute and relative error, the share of elements outside the tolerance, and whether that passes."""

    absolute: float
    relative: float
    outside: float
    ok: bool


EXACT = Tolerance(0.0, 0.0)
"""Bit for bit, up to the sign of zero."""


def default_tolerance(dtype: torch.dtype) -> Tolerance:
    """Where a kernel declares none: a few roundings of the dtype; integers exactly."""
    if not dtype.is_floating_point:
        return EXACT
    step = float(torch.finfo(dtype).eps)
    return Tolerance(max(step, 1e-5), max(2 * step, 1e-5), 0.01 if dtype.itemsize == 1 else 0.0)
