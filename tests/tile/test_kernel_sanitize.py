"""The sanitizer: every fault it finds and what it says, and kernels it must leave in peace."""

from __future__ import annotations

import pytest
import torch

from tests.tile.runtime_kernels import N, T, counts, norm, scale
from tilery import tile
from tilery.tile import InOut, Tensor, f32, i32, u8
from tilery.tile.errors import SanitizeError


def fault(kernel, *args, **options) -> str:
    with pytest.raises(SanitizeError) as caught:
        kernel.sanitize(*args, **options)
    assert caught.value.loc is not None
    assert "test_kernel_sanitize.py" in caught.value.loc.file
    return caught.value.message


def test_clean_kernels_pass_and_their_arguments_stay() -> None:
    for kernel in (norm, scale):
        for case in kernel.cases:
            kernel.sanitize(**kernel.arguments(case))
    x = torch.ones(3)
    report = scale.sanitize(x, None, 2)
    assert x.tolist() == [1, 1, 1]
    assert str(report) == "clean: 3 programs, 3 loads, 9 stores"
    assert report.outputs[1].tolist() == [1, 1, 1]
    counts.sanitize(torch.tensor([1, 1, 0], dtype=torch.int32), 2)  # atomics may meet


def test_sanitize_as_an_option_of_a_call() -> None:
    x = torch.ones(3)
    y, z = scale(x, None, 2, sanitize=True)
    assert (x.tolist(), z.tolist(), y.shape) == ([2, 2, 2], [1, 1, 1], (3, 2))


def test_outside_a_tensor() -> None:
    @tile.kernel
    def pick(x: Tensor[T, f32], i: Tensor[N, i32]):
        y = tile.empty([N], f32)
        for n in tile.parallel(tile.blocks(N, "n")):
            y[n] = x[i[n]]
        return y

    assert fault(pick, torch.ones(5), torch.tensor([1, 7], dtype=torch.int32)) == (
        "load outside the tensor 'x' at element [0]: indices 7 of 5; mask the access with where=, or fix the index"
    )


def test_two_programs_write_one_element() -> None:
    @tile.kernel
    def last(x: Tensor[T, f32]):
        y = tile.empty([1], f32)
        for t in tile.parallel(T):
            y[0] = x[t]
        return y

    assert fault(last, torch.ones(5)) == (
        "program (0,) and program (1,) both write element [0] of 'y'; programs run in any order, so which value stays "
        "is not defined. Give each program its own elements, or use an atomic"
    )


def test_a_block_loop_is_checked_index_by_index() -> None:
    @tile.kernel
    def last(x: Tensor[T, f32]):
        y = tile.empty([1], f32)
        for t in tile.parallel(tile.blocks(T, "row")):
            y[0] = tile.max(x[t])
        return y

    assert "both write element [0] of 'y'" in fault(last, torch.ones(5))


def test_a_program_reads_what_another_writes() -> None:
    @tile.kernel
    def forward(x: InOut[T, f32]):
        for t in tile.parallel(T):
            v = x[t]
            if t < T - 1:
                x[t + 1] = v

    assert fault(forward, torch.ones(4)) == (
        "program (1,) reads element [1] of 'x', which program (0,) writes; programs run in any order, so the value is "
        "not defined. Use two kernels, or let one program do both"
    )


def test_a_program_writes_what_another_reads() -> None:
    @tile.kernel
    def backward(x: InOut[T, f32]):
        for t in tile.parallel(T):
            if t > 0:
                x[t - 1] = x[t]

    assert fault(backward, torch.ones(4)) == (
        "program (2,) writes element [1] of 'x', which program (1,) reads; programs run in any order, so the value "
        "read is not defined. Use two kernels, or write to an output of its own"
    )


def test_arguments_that_share_memory_and_views_are_one_tensor() -> None:
    @tile.kernel
    def shift(x: Tensor[T, f32], y: InOut[T, f32]):
        for t in tile.parallel(T):
            y[t] = x[t]

    memory = torch.zeros(6)
    shift.sanitize(memory[:3], memory[3:])
    with pytest.raises(SanitizeError, match=r"program \(1,\) reads element \[\d\] of 'x', which program \(0,\) writes"):
        shift(memory[:4], memory[1:5], sanitize=True)

    @tile.kernel
    def bytes_of(x: InOut[T, u8]):
        words = x.view(i32, [1])
        for t in tile.parallel(2):
            if t == 0:
                x[2] = tile.full([], 7, u8)
            else:
                words[0] = tile.full([], 1, i32)

    message = fault(bytes_of, torch.zeros(4, dtype=torch.uint8))
    assert message.startswith("program (0,) and program (1,) both write element [2] of 'x'")


def test_one_store_writes_an_element_twice() -> None:
    @tile.kernel
    def scatter(x: Tensor[N, f32], i: Tensor[N, i32]):
        y = tile.empty([N], f32, init=0)
        for _ in tile.parallel(1):
            y[i[:]] = x[:]
        return y

    scatter.sanitize(torch.ones(2), torch.tensor([1, 0], dtype=torch.int32))
    assert fault(scatter, torch.ones(2), torch.tensor([1, 1], dtype=torch.int32)) == (
        "one store writes elements of 'y' more than once; which value stays is not defined. Make the indices distinct, "
        "mask the duplicates, or use an atomic"
    )


def test_elements_nobody_writes() -> None:
    @tile.kernel
    def tail(x: Tensor[T, f32]):
        y = tile.empty([T], f32)
        for t in tile.parallel(T):
            if t > 1:
                y[t] = x[t]
        return y

    assert fault(tail, torch.ones(5)) == (
        "2 elements of output 'y' are never written, the first is element [0] of 'y'; write them, or give "
        "tile.empty an init"
    )


def test_memory_read_before_it_is_written() -> None:
    @tile.kernel
    def early(x: Tensor[T, f32]):
        y = tile.empty([T], f32)
        for t in tile.parallel(T):
            v = y[t]
            y[t] = v + x[t]
        return y

    message = fault(early, torch.ones(2))
    assert message == "element [0] of 'y' is read before it is written; write it first, or give tile.empty an init"


def test_new_nan_and_inf_are_traced_to_their_operation() -> None:
    @tile.kernel
    def logs(x: Tensor[T, f32], guard: tile.Static[bool]):
        y = tile.empty([T], f32)
        for t in tile.parallel(tile.blocks(T, "row")):
            v = tile.log(x[t])
            if guard:
                v = tile.where(x[t] > 0, v, 0.0)
            y[t] = v * 2.0
        return y

    message = fault(logs, torch.tensor([1.0, -1.0]), False)
    assert message.startswith("program (1,) stores NaN in 'y'; it first appears in the result of 'log' at ")
    assert message.endswith(
        "(v = tile.log(x[t])), from operands without NaN. Guard that operation, or mask the elements"
    )
    assert "stores inf in 'y'" in fault(logs, torch.tensor([0.0]), False)
    logs.sanitize(torch.tensor([1.0, -1.0, 0.0]), True)  # masked before it is stored
    logs.sanitize(torch.tensor([1.0, float("nan"), float("inf")]), False)  # given, not made
    logs.sanitize(torch.tensor([-1.0]), False, nonfinite=False)


def test_an_infinity_that_a_loop_starts_from_is_no_fault() -> None:
    @tile.kernel
    def largest(x: Tensor[T, N, f32]):
        y = tile.empty([T], f32)
        for t in tile.parallel(T):
            m = tile.full([], float("-inf"), f32)
            for n in tile.range(tile.blocks(N, "n")):
                m = tile.maximum(m, tile.max(x[t, n]))
            y[t] = m
        return y

    largest.sanitize(torch.randn(2, 40))
    assert largest.sanitize(torch.empty(1, 0)).outputs[0].tolist() == [float("-inf")]


def test_a_branch_that_gives_several_values_keeps_them_apart() -> None:
    @tile.kernel
    def pair(x: Tensor[T, f32]):
        a, b = tile.empty([T], f32), tile.empty([T], f32)
        for t in tile.parallel(T):
            low, high = x[t], x[t]
            if x[t] > 0:
                low, high = tile.full([], float("-inf"), f32), x[t] * 2.0
            a[t] = low
            b[t] = high
        return a, b

    pair.sanitize(torch.tensor([1.0, -1.0]))


def test_taps_are_collected() -> None:
    @tile.kernel
    def tapped(x: Tensor[T, f32]):
        y = tile.empty([T], f32)
        for t in tile.parallel(T):
            y[t] = tile.tap("double", x[t] * 2.0)
        return y

    taps = tapped.sanitize(torch.tensor([1.0, 3.0])).taps
    assert [(t.program, t.name, t.value.item()) for t in taps] == [((0,), "double", 2.0), ((1,), "double", 6.0)]
