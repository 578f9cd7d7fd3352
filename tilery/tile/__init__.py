"""The tile language: write a kernel once as tensors and tiles; run it on CPU and NVIDIA GPUs, exactly or fast.

Imports nothing of the package above it. `docs/tile/` teaches it.
"""

from typing import TYPE_CHECKING, Any

from tilery.tile import lib
from tilery.tile.control import blocks, function, parallel, range
from tilery.tile.dtypes import (
    Float, b1, bf16, e4m3, e5m2, f16, f32, f64, i8, i16, i32, i64, u8,
)  # fmt: skip
from tilery.tile.functions import (
    ELEMENTWISE, all, amax, amin, any, argmax, argmin, count_of, cummax, cumprod, cumsum, dot, empty, histogram, join,
    max, mean, min, prod, sort, split, sum, take, tap,
)  # fmt: skip
from tilery.tile.graph import Graph, graph, view
from tilery.tile.kernel import Kernel, kernel
from tilery.tile.lang import TensorRef, Tile, arange, elementwise, full, maximum, minimum, mul_rn, span, where, zeros
from tilery.tile.ops import OpDef, register as register_op
from tilery.tile.schedule import Schedule
from tilery.tile.signature import InOut, Static, Tensor
from tilery.tile.size import Dim, cdiv
from tilery.tile.tolerance import Tolerance

globals().update(ELEMENTWISE)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """The elementwise functions, which come from the table of operations."""
