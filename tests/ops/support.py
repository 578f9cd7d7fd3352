"""What the operator tests share: every implementation that runs here, random tensors, shapes by hypothesis."""

import torch
from hypothesis import settings
from hypothesis import strategies as st

from tilery.ops import registry

FEW = settings(max_examples=25)
seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
TOLERANCE = {torch.float32: {"rtol": 2e-5, "atol": 2e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 3e-2}}


def implementations(operator):
    """The functions of every implementation that runs here, the reference included, to be compared with each other.

    Not the kernels of the tile language: they are compiled for each shape, and tested at fixed ones (`test_tiled.py`).
    """
    (info,) = [info for info in registry.list_operators() if info.name == operator]
    names = [row.name for row in info.implementations if row.available and row.name != "tile"]
    assert "reference" in names
    return [getattr(registry.select(overrides={operator: name}), operator) for name in names]


def draw(seed):
    """A generator of normally distributed tensors."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape, dtype=torch.float32: torch.randn(shape, generator=generator).to(dtype)


def close(got, expected, dtype=torch.float32):
    torch.testing.assert_close(got.float(), expected.float(), **TOLERANCE[dtype])
