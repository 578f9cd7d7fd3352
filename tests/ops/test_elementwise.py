"""Norms, activation, rotary embeddings and products against formulas written out."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.support import FEW, close, draw, dtypes, implementations, seeds


@FEW
@given(seeds, st.integers(1, 5), st.integers(1, 70), dtypes, st.floats(1e-8, 1.0))
def test_rms_norm(seed, tokens, hidden, dtype, eps):
    normal = draw(seed)
    x, weight = normal(tokens, hidden, dtype=dtype), normal(hidden, dtype=dtype)
    y = x.double()
    expected = (y / (y.square().mean(1, keepdim=True) + eps).sqrt() * weight.double()).to(dtype)
    for function in implementations("rms_norm"):
        before = x.clone()
        got = function(x, weight, eps)
        assert got.dtype == dtype
        close(got, expected, dtype)
        assert torch.equal(x, before), "the input stays as it is"


@FEW
@given(seeds, st.integers(1, 5), st.integers(2, 70), dtypes)
def test_layer_norm(seed, tokens, hidden, dtype):
    normal = draw(seed)
    x, weight, bias = normal(tokens, hidden, dtype=dtype), normal(hidden), normal(hidden)
    y = x.double()
    expected = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
    expected = (expected * weight.double() + bias.double()).to(dtype)
    for function in implementations("layer_norm"):
        close(function(x, weight, bias, 1e-6), expected, torch.bfloat16 if hidden < 4 else dtype)


@FEW
@given(seeds, st.integers(1, 5), st.integers(1, 40), dtypes)
def test_swiglu(seed, tokens, width, dtype):
    x = draw(seed)(tokens, 2 * width, dtype=dtype)
    gate, up = x[:, :width].double(), x[:, width:].double()
    for function in implementations("swiglu"):
        before = x.clone()
        close(function(x), (gate * torch.sigmoid(gate) * up).to(dtype), dtype)
        assert torch.equal(x, before)


def rotation(seed, tokens, pairs):
    angle = draw(seed + 1)(tokens, pairs) * 3
    return angle.cos(), angle.sin(), torch.polar(torch.ones_like(angle), angle)


@FEW
@given(seeds, st.integers(1, 5), st.integers(0, 4), st.integers(1, 16), dtypes)
def test_rope_against_complex_multiplication(seed, tokens, heads, pairs, dtype):
    shape = (tokens, heads, 2 * pairs) if heads else (tokens, 2 * pairs)
    x = draw(seed)(*shape, dtype=dtype)
    cos, sin, turn = rotation(seed, tokens, pairs)
    turn = turn[:, None] if heads else turn
    y = x.float()
    interleaved = torch.complex(y[..., 0::2], y[..., 1::2]) * turn
    half_split = torch.complex(y[..., :pairs], y[..., pairs:]) * turn
    for function in implementations("rope_interleaved"):
        got = function(x, cos, sin)
        assert got.dtype == dtype
        close(got[..., 0::2], interleaved.real.to(dtype), dtype)
        close(got[..., 1::2], interleaved.imag.to(dtype), dtype)
    for function in implementations("rope_half_split"):
        close(function(x, cos, sin), torch.cat((half_split.real, half_split.imag), -1).to(dtype), dtype)


@FEW
@given(seeds, st.integers(1, 16))
def test_rotated_dot_products_depend_on_the_distance_only(seed, pairs):
    normal = draw(seed)
    q, k, frequency = normal(1, 2 * pairs), normal(1, 2 * pairs), normal(pairs)
    for name in ("rope_interleaved", "rope_half_split"):
        for function in implementations(name):

            def at(x, position, function=function):
                angle = (position * frequency)[None]
                return function(x, angle.cos(), angle.sin())

            near, far = at(q, 7) @ at(k, 3).T, at(q, 19) @ at(k, 15).T
            torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)


@FEW
@given(seeds, st.integers(1, 5), st.integers(1, 20), st.integers(1, 20), st.integers(1, 4), dtypes)
def test_linear_and_heads_linear(seed, tokens, inputs, outputs, heads, dtype):
    normal = draw(seed)
    x, weight = normal(tokens, inputs, dtype=dtype), normal(outputs, inputs, dtype=dtype)
    for function in implementations("linear"):
        close(function(x, weight), (x.double() @ weight.double().T).to(dtype), dtype)
    x, weight = normal(tokens, heads, inputs, dtype=dtype), normal(heads, outputs + 2, inputs, dtype=dtype)
    weight = weight[:, 1:-1]  # rows of a wider matrix
    expected = torch.stack([x[:, n].double() @ weight[n].double().T for n in range(heads)], 1).to(dtype)
    for function in implementations("heads_linear"):
        close(function(x, weight), expected, dtype)
    x = normal(tokens, heads, outputs, dtype=dtype)
    expected = torch.stack([x[:, n].double() @ weight[n].double() for n in range(heads)], 1).to(dtype)
    for function in implementations("heads_absorb"):
        wider = torch.full((tokens, heads, inputs + 3), 7.0, dtype=dtype)
        function(x, weight, wider[:, :, 1 : inputs + 1])
        close(wider[:, :, 1 : inputs + 1], expected, dtype)
        assert (wider[:, :, 0] == 7).all()
        assert (wider[:, :, inputs + 1 :] == 7).all()
