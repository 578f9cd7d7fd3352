"""Every error of the language: its text, and that it names the user's own line."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from tilery import tile
from tilery.tile import Dim, InOut, Static, Tensor, bf16, e4m3, f32, i8, i32, lib
from tilery.tile.errors import LaunchError, Loc, TileError, TraceError
from tilery.tile.ir import TileType
from tilery.tile.ops import OPS, OpDef
from tilery.tile.ops import register as register_op
from tilery.tile.signature import Specialisation
from tilery.tile.size import as_size

T, K, H = Dim("T"), Dim("K"), Dim("H", min=128, max=1024, multiple_of=128)


def trace(kernel: tile.Kernel, *statics: object):
    """Traces with the first dtype of every annotation."""
    parameters = kernel.signature.parameters
    dtypes = tuple((p.name, p.spec.dtypes[0]) for p in parameters if p.spec)
    names = [p.name for p in parameters if p.kind == "static"]
    return kernel.trace(Specialisation(dtypes, tuple(zip(names, statics))))


# --- expressions ------------------------------------------------------------------------------------------------


@tile.kernel
def probe(x: Tensor[T, K, f32], n: Tensor[T, i32], q: Tensor[T, K, e4m3], y: InOut[T, K, f32], f: Static[object]):
    for t in tile.parallel(tile.blocks(T, "row")):
        k = SimpleNamespace(x=x, n=n, q=q, y=y, t=t, v=x[t, :], i=n[t], w=q[t, :], s=n[0], m=x[t, :] > 0)
        f(k)
        y[t, :] = 0.0


EXPRESSIONS = [
    # tiles
    (lambda k: k.v and k.v, "the truth of a tile is not known while tracing; use `if` on a scalar condition"),
    (lambda k: list(k.v), "a tile cannot be iterated; loop with tile.range or slice the tensor"),
    (lambda k: k.i.T, ".T needs a 2-D tile, got i32[B.row]; use .transpose(...)"),
    (lambda k: k.v[0], "a tile takes only `:` and `None` as index; slice the tensor it came from, or use tile.split"),
    (lambda k: k.v.transpose(0, 0), "transpose needs a permutation of 2 axes, got [0, 0]"),
    (lambda k: k.v.reshape(K, 3), "cannot reshape [B.row, K] to [K, 3]: the element counts differ"),
    (lambda k: k.v.broadcast_to(K, K), "cannot broadcast [B.row, K] to [K, K]"),
    (lambda k: k.v.bitcast(bf16), "bitcast needs equal widths, got f32 and bf16; to read memory as another dtype use"),
    (lambda k: k.v + k.i, "shapes [B.row, K] and [B.row] do not broadcast: axis -1 differs"),
    (lambda k: k.v + "a", "cannot compute with str 'a' inside a kernel"),
    (lambda k: k.w + k.w, "add of e4m3 and e4m3: FP8 has no arithmetic; cast with .to(f32) first"),
    (lambda k: k.w + k.v, "add of e4m3 and f32: FP8 has no arithmetic; cast with .to(f32) first"),
    (lambda k: -k.w, "neg of e4m3: cast with .to(f32) first"),
    (lambda k: tile.exp(k.i), "exp of i32: cast with .to(f32) first"),
    (lambda k: k.v & k.v, "bit_and of f32: it takes int operands"),
    (lambda k: k.i / k.i, "/ of integers: write // (toward zero), or cast one side with .to(f32)"),
    (lambda k: k.i.to(i8) + 300, "the literal 300 does not fit in i8; cast the tile to a wider type first"),
    # functions
    (lambda k: tile.where(True, k.v, 0), "where: the condition is a Python constant; use a Python `if`"),
    (lambda k: tile.where(k.i, k.v, 0), "where: the condition must be bool, got i32; compare first, for example x > 0"),
    (lambda k: tile.sum(3), "sum needs a tile, got int"),
    (lambda k: tile.sum(k.v, axis=2), "sum over axis 2 of f32[B.row, K]: it has 2 axes"),
    (lambda k: tile.argmax(k.v), "argmax of a 2-D tile needs an axis"),
    (lambda k: tile.any(k.v, 0), "any needs a bool tile, got f32[B.row, K]"),
    (lambda k: tile.max(k.m, 0), "max of b1: cast first, with .to(i32) or .to(f32)"),
    (lambda k: tile.take(k.v, k.i), "take along axis 1: i32[B.row] does not match f32[B.row, K] on the other axes"),
    (lambda k: tile.histogram(k.v, 8), "histogram needs a 1-D tile of integers, got f32[B.row, K]"),
    (lambda k: tile.join(k.v, k.i), "join needs two tiles of one type, got f32[B.row, K] and i32[B.row]"),
    (lambda k: tile.split(k.v), "split needs a last axis of 2, got f32[B.row, K]; reshape to [..., 2] first"),
    (lambda k: tile.dot(k.i, k.v), "dot needs 2-D tiles [M, K] and [K, N], got i32[B.row] and f32[B.row, K]"),
    (lambda k: tile.dot(k.v, k.v), "dot: the inner extents differ: f32[B.row, K] and f32[B.row, K]; transpose one"),
    (lambda k: tile.dot(k.v, k.w.T), "dot takes two tiles of one of f32, f16, bf16, e4m3, e5m2, i8; got f32 and e4m3"),
    (lambda k: tile.dot(k.v, k.v.T, k.v), "dot: the accumulator must be f32[B.row, B.row], got f32[B.row, K]"),
    (lambda k: tile.dot(k.v, k.v.T, precision="half"), "dot: precision must be 'ieee', 'tf32' or 'fp8', got 'half'"),
    (lambda k: tile.empty([T], f32), "tile.empty makes memory and belongs before the loops; for a value on chip use"),
    (lambda k: tile.full([T], 1.5, "f32"), "expected a dtype of the tile language such as tile.f32, got 'f32'"),
    (lambda k: k.v.to(torch.float32), "expected a dtype of the tile language such as tile.f32, got torch.float32"),
    (lambda k: tile.arange("a"), "expected a size (an int, a Dim or arithmetic of them), got str 'a'"),
    (lambda k: tile.span(0, k.s), "expected a size (an int, a Dim or arithmetic of them), got Tile i32"),
    # memory
    (lambda k: k.x[0, 0, 0], "3 indices for a tensor of 2 dimensions [T, K]"),
    (lambda k: k.x[k.v, 0], "a gather index must be a tile of integers"),
    (lambda k: k.x[0.5, 0], "expected an integer, a dimension or a scalar, got float"),
    (lambda k: k.x[0, :: k.s], "a slice's step must be a positive Python int"),
    (lambda k: k.x[0, k.s :], "a slice with a computed start: write tile.span(start, size) so that its size is known"),
    (lambda k: k.x[0, -4:], "negative slice bounds are not supported; write them from the dimension: x[H - 64 : H]"),
    (lambda k: k.x.load((0, slice(None)), where=k.v), "where must be a bool tile or scalar, for example `where=index"),
    (lambda k: k.x.load((0, slice(None)), other=k.s), "load: `other` must be a Python number"),
    (lambda k: k.x.store((0, 0), 1.0), "this parameter is read-only; annotate it InOut[...] instead of Tensor[...]"),
    (lambda k: k.y.store((k.t, 0), k.i), "storing i32 into a f32 tensor: write .to(f32)"),
    (lambda k: k.y.store((k.t, 0), k.v), "storing a tile f32[B.row, K] where the index selects [B.row]"),
    (lambda k: k.y.store((0, slice(0, 4)), k.v[:, :, None]), "storing a tile f32[B.row, K, 1] where the index selects"),
    (lambda k: k.x.view(f32, [T, K], strides=[1]), "view: 2 dimensions but 1 strides"),
    # control
    (lambda k: tile.parallel(), "tile.parallel needs at least one axis"),
    (lambda k: tile.range(), "tile.range takes (stop), (start, stop) or (start, stop, step)"),
    (lambda k: tile.blocks(1, 2, 3, "a"), "tile.blocks takes (stop, label) or (start, stop, label)"),
    (lambda k: K // 0, "a size can only be divided by a positive Python int, got 0"),
    # lib
    (lambda k: lib.gelu(k.v, "fast"), "gelu: approximate must be 'none' or 'tanh', got 'fast'"),
    (lambda k: lib.pack_int4(k.i), "pack_int4: the last extent must be a number known while tracing, got B.row"),
    (lambda k: lib.hadamard_matrix(12, f32), "a Hadamard matrix needs a power of two, got 12"),
    (lambda k: lib.hadamard128(k.v.T), "hadamard128: the last extent must be a number known"),
]


@pytest.mark.parametrize("at", range(len(EXPRESSIONS)), ids=[m[:40] for _, m in EXPRESSIONS])
def test_expressions(at: int) -> None:
    function, message = EXPRESSIONS[at]
    with pytest.raises(TraceError) as caught:
        trace(probe, function)
    assert message in caught.value.message
    where = caught.value.loc
    assert where == Loc(__file__, function.__code__.co_firstlineno)
    text = str(caught.value)
    assert text.startswith(f"{__file__}:{where.line}: ")
    assert text.endswith(where.text())


# --- statements: the line that must be named ends in `# !`, else it is that of the def ----------------------------


def refused(function, message: str) -> None:
    lines, first = inspect.getsourcelines(function)
    (line,) = [first + n for n, text in enumerate(lines) if text.rstrip().endswith("# !")] or [first]
    with pytest.raises(TraceError) as caught:
        trace(tile.kernel(function))
    assert message in caught.value.message
    assert caught.value.loc == Loc(__file__, line)


def test_control_flow() -> None:
    def nested(x: InOut[T, f32]):
        for t in tile.parallel(T):
            for _ in tile.parallel(4):  # !
                x[t] = 1.0

    refused(nested, "tile.parallel inside tile.parallel; give one loop several axes: tile.parallel(B, tile.blocks(T))")

    def second(x: InOut[T, f32]):
        for t in tile.parallel(T):
            x[t] = 1.0
        for t in tile.parallel(T):  # !
            x[t] = 2.0

    refused(second, "a kernel has one tile.parallel; write a second kernel and call both from a @tile.graph")

    def label_twice(x: InOut[T, f32]):
        for t in tile.parallel(tile.blocks(T, "a")):
            for _ in tile.range(4, label="a"):  # !
                x[t] = 1.0

    refused(label_twice, "the label 'a' names two loops; schedules and traces are addressed by it: rename one")

    def bad_label(x: InOut[T, f32]):
        for t in tile.parallel(tile.blocks(T, "not a name")):  # !
            x[t] = 1.0

    refused(bad_label, "a label must be a Python identifier, got 'not a name'")

    def keyword_label(x: InOut[T, f32]):
        for t in tile.parallel(tile.blocks(T, "for")):  # !
            x[t] = 1.0

    refused(keyword_label, "a label must be a Python identifier, got 'for'")

    def breaks(x: InOut[T, f32]):
        for t in tile.parallel(T):
            for _ in tile.range(4):  # !
                x[t] = 1.0
                break

    refused(
        breaks, "a tile loop must be a `for` statement without break, continue and return: bound it by a computed stop"
    )

    def jump_under_if(x: InOut[T, f32]):
        for t in tile.parallel(T):
            for i in range(4):
                if x[t] > 0:  # !
                    break
                x[t] = float(i)

    refused(jump_under_if, "break, continue or return under an `if` on a computed condition; assign a name in both")

    def while_loop(x: InOut[T, f32]):
        for t in tile.parallel(T):
            while x[t] > 0:  # !
                x[t] = x[t] - 1.0

    refused(while_loop, "`while` on a computed condition is not supported; use tile.range with a computed stop")

    def if_on_a_tile(x: InOut[T, f32]):
        for t in tile.parallel(tile.blocks(T, "t")):
            if x[t] > 0:  # !
                x[t] = 1.0

    refused(if_on_a_tile, "`if` needs a scalar condition, got b1[B.t]; use tile.where for elements, or tile.any(...)")


def test_jumps_of_a_python_loop_inside_a_tile_loop_are_fine() -> None:
    @tile.kernel
    def powers(x: InOut[T, f32], count: Static[int]):
        for t in tile.parallel(T):
            v = x[t]
            for i in range(10):
                if i == count:
                    break
                v = v * 2.0
            x[t] = v

    x = torch.ones(3)
    powers.interpret(x, 3)
    assert x.tolist() == [8.0, 8.0, 8.0]


def test_names_across_loops_and_branches() -> None:
    def changes_type(x: InOut[T, f32]):
        for t in tile.parallel(T):
            total = tile.zeros([4], f32)
            for _ in tile.range(4):  # !
                total = tile.zeros([8], f32)
            x[t] = tile.sum(total)

    refused(changes_type, "'total' changes type in the loop: f32[4] became f32[8]")

    def changes_dtype(x: InOut[T, f32], n: Tensor[T, i32]):
        for t in tile.parallel(T):
            total = n[t]
            for _ in tile.range(4):  # !
                total = total + 1.5
            x[t] = total.to(f32)

    refused(changes_dtype, "'total' changes type in the loop: i32 became f32; cast to f32")

    def float_start(x: InOut[T, f32], n: Tensor[T, i32]):
        for t in tile.parallel(T):
            total = 0.5
            for _ in tile.range(4):  # !
                total = n[t]
            x[t] = total.to(f32)

    refused(float_start, "'total' is the float 0.5 before the loop and i32 in it; start it with an integer")

    def one_branch(x: InOut[T, f32]):
        for t in tile.parallel(T):
            if x[t] > 0:
                v = x[t]
            x[t] = v + 1.0  # !

    refused(one_branch, "'v' is set only inside one branch of an `if` on a computed condition; give it a value before")

    def only_in_loop(x: InOut[T, f32]):
        for t in tile.parallel(T):
            for _ in tile.range(4):
                v = x[t]
            x[t] = v + 1.0  # !

    refused(only_in_loop, "'v' is set only inside the loop; give it a value before, so that it can be carried out")

    def unset(x: InOut[T, f32]):
        for t in tile.parallel(T):
            for _ in tile.range(4):
                total = total + x[t]  # noqa: F821, F841  # !

    refused(unset, "'total' is used before it has a value")


def test_outputs() -> None:
    def returns_a_tile(x: InOut[T, f32]):
        v = 0.0
        for t in tile.parallel(T):
            v = x[t]
            x[t] = v
        return v

    refused(returns_a_tile, "'v' is set only inside tile.parallel, whose iterations are independent; to write memory")

    def returns_a_number(x: InOut[T, f32]):
        for t in tile.parallel(T):
            x[t] = 1.0
        return 3

    refused(returns_a_number, "kernel 'returns_a_number' returns int; a kernel returns tensors made with tile.empty")

    def no_grid(x: InOut[T, f32]):
        x[0] = 1.0

    refused(no_grid, "kernel 'no_grid' has no tile.parallel loop: add one (tile.parallel(1) runs once)")

    def rebinds(x: InOut[T, f32]):
        for t in tile.parallel(T):
            v = x[t]
            x = v + 1.0

    refused(
        rebinds, "kernel 'rebinds' writes nothing. `y = x` only renames a value; to write to memory assign to a slice"
    )

    def never(x: Tensor[T, f32]):
        y, z = tile.empty([T], f32), tile.empty([T], f32)
        for t in tile.parallel(T):
            y[t] = x[t]
        return y, z

    refused(never, "output 'z' is never written; assign to a slice of it: z[...] = tile")

    def partly(x: Tensor[T, H, f32]):
        y = tile.empty([T, H], f32)
        for t in tile.parallel(T):
            y[t, 0:64] = x[t, 0:64]  # !
        return y

    refused(partly, "output 'y' [T, H] is written only at 0 to 64 of axis 1, whose size is H; write the rest, or give")

    def unknown_dim(x: Tensor[T, f32]):
        y = tile.empty([K], f32)
        for t in tile.parallel(T):
            y[t] = x[t]
        return y

    refused(
        unknown_dim, "kernel 'unknown_dim' uses the dimension K, but no tensor parameter has it; its dimensions are T"
    )

    def unknown_bound(x: InOut[T, f32]):
        for k in tile.parallel(K):  # !
            x[k] = 1.0

    refused(
        unknown_bound, "kernel 'unknown_bound' uses the dimension K, but no tensor parameter has it; its dimensions"
    )


def test_a_partial_write_with_init_is_fine() -> None:
    @tile.kernel
    def partly(x: Tensor[T, H, f32]):
        y = tile.empty([T, H], f32, init=0)
        for t in tile.parallel(T):
            y[t, 0:64] = x[t, 0:64]
        return y

    assert torch.equal(partly.interpret(torch.ones(2, 128)).sum(1), torch.tensor([64.0, 64.0]))


@pytest.mark.parametrize(
    ("name", "attrs", "message"),
    [
        ("scan", {"axis": 0, "kind": "sum"}, "a scan of e4m3: cast first, with .to(i32) or .to(f32)"),
        ("scan", {"axis": 1, "kind": "sum"}, "a scan over axis 1 of e4m3[8]: it has 1 axes"),
        ("reduce", {"axis": 0, "kind": "sum"}, "sum of e4m3: cast first, with .to(i32) or .to(f32)"),
        ("sort", {"axis": -1}, "sort works along the last axis; transpose first"),
    ],
)
def test_type_rules_that_the_functions_never_break(name: str, attrs: dict[str, object], message: str) -> None:
    with pytest.raises(TraceError) as caught:
        OPS[name].infer([TileType(e4m3, (as_size(8),))], attrs)
    assert caught.value.message == message


def test_outside_of_a_kernel() -> None:
    with pytest.raises(TraceError, match=r"this works only inside a function decorated with @tile\.kernel"):
        tile.zeros([4], f32)


def test_sources_that_cannot_be_read() -> None:
    scope = {"tile": tile, "InOut": InOut, "f32": f32, "T": T}
    exec("def typed(x: InOut[T, f32]):\n    pass", scope)
    with pytest.raises(TraceError, match="cannot read the source of 'typed': define kernels in a file"):
        trace(tile.kernel(scope["typed"]))


# --- signatures and launches ------------------------------------------------------------------------------------


def test_signatures() -> None:
    def bare(x):
        pass

    with pytest.raises(
        TraceError, match=r"parameter 'x' of kernel 'bare' needs an annotation: Tensor\[dims..., dtype\]"
    ):
        tile.kernel(bare)
    with pytest.raises(TraceError, match=r"Tensor\[...\] ends with a dtype \(or a tuple of them\), got T"):
        Tensor[T, T]
    with pytest.raises(TypeError, match="a tensor annotation can only be combined with None"):
        Tensor[T, f32] | int

    def two(x: Tensor[T, f32], y: Tensor[Dim("T", min=1), f32]):
        pass

    with pytest.raises(TraceError, match="kernel 'two' has two different Dims named 'T'"):
        tile.kernel(two)
    with pytest.raises(ValueError, match="the operation 'exp' exists already"):
        register_op(OpDef("exp", OPS["exp"].infer, OPS["exp"].reference))


@tile.kernel
def scale(x: Tensor[T, H, (f32, bf16)], w: Tensor[H, f32], a: float, n: int = 1, bias: Tensor[H, f32] | None = None):
    y = tile.empty([T, H], f32)
    for t in tile.parallel(T):
        y[t, :] = x[t, :].to(f32) * w[:] * a * tile.full([], n, i32).to(f32)
    return y


X, W = torch.ones(2, 128), torch.ones(128)
LAUNCHES = [
    (lambda: scale.interpret(X, W, 1.0, 1, None, 6), "scale takes 5 arguments, got 6"),
    (lambda: scale.interpret(X, W), "scale: argument 'a' is missing"),
    (lambda: scale.interpret(X, W, 1.0, x=X), "scale: 'x' is given twice"),
    (lambda: scale.interpret(X, W, 1.0, z=X), "scale has no parameter 'z'; it has x, w, a, n, bias"),
    (lambda: scale.interpret(None, W, 1.0), "scale: x must be a tensor Tensor[T, H, f32/bf16], got None"),
    (lambda: scale.interpret(3, W, 1.0), "scale: x must be a tensor Tensor[T, H, f32/bf16], got int 3"),
    (lambda: scale.interpret(X.int(), W, 1.0), "scale: x must be Tensor[T, H, f32/bf16], got dtype torch.int32"),
    (lambda: scale.interpret(X, W, "a"), "scale: a must be a Python float, got 'a'"),
    (lambda: scale.interpret(X, W, 1.0, 2.5), "scale: n must be a Python int, got 2.5"),
    (lambda: scale.interpret(X, W, 1.0, 1 << 31), "scale: n must fit in 32 bits, got 2147483648"),
    (lambda: scale.interpret(X[0], W, 1.0), "scale: x must have 2 dimensions [T, H], got shape [128]"),
    (lambda: scale.interpret(X.T, W, 1.0), "scale: the last dimension of x must be contiguous (stride 1), got strides"),
    (lambda: scale.interpret(X, W[:64], 1.0), "scale: w.shape[0] is H = 64, but x.shape[1] says H = 128"),
    (lambda: scale.interpret(X[:, :64], W, 1.0), "dimension H must be at least 128 and at most 1024, got 64"),
    (lambda: scale.interpret(X.repeat(1, 9), W, 1.0), "x.shape[1]: dimension H must be at least 128 and at most 1024"),
    (lambda: scale.interpret(torch.ones(2, 130), W, 1.0), "x.shape[1]: dimension H must be a multiple of 128, got 130"),
]


@pytest.mark.parametrize("at", range(len(LAUNCHES)))
def test_launches(at: int) -> None:
    call, message = LAUNCHES[at]
    with pytest.raises(LaunchError) as caught:
        call()
    assert message in str(caught.value)


def test_static_values_are_hashable() -> None:
    with pytest.raises(LaunchError, match=r"probe: the static value f=\[1\] must be hashable: a tuple, say"):
        probe.interpret(X, torch.zeros(2).int(), X.to(torch.float8_e4m3fn), X, [1])


def test_a_kernel_inside_a_kernel() -> None:
    def outer(x: Tensor[T, H, f32], w: Tensor[H, f32]):
        y = tile.empty([T, H], f32)
        z = scale(x, w, 1.0)  # !
        for t in tile.parallel(T):
            y[t, :] = z[t, :]
        return y

    refused(
        outer, "a kernel cannot call a kernel (scale): share code as a plain function of tiles, or call both kernels"
    )


def test_derived_dimensions() -> None:
    @tile.kernel
    def halves(x: Tensor[T, 2 * K, f32], y: Tensor[T, K + 1, f32]):
        z = tile.empty([T], f32)
        for t in tile.parallel(T):
            z[t] = tile.sum(x[t, :]) + tile.sum(y[t, :])
        return z

    assert halves.interpret(torch.ones(1, 6), torch.ones(1, 4)).tolist() == [10.0]
    with pytest.raises(LaunchError, match=r"halves: y.shape\[1\] must be K \+ 1 = 4, got 5"):
        halves.interpret(torch.ones(1, 6), torch.ones(1, 5))
    with pytest.raises(LaunchError, match=r"no tensor has the dimension K by itself; add one|must be 2 \* K"):
        halves.interpret(torch.ones(1, 7), torch.ones(1, 4))

    @tile.kernel
    def product(x: Tensor[T * K, f32]):
        z = tile.empty([1], f32)
        for _ in tile.parallel(1):
            z[0] = tile.sum(x[:])
        return z

    with pytest.raises(LaunchError, match=r"product: no tensor has the dimension . by itself; add one"):
        product.interpret(torch.ones(6))


def test_all_errors_are_tile_errors() -> None:
    assert issubclass(TraceError, TileError)
    assert str(TileError("text")) == "text"
    assert str(TileError("text", Loc("nowhere.py", 3))) == "nowhere.py:3: text"
