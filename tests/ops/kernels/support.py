"""What the kernels' tests share: all kernels, and comparisons."""

from __future__ import annotations

import torch

from tilery.tile import registry

PACKAGE = "tilery.ops.kernels"
registry.discover(PACKAGE)
ALL = registry.kernels(PACKAGE + ".")
"""Every kernel of the operators."""


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(a.float(), b.float(), atol=atol, rtol=rtol)
