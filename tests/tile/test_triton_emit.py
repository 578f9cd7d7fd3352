"""The emitted source: its form, what it is specialised on, what Triton cannot express, the whole zoo of kernels."""

import textwrap

import pytest
import torch

from tests.tile.zoo import CASES
from tilery import tile
from tilery.tile import Dim, OpDef, Tensor, bf16, e4m3, f32, i16, i32
from tilery.tile.errors import LoweringError
from tilery.tile.ir import TileType
from tilery.tile.lowering import lower
from tilery.tile.ops import OPS
from tilery.tile.schedule import Schedule
from tilery.tile.targets.triton import Plan, Spec, emit, run_interpreted, spec_of
from tilery.tile.targets.triton.text import atom, bare, convert, is_atom, literal

T, H, N = Dim("T"), Dim("H", multiple_of=128), Dim("N")


def lowered(kernel, *args, schedule=None):
    bound = kernel.signature.bind(args, {})
    ir = kernel.trace(kernel.signature.specialise(bound))
    return lower(ir, kernel.signature.bind_dims(bound), "triton", schedule)


def source_of(kernel, *args, schedule=None, spec=None):
    low = lowered(kernel, *args, schedule=schedule)
    return emit(low.kernel, low.schedule, spec)


@tile.kernel
def norm(x: Tensor[T, H, bf16], w: Tensor[H, bf16], eps: float):
    y = tile.empty([T, H], e4m3)
    for t in tile.parallel(tile.blocks(T, "row")):
        v = x[t, :].to(f32)
        v = v * tile.rsqrt(tile.mean(v * v, axis=1, keepdims=True) + eps) * w[:].to(f32)
        y[t, :] = v.to(e4m3)
    return y


NORM = (torch.zeros(5, 128).bfloat16(), torch.zeros(128).bfloat16(), 1e-6)


def test_source():
    """A golden text: the user's names and lines, masks only where a block may be ragged, implicit broadcasts."""
    expected = """\
        # norm: emitted by tilery.tile; edit the kernel, not this file.
        # specialisation: wide x

        import triton
        import triton.language as tl


        @triton.jit
        def norm(x, w, y, T, eps):
            i4 = tl.arange(0, 4)
            i128 = tl.arange(0, 128)
            row = tl.program_id(0) * 4  # for t in tile.parallel(tile.blocks(T, "row")):
        """
    schedule = Schedule({"row": 4}, warps=2, evict={"x": "first"})
    emitted = source_of(norm, *NORM, schedule=schedule, spec=Spec(wide=frozenset("x")))
    lines = [line for line in emitted.source.splitlines() if not line.startswith("# schedule: ")]
    assert "\n".join(lines).startswith(textwrap.dedent(expected).rstrip("\n"))
    load = next(line for line in lines if "tl.load(x" in line)
    assert "tl.load(x + (tl.cast(row, tl.int64) * 128) + (i4[:, None] * 128 + i128[None, :]), mask=" in load
    assert 'other=0.0, eviction_policy="evict_first")' in load
    assert "((row + i4) < T)[:, None]" in emitted.source
    assert "broadcast_to" not in emitted.source
    assert [(a.name, a.type, a.divisible) for a in emitted.plan.arguments] == [
        ("x", "*bf16", True), ("w", "*bf16", True), ("y", "*fp8e4nv", True),
        ("T", "i32", False), ("eps", "fp32", False),
    ]  # fmt: skip
    assert "#" not in emitted.code
    compile(emitted.source, "kernel", "exec")


def test_plan_goes_through_json():
    plan = source_of(norm, *NORM).plan
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.grid_size({"T": 100, "H": 128}, {"eps": 1e-6}) == -(-100 // lowered(norm, *NORM).schedule["row"])
    assert plan.grid_size({"T": 0, "H": 128}, {}) == 0


def test_comments_and_places_do_not_change_the_code():
    @tile.kernel
    def double(x: Tensor[N, f32]):
        y = tile.empty([N], f32)
        for i in tile.parallel(tile.blocks(N, "i")):
            y[i] = x[i] * 2
        return y

    first = source_of(double, torch.zeros(4))

    @tile.kernel
    def double(x: Tensor[N, f32]):
        y = tile.empty([N], f32)
        for i in tile.parallel(tile.blocks(N, "i")):
            y[i] = x[i] * 2  # a remark
        return y

    second = source_of(double, torch.zeros(4))
    assert first.source != second.source
    assert first.code == second.code


def test_persistent_and_pdl():
    text = source_of(norm, *NORM, schedule=Schedule({"row": 1}, persistent=2, pdl=True)).source
    assert "for tile_id in tl.range(tl.program_id(0), T, tl.num_programs(0)):" in text
    assert "from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait" in text
    assert text.index("gdc_wait()") < text.index("tile_id in") < text.index("gdc_launch_dependents()")


def test_carried_variables_keep_their_name():
    @tile.kernel
    def total(x: Tensor[T, N, f32]):
        y = tile.empty([T], f32)
        for t in tile.parallel(T):
            acc = tile.zeros([16], f32)
            for n in tile.range(0, N, 16):
                acc = acc + x[t, tile.span(n, 16)]
            y[t] = tile.sum(acc)
        return y

    text = source_of(total, torch.zeros(2, 40)).source
    assert "    acc = tl.full([16], 0.0, tl.float32)" in text
    assert "        acc = acc + " in text


def test_spec_of_a_call():
    bound = norm.signature.bind((torch.zeros(32, 256).bfloat16()[:, :128], NORM[1], 1e-6), {})
    low = lowered(norm, *bound.values())
    spec = spec_of(low.kernel, bound, {"T": 32, "H": 128})
    assert spec == Spec(strided=frozenset("x"), divisible=frozenset({"T", "H", "x.0"}))
    arguments = {a.name: a for a in emit(low.kernel, low.schedule, spec).plan.arguments}
    assert arguments["x_stride0"].divisible
    assert arguments["T"].divisible
    odd = torch.zeros(129).bfloat16()[1:]
    assert spec_of(low.kernel, {**bound, "w": odd}, {"T": 5, "H": 128}).unaligned == frozenset("w")


@pytest.mark.parametrize("name", CASES)
def test_zoo(name):
    pytest.importorskip("triton")
    for seed in (1, 2):
        rand = torch.Generator().manual_seed(seed)
        kernel, arguments, expected = CASES[name](
            lambda low, high, rand=rand: int(torch.randint(low, high + 1, (), generator=rand)), rand
        )
        bound = kernel.signature.bind((), arguments)
        low = lowered(kernel, *bound.values())
        got = run_interpreted(low, bound, kernel.signature.bind_dims(bound))
        written = [bound[p.value.name] for p in low.kernel.params if p.inout]
        expected = expected if isinstance(expected, tuple) else (expected,)
        assert len(expected) == len(got) + len(written)
        for a, b in zip((*got, *written), expected):
            assert a.dtype == b.dtype
            rtol = 1e-5 if a.element_size() >= 4 else 1e-2
            torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=rtol * 10, equal_nan=True)


def test_errors():
    with pytest.raises(LoweringError, match="emits from the stage 'padded', got 'bound'"):
        emit(lowered(norm, *NORM).stage("bound"), Schedule())

    @tile.kernel
    def small(x: Tensor[N, i16]):
        y = tile.empty([4], i16, init=0)
        for i in tile.parallel(N):
            y.atomic_add(0, x[i])
        return y

    with pytest.raises(
        LoweringError, match=r"atomic add on i16: this target has it for i32, i64, f16.*keep the counter"
    ):
        source_of(small, torch.zeros(3, dtype=torch.int16))

    @tile.kernel
    def unknown(x: Tensor[1, i32], z: Tensor[N, f32]):
        y = tile.empty([N], f32, init=0)
        for i in tile.parallel(x[0]):
            y[i] = z[i]
        return y

    arguments = (torch.tensor([3], dtype=torch.int32), torch.ones(5))
    with pytest.raises(LoweringError, match=r"bound of the parallel axis 'axis0' is read from memory.*guard the body"):
        source_of(unknown, *arguments)


def test_a_persistent_kernel_may_read_its_bounds():
    pytest.importorskip("triton")

    @tile.kernel
    def unknown(x: Tensor[1, i32], z: Tensor[N, f32]):
        y = tile.empty([N], f32, init=0)
        for i in tile.parallel(x[0]):
            y[i] = z[i]
        return y

    arguments = (torch.tensor([3], dtype=torch.int32), torch.ones(5))
    bound = unknown.signature.bind(arguments, {})
    low = lowered(unknown, *arguments, schedule=Schedule(persistent=1))
    assert run_interpreted(low, bound, {"N": 5})[0].tolist() == [1, 1, 1, 0, 0]


def test_operation_without_a_triton_form():
    def infer(types, attrs):
        return (TileType(types[0].dtype, types[0].shape),)

    name = "nowhere"
    tile.register_op(OpDef(name, infer, torch.neg, elementwise=True))
    try:

        @tile.kernel
        def strange(x: Tensor[N, f32]):
            y = tile.empty([N], f32)
            for i in tile.parallel(tile.blocks(N, "i")):
                y[i] = tile.elementwise(name, x[i])
            return y

        with pytest.raises(LoweringError, match="'nowhere' has no Triton form; give its OpDef a `triton` template"):
            source_of(strange, torch.zeros(3))
    finally:
        del OPS[name]


def test_text():
    assert [literal(v) for v in (1, -2.5, True, float("-inf"))] == ["1", "-2.5", "True", 'float("-inf")']
    assert literal(float("nan")) == 'float("nan")'
    assert [is_atom(t) for t in ("x", "f(a + b)", "(a + b)", "x[:, None].to(t)", "(a) + (b)", "-x", "a + b")] == [
        True, True, True, True, False, False, False,
    ]  # fmt: skip
    assert [bare(t) for t in ("(a + b)", "(a) + (b)", "((a))", "f(a)", "(a)[0]")] == [
        "a + b",
        "(a) + (b)",
        "a",
        "f(a)",
        "(a)[0]",
    ]
    assert atom("a + b") == "(a + b)"
    assert convert("x", bf16, e4m3, False) == "x.to(tl.float32).to(tl.float8e4nv)"
    assert convert("n", i32, f32, True) == "tl.cast(n, tl.float32)"
