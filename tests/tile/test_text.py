"""The text form of Tile IR: every kernel of the zoo at every stage of every lowering, hand-made oddities, errors."""

import ast
import math
from dataclasses import replace

import pytest
import torch

from tests.tile import zoo_data  # noqa: F401 (adds its cases)
from tests.tile.zoo import CASES
from tilery import tile
from tilery.tile import Dim, Tensor, bf16, f32, i32
from tilery.tile.errors import Loc, LoweringError, ParseError, TileError
from tilery.tile.ir import Block, Kernel, Op, Output, Param, Region, Span, TensorType, TileType, Value
from tilery.tile.lowering import TARGETS, lower
from tilery.tile.size import as_size
from tilery.tile.text import canonical, diff_stages, parse_kernel, print_kernel

N = Dim("N", min=1, max=4096, multiple_of=8)


def traced(name: str) -> tuple[Kernel, dict[str, int]]:
    kernel, arguments, _ = CASES[name](lambda low, high: min(high, low + 3), torch.Generator().manual_seed(0))
    bound = kernel.signature.bind((), arguments)
    return kernel.trace(kernel.signature.specialise(bound)), kernel.signature.bind_dims(bound)


def round_trip(kernel: Kernel) -> str:
    text = print_kernel(kernel)
    ast.parse(text)
    parsed = parse_kernel(text)
    assert parsed == canonical(kernel)
    assert print_kernel(parsed) == print_kernel(kernel, source=False)
    return text


@pytest.mark.parametrize("name", CASES)
def test_round_trip_of_every_stage(name: str) -> None:
    kernel, env = traced(name)
    round_trip(kernel)
    assert canonical(canonical(kernel)) == canonical(kernel)
    for target in TARGETS:
        try:
            stages = lower(kernel, env, target).stages
        except LoweringError:
            assert target == "ascend"  # which refuses what triton-ascend does not lower
            continue
        for _, stage in stages:
            round_trip(stage)


@tile.kernel
def double(x: Tensor[N, bf16], gain: float):
    y = tile.empty([N], f32)
    for n in tile.parallel(tile.blocks(N, "n")):
        y[n] = x[n].to(f32) * gain
    return y


def double_ir() -> Kernel:
    return double.trace(double.signature.specialise({"x": torch.zeros(8).bfloat16(), "gain": 1.0}))


def test_the_text() -> None:
    text = print_kernel(double_ir(), source=False)
    assert text == (
        'N = Dim("N", min=1, max=4096, multiple_of=8)\n'
        "\n"
        '@kernel(stage="trace")\n'
        "def double(x: Tensor[N, bf16], gain: f32):\n"
        "    y: Tensor[N, f32] = empty()\n"
        "    v_0: i32 = size(N)\n"
        '    for n in parallel(block(0, v_0, "n")):\n'
        "        v_1: bf16[B.n] = load(x, [span(n, B.n)], other=0)\n"
        "        v_2: f32[B.n] = cast(v_1, dtype=f32)\n"
        "        v_3: f32[B.n] = mul(v_2, gain)\n"
        "        store(y, [span(n, B.n)], v_3)\n"
        "    return y\n"
    )
    assert str(double_ir()) == print_kernel(double_ir())


def test_source_lines_are_comments() -> None:
    lines = print_kernel(double_ir()).splitlines()
    where = double.function.__code__.co_firstlineno
    assert f'size(N)  # test_text.py:{where + 3}: for n in tile.parallel(tile.blocks(N, "n")):' in lines[5]
    assert lines[7].endswith(f"# test_text.py:{where + 4}: y[n] = x[n].to(f32) * gain")
    assert "#" not in lines[8]  # the same line again


def value(id: int, kind: object, name: str = "") -> Value:
    return Value(id, kind, name)  # type: ignore[arg-type]


def test_oddities_survive() -> None:
    """Literals, names and attributes that tracing seldom gives."""
    size, block = as_size(N), Block("k")
    x = value(3, TensorType(f32, (size // 3 + 1, size * size - 2), (size, as_size(1)), as_size(7)), "for")
    y = value(9, TensorType(i32, ()), "y")
    a, b, c = value(20, TileType(f32, (block, as_size(4))), "y"), value(21, TileType(f32, (block, as_size(4)))), 22
    flag, index = value(c, TileType(tile.b1)), value(30, TileType(i32), "lambda")
    body = (
        Op("load", (x, -1, index, True), (("index", ("at", Span(block, 2))), ("masked", True), ("other", -math.inf))),
        Op("mul", (math.nan, -0.0), (("zeta", (1, 2.0, None, "a'\"b", (f32, size), {"k": 64})), ("alpha", True)), (a,)),
        Op("split", (a,), (), (b, flag)),
        Op("fused", (), (("kind", "a\\b"), ("scale", 1e-300), ("big", 1 << 62), ("of", (TileType(f32, (block,)),)))),
        Op(
            "for", (0, 4, 1, b), (("kind", "range"), ("label", "loop0")), (value(41, b.type),),
            (Region((value(42, TileType(i32)), value(43, b.type)), (), (b,)),),
        ),
        Op(
            "if", (True,), (), (value(50, TileType(i32)),),
            (Region((), (), (1,)), Region((), (Op("tap", (a,), (("name", "t"),)),), (math.inf,))),
        ),
        Op("if", (flag,), (), (), (Region((), ()), Region((), ()))),
        Op("store", (y, value(50, TileType(i32))), (("index", ()), ("unchecked", True))),
    )  # fmt: skip
    grid = Op(
        "parallel", (0, 4, 0, index), (("axes", (("block", "k"), ("scalar", "s"))), ("steps", {"k": 64})), (),
        (Region((value(60, TileType(i32), "k"), value(61, TileType(i32), "k")), body),),
    )  # fmt: skip
    kernel = Kernel(
        "odd", (Param(x, True), Param(index)), (Output(y, math.inf),), (grid,), (y, y), (N,), (("k", 64),), "padded"
    )
    text = round_trip(kernel)
    assert '@kernel(stage="padded", blocks={"k": 64})' in text
    assert "InOut[(8 * (N // 8)) // 3" in text or "InOut[" in text
    assert 'float("nan"), -0.0' in text
    assert "return y, y" in text


def test_negative_zero_and_number_kinds_are_kept() -> None:
    out = value(1, TensorType(f32, ()), "y")
    numbers = (-0.0, 0, 0.0, False, True, 1, 1.0, math.nan, -math.inf)
    kernel = Kernel("k", (), (Output(out),), tuple(Op("tap", (n,), (("name", "t"),)) for n in numbers), (out,))
    parsed = parse_kernel(print_kernel(kernel))
    assert [repr(op.operands[0]) for op in parsed.body] == [repr(n) for n in numbers]


def test_a_broken_kernel_is_refused() -> None:
    out, lost = value(1, TensorType(f32, ()), "y"), value(7, TileType(f32), "lost")
    kernel = Kernel("k", (), (Output(out),), (Op("store", (out, lost), (("index", ()),)),), (out,))
    with pytest.raises(TileError, match=r"value 'lost' \(id 7\) is used where nothing defines it"):
        print_kernel(kernel)
    with pytest.raises(TileError, match="an attribute of type object has no text form"):
        print_kernel(replace(kernel, body=(Op("tap", (), (("name", object()),)),)))
    region = Region((value(8, TileType(i32)), value(9, TileType(i32))), (), (0.0,))
    loop = Op("for", (0, 1, 1, 0.0), (("label", "a"),), (value(10, TileType(f32)),), (region,), Loc("here.py", 3))
    with pytest.raises(TileError, match=r"here.py:3: the loop 'a' carries other types than it gives"):
        print_kernel(replace(kernel, body=(loop,)))


def test_diff_of_stages() -> None:
    kernel = double_ir()
    assert diff_stages(kernel, kernel) == ""
    diff = diff_stages(kernel, lower(kernel, {"N": 64}, "triton").kernel)
    lines = diff.splitlines()
    assert lines[:2] == ["--- double (trace)", "+++ double (padded)"]
    assert '-@kernel(stage="trace")' in lines
    assert '+@kernel(stage="padded")' in lines


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("return y", "return y +", "line 12: expected Python, got return y +"),
        ("N = Dim(", "N = Dam(", 'line 1: expected a dimension such as T = Dim("T"), got N = Dam('),
        ("multiple_of=8", "modulo=8", "line 1: expected Dim(name, min=..., max=..., multiple_of=...), got N = Dim("),
        ('@kernel(stage="trace")\n', "\n", "line 4: expected the decorator @kernel(stage=...), got def double("),
        ("gain: f32", "gain", "line 4: expected a parameter with a type, got gain"),
        ("gain: f32", "gain: f31", "line 4: expected a dtype (b1, i8, u8, "),
        ("y: Tensor[N, f32]", "y: Tensor[M, f32]", "line 5: expected a size made of numbers and N, got M"),
        ("block(0, v_0, ", "blok(0, v_0, ", "line 7: expected block(start, stop, label) or index(start, stop, label)"),
        ("in parallel(", "in parallels(", "line 7: expected for ... in parallel(...) or for ... in loop("),
        ("mul(v_2, gain)", "mul(v_9, gain)", "line 10: expected a value that is defined above, got v_9"),
        ("mul(v_2, gain)", "mul('a', gain)", "line 10: expected a value or a number, got 'a'"),
        ("v_3: f32", "v_2: f32", "line 10: expected a name that is not defined yet ('v_2' is)"),
        ("v_3: f32[B.n] = mul(", "v_3, w = mul(", "line 10: expected types=(...) where several values are assigned"),
        ("[span(n, B.n)], v_3", "[n], v_3", "line 11: expected at(i), gather(tile) or span(start, extent), got n"),
        ("[span(n, B.n)], v_3)", "[span(n, B.n)])", "line 11: expected store(tensor, [index...], value), got store("),
        ("store(y", "y += (y", "line 11: expected an operation such as v: f32[8] = add(a, b), got y += "),
        ("dtype=f32)", "dtype=~1)", "line 9: expected a literal, a dtype, a size or a tuple of them, got ~1"),
    ],
)
def test_parse_errors(old: str, new: str, message: str) -> None:
    text = print_kernel(double_ir(), source=False)
    assert old in text
    with pytest.raises(ParseError) as caught:
        parse_kernel(text.replace(old, new))
    assert message in str(caught.value)


def test_parse_errors_of_several_results() -> None:
    text = print_kernel(traced("join_and_split")[0], source=False)
    (line,) = [n for n, row in enumerate(text.splitlines(), 1) if " = split(" in row]
    at = text.index("types=(") + len("types=(")
    with pytest.raises(ParseError, match=rf"line {line}: expected types=\(...\) of the 2 results, got "):
        parse_kernel(text[:at] + "i32, " + text[at:])


def test_parse_errors_of_loops() -> None:
    kernel, _ = traced("carried_values")
    text = print_kernel(kernel, source=False)
    for old, new, message in (
        ("out=(low_", "out=(x, low_", "expected as many types as names in out (3)"),
        ("types=(i32[4], i32[4])", "types=(i32[4])", "expected a tuple of tile types such as (f32[8], i32)"),
        ("types=(i32[4], i32[4])", "kind=1", "expected 3 loop names"),
    ):
        with pytest.raises(ParseError) as caught:
            parse_kernel(text.replace(old, new))
        assert message.replace("3 loop", "1 loop") in str(caught.value)
    with pytest.raises(ParseError, match="expected one function decorated with @kernel"):
        parse_kernel("")
