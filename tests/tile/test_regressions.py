"""Wrong results that lowering once gave, one test for each, named after the rule it broke."""

import importlib.util

import pytest
import torch

from tests.tile.cpu_compare import run_both, specialised
from tilery import tile
from tilery.tile import Dim, InOut, Tensor, bf16, f32, f64, i32, interpret
from tilery.tile.errors import LoweringError, TraceError
from tilery.tile.lowering import lower
from tilery.tile.schedule import Schedule, block_labels
from tilery.tile.targets.cpu.executable import compile_many
from tilery.tile.targets.triton.plan import expression

N, M = Dim("N"), Dim("M")


def everywhere(kernel, *args, native=False, sizes=(None, 4, 1)):
    """Results of the traced kernel; raises if a lowered stage (`native`: or the C++) gives others."""
    ir, arguments, env = specialised(kernel, *args)
    wanted = interpret.run(ir, arguments, env)
    for size in sizes:
        for target in ("cpu", "triton"):
            schedule = Schedule(blocks=dict.fromkeys(block_labels(ir), size)) if size else None
            for name, stage in lower(ir, env, target, schedule).stages[1:]:
                for got, expected in zip(interpret.run(stage, arguments, env), wanted):
                    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6, equal_nan=True, msg=f"{target} {name}")
    if native:
        got, wanted = run_both(ir, arguments, env, compile_many([(ir, env, None)], optimise="-O1")[0])
        for a, b in zip(got, wanted):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    return wanted


@tile.kernel
def numbers(x: Tensor[N, bf16]):
    y, z = tile.empty([N], i32), tile.empty([N], f32)
    for t in tile.parallel(tile.blocks(N, "t")):
        y[t] = (x[t] * 0.0 + 0.1 > 0.1).to(i32)
        z[t] = tile.where(x[t] > 0, x[t], 0.1).to(f32)
    return y, z


def test_a_number_is_rounded_to_the_dtype_of_the_tile_it_meets():
    y, z = everywhere(numbers, torch.tensor([-1.0, 2.0, -3.0]).bfloat16(), native=True)
    assert not y.any()
    assert z[0] == torch.tensor(0.1).bfloat16()


@tile.kernel
def shifted(x: Tensor[N, f32]):
    y = tile.empty([N], f32)
    for t in tile.parallel(tile.blocks(N, "t")):
        y[t] = x[tile.span(t.start + 3, t.extent)] + x[tile.span(t.start - 3, t.extent)]
    return y


def test_a_span_of_a_block_extent_elsewhere_is_masked():
    everywhere(shifted, torch.arange(21.0))


@tile.kernel
def from_below(x: Tensor[N, f32]):
    y, z = tile.empty([1], f32), tile.empty([8], f32)
    for p in tile.parallel(1):
        total = 0.0
        for t in tile.range(tile.blocks(-5, N, "t")):
            total = total + tile.sum(x[t])
        y[p] = total
        z[:] = x[tile.span(-2, 8)]
    return y, z


def test_positions_below_zero_read_zero():
    y, z = everywhere(from_below, torch.arange(21.0))
    assert y.item() == 210
    assert z.tolist() == [0, 0, 0, 1, 2, 3, 4, 5]


@tile.kernel
def downward(x: Tensor[N, f32]):
    y = tile.empty([4], f32)
    for _ in tile.parallel(1):
        total = tile.zeros([4], f32)
        for i in tile.range(10, -4, -1):
            total = total + x[tile.span(i, 4)]
        y[:] = total
    return y


def test_a_loop_that_counts_down_reaches_below_its_start():
    everywhere(downward, torch.arange(21.0))


@tile.kernel
def infinite(x: Tensor[N, M, f32], s: float):
    y = tile.empty([N], f32)
    for t in tile.parallel(tile.blocks(N, "t")):
        y[t] = tile.sum(x[t, :] * s, axis=1) + tile.sum(x[t, :] * float("inf"), axis=1)
    return y


def test_padding_times_infinity_is_not_zero():
    assert everywhere(infinite, torch.ones(5, 6), float("inf"))[0].isinf().all()


@tile.kernel
def divided(x: Tensor[N, i32], n: int):
    y, z = tile.empty([N], i32), tile.empty([N], i32)
    for t in tile.parallel(tile.blocks(N, "t")):
        total = x[t]
        for _ in tile.range(n):
            total = total + 100 // n
        y[t] = total
        z[t] = 100 // x[t] + 100 % x[t]
    return y, z


def test_division_does_not_trap_in_padding_or_before_a_loop_that_does_not_run():
    everywhere(divided, torch.arange(1, 7, dtype=torch.int32), 0, native=True)


def test_a_reshape_leaves_blocks_where_they_are():
    @tile.kernel
    def swapped(x: Tensor[N, 4, f32]):
        y = tile.empty([4, N], f32)
        for t in tile.parallel(tile.blocks(N, "t")):
            y[:, t] = x[t, :].reshape(4, t.extent)
        return y

    with pytest.raises(TraceError, match="equal before, between and after blocks"):
        specialised(swapped, torch.ones(5, 4))


@tile.kernel
def doubles(x: Tensor[N, f64]):
    y = tile.empty([N], f64)
    for t in tile.parallel(tile.blocks(N, "t")):
        y[t] = x[t] + tile.full([t.extent], 0.1, f64)
    return y


def test_a_number_in_f64_keeps_its_digits():
    ir, arguments, env = specialised(doubles, torch.zeros(3, dtype=torch.float64))
    assert interpret.run(ir, arguments, env)[0][0].item() == 0.1


@tile.kernel
def counted(x: Tensor[N, i32]):
    y = tile.empty([10], i32)
    for _ in tile.parallel(1):
        y[:] = tile.histogram(x[:], 10)
    return y


def test_a_histogram_leaves_out_what_is_outside():
    y = everywhere(counted, torch.tensor([-1, 0, 3, 3, 9, 20], dtype=torch.int32))[0]
    assert y.tolist() == [1, 0, 0, 2, 0, 0, 0, 0, 0, 1]


@tile.kernel
def outside(x: Tensor[N, f32], c: InOut[2, i32]):
    y = tile.empty([N], f32)
    c.atomic_add(0, 1)
    for t in tile.parallel(tile.blocks(N, "t")):
        y[t] = x[t]
    return y


def test_triton_refuses_writes_outside_the_grid():
    ir, _, env = specialised(outside, torch.ones(9), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(LoweringError, match=r"outside tile\.parallel"):
        lower(ir, env, "triton")


@tile.kernel
def below(x: Tensor[N, f32], n: int):
    y = tile.empty([N], f32, init=0)
    for t in tile.parallel(tile.blocks(4 + (n - 10) // 4 + (n - 12) % 5, "t")):
        y[t] = x[t]
    return y


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_host_divides_grid_bounds_toward_zero():
    from tilery.tile.targets.triton.interp import run_interpreted

    ir, arguments, env = specialised(below, torch.ones(9), 9)
    lowered = lower(ir, env, "triton", Schedule(blocks={"t": 1}))
    assert torch.equal(run_interpreted(lowered, arguments, env)[0], interpret.run(ir, arguments, env)[0])


def test_a_quotient_of_sizes_rounds_downward_where_division_rounds_toward_zero():
    text = expression((N - 7) // 2, lambda name: name)

    def toward_zero(a, b):
        return int(a / b)

    assert eval(text, {"N": 4}) == -2
    inner = 4 - 7
    assert toward_zero(inner - (inner - toward_zero(inner, 2) * 2 + 2) % 2, 2) == -2


@tile.kernel
def signed(x: Tensor[N, f32]):
    y = tile.empty([N], i32)
    for t in tile.parallel(tile.blocks(N, "t")):
        y[t] = (x[t] - (-0.0)).bitcast(i32)
    return y


def test_subtracting_minus_zero_is_not_nothing():
    assert everywhere(signed, torch.tensor([-0.0, 1.0]), native=True)[0][0] == 0


@tile.kernel
def dead_loop(x: Tensor[N, f32]):
    y = tile.empty([N], f32)
    for t in tile.parallel(tile.blocks(N, "t")):
        total = 0.0
        for k in tile.range(tile.blocks(N, "k")):
            total = total + tile.sum(x[k])
        y[t] = x[t]
    return y


def test_a_block_loop_that_does_nothing_may_vanish():
    everywhere(dead_loop, torch.arange(5.0))


@tile.kernel
def narrow(x: Tensor[32, f32]):
    y = tile.empty([4], f32)
    for _ in tile.parallel(1):
        total = tile.zeros([4], f32)
        for i in tile.range(20):
            total = total + x[tile.span((i * 20).to(tile.i8).to(i32), 4)]
        y[:] = total
    return y


def test_ranges_end_where_integers_wrap():
    everywhere(narrow, torch.arange(32.0))


def test_loop_constants_of_similar_names_stay_apart():
    from tilery.tile.ir import TileType, Value
    from tilery.tile.targets.cpu.element import _hint

    assert not _hint(Value(1, TileType(f32), "v1_2"))[-1].isdigit()
