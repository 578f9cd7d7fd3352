"""Graphs: tracing, edges, text, execution; always beside the plain run of the same function."""

from dataclasses import replace

import pytest
import torch

from tilery import tile
from tilery.tile import Dim, InOut, Static, Tensor, bf16, e4m3, f32, i32, u8
from tilery.tile.errors import LaunchError, ParseError, TileError, TraceError
from tilery.tile.graph import Call, View, graph, interpret_graph, view
from tilery.tile.graph_text import parse_graph, print_graph
from tilery.tile.kernel import Kernel

T, H, P, N = Dim("T"), Dim("H", multiple_of=128), Dim("P"), Dim("N")


@tile.kernel
def norm_quant(x: Tensor[T, H, (bf16, f32)], w: Tensor[H, bf16] | None = None, eps: float = 1e-6, pow2: bool = False):
    y, s = tile.empty([T, H], e4m3), tile.empty([T, H // 128], f32)
    for t in tile.parallel(tile.blocks(T, "row")):
        v = tile.lib.rms_norm(x[t, :], None if w is None else w[:], eps)
        q, scale = tile.lib.quantize_fp8(v.reshape(t.extent, H // 128, 128), pow2=pow2)
        y[t, :], s[t, :] = q.reshape(t.extent, H), scale
    return y, s


@tile.kernel
def dequant(y: Tensor[N, H, e4m3], s: Tensor[N, H // 128, f32]):
    x = tile.empty([N, H], f32)
    for n in tile.parallel(tile.blocks(N, "row")):
        x[n, :] = tile.lib.dequantize(y[n, :].reshape(n.extent, H // 128, 128), s[n, :]).reshape(n.extent, H)
    return x


@tile.kernel
def put(cache: InOut[P, Dim("W"), f32], x: Tensor[N, Dim("W"), f32], at: Tensor[N, i32], gain: float):
    for n in tile.parallel(tile.blocks(N, "row")):
        cache[at[n], :] = x[n, :] * gain


@tile.kernel
def total(x: Tensor[N, Dim("W"), f32]):
    y = tile.empty([N], f32)
    for n in tile.parallel(tile.blocks(N, "row")):
        y[n] = tile.sum(x[n, :], axis=1)
    return y


@graph
def round_trip(x: Tensor[T, H, (bf16, f32)], pow2: Static[bool] = True):
    y, s = norm_quant(x, pow2=pow2)
    return dequant(y, s)


@graph
def layer(x: Tensor[T, 256, bf16], cache: InOut[P, 656, u8], at: Tensor[T, i32], gain: float):
    """Writes 4 floats per row into packed rows, then 2 of them again."""
    back = round_trip(x)
    scales = view(cache, f32, [P_of(cache), 4], strides=[656 // 4, 1], offset=512 // 4)
    narrow = view(back, f32, [back.shape[0], 4], strides=[256, 1])
    before = total(scales)
    put(scales, narrow, at, gain)
    put(
        view(scales, f32, [P_of(cache), 2], strides=[164, 1]),
        view(back, f32, [back.shape[0], 2], strides=[256, 1]),
        at,
        2.0,
    )
    return before, total(scales), back


def P_of(cache):
    return cache.shape[0]


def arguments() -> dict[str, object]:
    cache = torch.zeros(6, 656, dtype=torch.uint8)
    return {"x": torch.randn(3, 256).bfloat16(), "cache": cache, "at": torch.tensor([4, 0, 2]).int(), "gain": 0.5}


def test_a_call_just_runs() -> None:
    given = arguments()
    before, after, back = layer(**given)
    assert before.eq(0).all()
    x = given["x"].float()
    v = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(back, v, rtol=0.07, atol=1e-3)
    rows = given["cache"].view(torch.float32)[:, 128:132]
    assert torch.equal(rows[[4, 0, 2]], back[:, :4] * torch.tensor([2.0, 2.0, 0.5, 0.5]))
    torch.testing.assert_close(after, rows.sum(1))


def test_trace_has_nodes_types_and_edges() -> None:
    traced = layer.trace()
    calls = [n.kernel.rsplit(".", 1)[-1] if isinstance(n, Call) else "view" for n in traced.nodes]
    assert calls == ["norm_quant", "dequant", "view", "view", "total", "put", "view", "view", "put", "total"]
    assert [str(v.type) for v in traced.nodes[0].results] == ["Tensor[T, 256, e4m3]", "Tensor[T, 2, f32]"]
    assert [str(p.type) for p in traced.params] == [
        "Tensor[T, 256, bf16]",
        "Tensor[P, 656, u8]",
        "Tensor[T, i32]",
        "f32",
    ]
    assert traced.nodes[0].key.statics == (("pow2", True),)
    assert traced.nodes[5].writes == ("cache",)
    assert traced.edges() == [
        (0, 1, "RAW", "y"),
        (0, 1, "RAW", "s"),
        (1, 5, "RAW", "x_1"),
        (4, 5, "WAR", "cache"),
        (5, 8, "RAW", "cache"),
        (1, 8, "RAW", "x_1"),
        (5, 8, "WAW", "cache"),
        (8, 9, "RAW", "cache"),
    ]


def test_the_interpreter_agrees_with_the_plain_run() -> None:
    one, two = arguments(), arguments()
    two["x"] = one["x"]
    plain, traced = layer(**one), layer.interpret(**two)
    assert all(map(torch.equal, plain, traced))
    assert torch.equal(one["cache"], two["cache"])


def test_text_round_trip() -> None:
    for traced in (layer.trace(), round_trip.trace(pow2=False)):
        text = print_graph(traced)
        assert parse_graph(text) == traced
        assert str(traced) == text
    text = print_graph(layer.trace())
    assert "    cache_1: Tensor[P, 4, f32, strides(164, 1), offset(128)] = view(cache)\n" in text
    assert "y, s = norm_quant(x=x, w=None, eps=1e-06, pow2=static(True), types=(Tensor[T, 256, e4m3], " in text
    assert "put(cache=inout(cache_1), x=x_2, at=at, gain=gain)\n" in text


def test_a_parsed_graph_runs() -> None:
    given = arguments()
    parsed = parse_graph(print_graph(layer.trace()))
    kernels: dict[str, Kernel] = {k.full_name: k for k in (norm_quant, dequant, put, total)}
    again = interpret_graph(parsed, {**given, "cache": given["cache"].clone()}, kernels)
    assert all(map(torch.equal, layer(**given), again))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("x=x, w=None", "x=z, w=None", "line 9: expected a tensor that is defined above, got z"),
        ("= norm_quant(", "= normal(", "line 9: expected one of the kernels norm_quant, dequant, got y, s = normal("),
        ("return x_1", "return x_9", "line 11: expected a tensor that is defined above, got x_9"),
        ("def round_trip(", "def round_trip(:", "line 8: expected Python, got"),
    ],
)
def test_parse_errors(old: str, new: str, message: str) -> None:
    text = print_graph(round_trip.trace())
    assert old in text, text
    with pytest.raises(ParseError) as caught:
        parse_graph(text.replace(old, new))
    assert message in str(caught.value)


def test_static_values_need_a_text_form() -> None:
    @tile.kernel
    def apply(x: Tensor[N, f32], f: Static[object]):
        y = tile.empty([N], f32)
        for n in tile.parallel(tile.blocks(N, "n")):
            y[n] = f(x[n])
        return y

    @graph
    def relu(x: Tensor[N, f32]):
        return apply(x, tile.lib.relu)

    assert torch.equal(relu.interpret(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))
    with pytest.raises(TileError, match="an attribute of type function has no text form"):
        print_graph(relu.trace())


# --- errors -----------------------------------------------------------------------------------------------------


def refused(function, message: str, kind: type[Exception] = TraceError) -> None:
    with pytest.raises(kind) as caught:
        graph(function).trace()
    assert message in str(caught.value)


def test_shapes_must_fit() -> None:
    def unknown_multiple(x: Tensor[T, N, bf16]):
        return norm_quant(x)

    refused(
        unknown_multiple, "norm_quant: x.shape[1] must be a multiple of 128, which N is not known to be; declare its"
    )

    def differ(y: Tensor[T, H, e4m3], s: Tensor[N, H // 128, f32]):
        return dequant(y, s)

    refused(differ, "dequant: s.shape[0] is N = N, but dequant: y.shape[0] says N = T")

    def derived(y: Tensor[T, H, e4m3], s: Tensor[T, H, f32]):
        return dequant(y, s)

    refused(derived, "dequant: s.shape[1] must be (H // 128), got H")

    def rank(x: Tensor[T, f32]):
        return total(x)

    refused(rank, "total: x must have 2 dimensions [N, W], got x: Tensor[T, f32]")

    def dtype(x: Tensor[T, H, bf16]):
        return total(x)

    refused(dtype, "total: x must be Tensor[N, W, f32], got x: Tensor[T, H, bf16]")


def test_values_are_not_computed_in_a_graph() -> None:
    def compute(x: Tensor[T, H, f32]):
        return total(x * 2)

    refused(compute, "'x' has no value while the graph is traced: pass it to kernels and graphs, or use tile.view")

    def method(x: Tensor[T, H, f32]):
        return total(x.float())

    refused(method, "return total(x.float())")  # the user's line stands in the message

    def scalar(cache: InOut[P, 4, f32], x: Tensor[N, 4, f32], at: Tensor[N, i32]):
        put(cache, x, at, "much")

    refused(scalar, "put: gain must be a Python float, got 'much'")


def test_writes_need_inout() -> None:
    def writes(cache: Tensor[P, 4, f32], x: Tensor[N, 4, f32], at: Tensor[N, i32]):
        put(view(cache, f32, [cache.shape[0], 4]), x, at, 1.0)

    refused(writes, "graph 'writes': put writes the parameter 'cache'; annotate it InOut[...]")


def test_returns_and_statics() -> None:
    def returns(x: Tensor[T, H, f32]):
        return 3

    refused(returns, "graph 'returns' returns int; a graph returns tensors of its kernels")

    @graph
    def needs(x: Tensor[T, H, f32], k: Static[int]):
        return total(x)

    with pytest.raises(TraceError, match=r"the static parameter 'k' needs a value: trace\(k=...\)"):
        needs.trace()


def test_launch_errors_name_the_graph() -> None:
    with pytest.raises(
        LaunchError, match=r"round_trip: dimension H|round_trip: x.shape\[1\]: dimension H must be a multiple"
    ):
        round_trip(torch.randn(2, 100))


def test_views_share_memory() -> None:
    x = torch.zeros(4, 8, dtype=torch.uint8)
    view(x[1:], f32, [3], strides=[2], offset=1)[0] = 1.0
    assert x[1, 4:].tolist() == [0, 0, 128, 63]
    assert int(x.sum()) == 191
    traced = layer.trace()
    assert {n.source for n in traced.nodes if isinstance(n, View)} == {"cache", "cache_1", "x_1"}


def test_view_wants_a_tensor() -> None:
    with pytest.raises(
        TraceError, match=r"tile.view takes a torch tensor, or a tensor of the graph being traced; got int"
    ):
        view(3, f32, [1])


def test_check_finds_broken_graphs() -> None:
    traced = round_trip.trace()
    traced.check()
    for broken, message in (
        (replace(traced, params=()), "graph 'round_trip': 'x' is used before anything makes it"),
        (replace(traced, nodes=traced.nodes + traced.nodes[:1]), "graph 'round_trip': 'y' is made twice"),
        (replace(traced, returns=("z",)), "graph 'round_trip': it returns 'z', which nothing makes"),
    ):
        with pytest.raises(TraceError) as caught:
            broken.check()
        assert message == str(caught.value)
