"""What is measured: a kernel at a shape, how to make its inputs, how to judge its result, what is asked of its time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Ceiling = Literal["bf16", "fp8", "int8", "copy"]
"""Which of the card's measured ceilings bounds a kernel: a rate of products, or the rate of a copy."""

Metric = Literal["ratio", "tb_per_s", "share_of_copy", "tflops"]
"""What `must` and `aim` count: baseline time over ours; bytes over time; that over the copy rate; TFLOP/s."""


@dataclass(frozen=True)
class Prepared:
    """A case with inputs on the device.

    run: launches the kernel on the prepared inputs and returns its outputs; no synchronisation, so that a CUDA graph
    can hold it. error: the relative L2 error of the result against float64 arithmetic on the same quantised
    inputs. flops and bytes: of one run, the least any implementation needs (every input read once, every output
    written once). outputs: filled with bytes 0xFF (NaN, -1) before the check. complete: a run writes all of them, so a
    NaN that is left is an error. rival: the same work by a library on this machine, timed in turn with `run`.
    """

    run: Callable[[], Any]
    error: Callable[[Any], float]
    flops: float
    bytes: float
    outputs: tuple[Tensor, ...] = ()
    complete: bool = True
    rival: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Case:
    """One row of the table.

    kernel: a name shared by rows of one kernel. shape: sizes by name, as the table prints them. make: builds inputs
    with the generator it is given. baseline: (table, keys) that name the rival's row; None if there is none. cold: the
    second-level cache is flushed before every run, as in a decode step. error_bound: the largest error allowed.
    """

    kernel: str
    shape: Mapping[str, int | str]
    make: Callable[[torch.Generator], Prepared]
    ceiling: Ceiling
    metric: Metric = "ratio"
    must: float | None = None
    aim: float | None = None
    baseline: tuple[str, Mapping[str, int]] | None = None
    cold: bool = False
    error_bound: float = 1e-3

    @property
    def name(self) -> str:
        """`kernel[a=1,b=2]`, what `--only` is matched with."""
        return f"{self.kernel}[{','.join(f'{key}={value}' for key, value in self.shape.items())}]"


def relative_error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference|| in float64; infinite if `out` holds a NaN or an infinity where the reference
    holds none. Equal infinities count as equal."""
    out, reference = out.detach().double(), reference.detach().double()
    same = out == reference
    difference = torch.where(same, torch.zeros_like(out), out - reference)
    if not bool(torch.isfinite(difference).all()):
        return float("inf")
    size = torch.where(torch.isfinite(reference), reference, torch.zeros_like(reference)).norm()
    return float(difference.norm() / size.clamp_min(1e-30))
