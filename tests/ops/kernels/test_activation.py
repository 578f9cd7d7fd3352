"""SwiGLU kernels: rounding once, and the masked layout."""

import pytest
import torch

from tests.ops.kernels.support import close, gen
from tilery.ops import elementwise
from tilery.ops.kernels import activation
from tilery.tile.errors import LaunchError


@pytest.mark.parametrize("rows", [1, 7, 17])
@pytest.mark.parametrize("width", [1, 5, 64])
def test_swiglu_of_any_size(rows, width):
    x = torch.randn(rows, 2 * width, generator=gen(rows))
    close(activation.swiglu.interpret(x), elementwise.swiglu(x))


def test_masked_rows_stay_as_they_are():
    arguments = activation.swiglu_quant_masked.arguments("uneven_counts")
    activation.swiglu_quant_masked.interpret(**arguments)
    for expert, count in enumerate(arguments["counts"].tolist()):
        assert (arguments["s"][expert, count:] == -1.0).all()
        assert (arguments["s"][expert, :count] > 0.0).all()
        assert (arguments["q"][expert, count:].float() == 0.0).all()


def test_halves_of_whole_groups():
    with pytest.raises(LaunchError, match=r"gate_up.shape\[1\] must be 2 \* J with J a multiple of 128, got 200"):
        activation.swiglu_quant.interpret(torch.zeros(2, 200))
