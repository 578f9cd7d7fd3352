"""Kernels under torch.compile, fake tensors and functionalisation: one registered operator per specialisation."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.tile.runtime_kernels import T, clear, norm, norm_reference, scale
from tilery import tile
from tilery.tile import Static, Tensor, f32, torchop
from tilery.tile.errors import LaunchError


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def specialisation(kernel, *args):
    bound = kernel.signature.bind(args, {})
    return kernel.signature.specialise(bound)


def test_one_graph_serves_dynamic_sizes() -> None:
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend, dynamic=True)
    def step(x, w):
        return norm(x * 2, w) + 1

    w = torch.ones(32)
    with torch.no_grad():
        for rows in (4, 7, 12):
            x = torch.randn(rows, 32)
            torch.testing.assert_close(step(x, w), norm_reference(x * 2, w) + 1, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1
    assert any("tilery" in str(node.target) for node in graphs[0].graph.nodes)


def test_mutation_optional_static_and_scalars_through_functionalisation() -> None:
    def step(x, r, n):
        x = x.clone()
        y, z = scale(x, r, n, k=3)
        return x, y, z

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, r, n in ((5, None, 7), (3, torch.ones(3), 8), (6, torch.ones(6), 8)):
        x = torch.randn(rows)
        for a, b in zip(compiled(x, r, n), step(x, r, n)):
            torch.testing.assert_close(a, b)


def test_a_kernel_that_returns_nothing_is_traced() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x):
        y = x + 1
        assert clear(y) is None
        return y

    assert step(torch.ones(3)).tolist() == [0, 0, 0]


def test_a_dtype_may_be_static() -> None:
    @tile.kernel
    def convert(x: Tensor[T, f32], to: Static[tile.dtypes.DType]):
        y = tile.empty([T], to)
        for t in tile.parallel(tile.blocks(T)):
            y[t] = x[t].to(to)
        return y

    compiled = torch.compile(lambda x: convert(x, tile.bf16) * 2, fullgraph=True, backend="aot_eager")
    assert compiled(torch.ones(3)).dtype == torch.bfloat16


def test_opcheck() -> None:
    x, w = torch.randn(4, 32), torch.ones(32)
    torch.library.opcheck(torchop.operator(norm, specialisation(norm, x, w)), (x, w, 1e-6))
    y = torch.randn(5)
    torch.library.opcheck(torchop.operator(scale, specialisation(scale, y, y, 1)), (y.clone(), y, 3))


def test_the_schema_says_what_changes() -> None:
    x = torch.ones(2)
    assert torchop.schema(scale, specialisation(scale, x, None, 1)) == "(Tensor(a0!) x, SymInt n) -> (Tensor, Tensor)"
    assert torchop.schema(clear, specialisation(clear, x)) == "(Tensor(a0!) x) -> ()"
    x = torch.ones(2, 16)
    assert torchop.schema(norm, specialisation(norm, x, x[0])) == "(Tensor x, Tensor w, float eps) -> Tensor"


def test_fake_tensors_give_shapes_and_the_checks_still_speak() -> None:
    with FakeTensorMode() as mode:
        out = norm(torch.empty(5, 32), torch.empty(32))
        assert (out.shape, out.dtype) == ((5, 32), torch.float32)
    fake = mode.from_tensor(torch.empty(5, 32))
    assert norm(fake, mode.from_tensor(torch.empty(32))).shape == (5, 32)
    with pytest.raises(LaunchError, match=r"norm: w.shape\[0\] is H = 16, but x.shape\[1\] says H = 32"):
        norm(fake, mode.from_tensor(torch.empty(16)))
    with pytest.raises(LaunchError, match="norm: out= does not work on FakeTensor; take what the call returns"):
        norm(fake, mode.from_tensor(torch.empty(32)), out=fake)


def test_a_compiled_call_with_gradients_says_so() -> None:
    x, w = torch.randn(3, 32, requires_grad=True), torch.ones(32)
    with pytest.raises(LaunchError, match="norm: x requires grad, and kernels have no gradient"):
        torchop.operator(norm, specialisation(norm, x, w))(x, w, 1e-6)


def test_a_call_can_be_captured_by_make_fx() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    x, w = torch.randn(3, 32), torch.ones(32)
    graph = make_fx(lambda x: norm(x, w))(x)
    assert any("tilery" in str(node.target) for node in graph.graph.nodes)
    torch.testing.assert_close(graph(x + 1), norm(x + 1, w))
