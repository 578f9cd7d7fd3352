"""What the language means: every kernel of the zoo on random ragged sizes, 0 and 1 included, against plain torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tile import zoo_data  # noqa: F401 (adds its cases)
from tests.tile.zoo import CASES
from tilery.tile import interpret
from tilery.tile.errors import LoweringError
from tilery.tile.lowering import TARGETS, lower
from tilery.tile.text import parse_kernel, print_kernel

EXACT = {"two_dimensional_blocks", "paged_gather", "masked_scatter"}


def compare(got: torch.Tensor, expected: torch.Tensor, exact: bool) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if exact or not expected.is_floating_point() or expected.element_size() == 1:
        assert torch.equal(got.float(), expected.float())
    else:
        tolerance = 1e-5 if expected.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(got.float(), expected.float(), rtol=tolerance, atol=10 * tolerance, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=10)
@given(data=st.data())
def test_against_torch(name: str, data: st.DataObject) -> None:
    rand = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31 - 1), "seed"))
    kernel, arguments, expected = CASES[name](lambda low, high: data.draw(st.integers(low, high)), rand)
    out = kernel.interpret(**arguments)
    written = [arguments[p.name] for p in kernel.signature.parameters if p.spec is not None and p.spec.inout]
    got = [*(() if out is None else out if isinstance(out, tuple) else (out,)), *written]
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        compare(a, b, name in EXACT)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_lowered_kernels_mean_the_same(name: str, target: str) -> None:
    """What a target emits from, printed and parsed back, in the interpreter."""
    kernel, arguments, expected = CASES[name](lambda low, high: min(high, low + 5), torch.Generator().manual_seed(1))
    bound = kernel.signature.bind((), arguments)
    env = kernel.signature.bind_dims(bound)
    traced = kernel.trace(kernel.signature.specialise(bound))
    try:
        lowered = lower(traced, env, target).kernel
    except LoweringError as refusal:
        assert target == "ascend"
        pytest.skip(f"refused: {str(refusal).splitlines()[0]}")
    got = interpret.run(parse_kernel(print_kernel(lowered)), bound, env)
    for a, b in zip((*got, *(bound[p.value.name] for p in lowered.params if p.inout)), expected):
        compare(a, b, name in EXACT)
