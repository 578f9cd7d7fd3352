"""`explain`: the counts of bytes and operations, the roofline, what is printed and what the JSON holds."""

from __future__ import annotations

import json

import pytest
import torch

from tests.tile.runtime_kernels import H, N, T, norm
from tilery import tile
from tilery.tile import Dim, InOut, Tensor, bf16, f32, i32
from tilery.tile.explain import H100, Machine, measure_copy

M, K, S = Dim("M"), Dim("K"), Dim("S")


@tile.kernel
def product(a: Tensor[M, K, bf16], b: Tensor[K, 64, bf16]):
    y = tile.empty([M, 64], f32)
    for m in tile.parallel(tile.blocks(M, "m")):
        acc = tile.zeros([m.extent, 64], f32)
        for k in tile.range(tile.blocks(K, "k")):
            acc = acc + tile.dot(a[m, k], b[k, :])
        y[m, :] = acc
    return y


@tile.kernel
def pick(cache: InOut[S, H, f32], row: Tensor[N, i32], lens: Tensor[N, i32]):
    for n in tile.parallel(N):
        v = cache[row[n], :]
        for _ in tile.range(lens[n], label="repeat"):
            v = v * 2.0
        cache[row[n], :] = v


def test_each_byte_counts_once_and_blocks_do_not_matter() -> None:
    x, w = torch.randn(100, 32), torch.randn(32)
    work = norm.explain(x, w).work
    assert work.read == {"x": 100 * 32 * 4, "w": 32 * 4}
    assert work.written == {"y": 100 * 32 * 4}
    assert work.matrix == {}
    assert 100 * 32 * 4 <= work.vector <= 100 * 32 * 12


def test_matrix_products_by_dtype() -> None:
    found = product.explain(torch.zeros(100, 300, dtype=torch.bfloat16), torch.zeros(300, 64, dtype=torch.bfloat16))
    assert found.work.matrix == {"bf16": 2 * 100 * 300 * 64}
    assert found.work.read == {"a": 100 * 300 * 2, "b": 300 * 64 * 2}
    assert found.work.open == ()


def test_only_touched_rows_count_and_unknown_loops_are_named() -> None:
    from tilery.tile.explain import count

    row = torch.tensor([1, 5], dtype=torch.int32)
    found = pick.explain(torch.zeros(1000, 16), row, row)
    assert found.work.read["cache"] == found.work.written["cache"] == 2 * 16 * 4
    assert found.work.vector == 2 * 3 * 16  # two programs, a loop of 1 and one of 5
    assert found.work.averaged == ("row", "lens")
    assert "loops whose length is loaded are counted with the mean of row, lens" in str(found)
    ir = pick.trace(pick.signature.specialise(pick.signature.bind((torch.zeros(1000, 16), row, row), {})))
    work = count(ir, found.env)  # without the data
    assert (work.open, work.vector) == (("repeat",), 2 * 16)
    unknown = type(found)(**{**vars(found), "work": work})
    assert "loop 'repeat' depends on data and is counted once" in str(unknown)


def test_the_roofline() -> None:
    found = product.explain(torch.zeros(64, 64, dtype=torch.bfloat16), torch.zeros(64, 64, dtype=torch.bfloat16))
    assert found.bound == "memory"
    assert found.floor == found.memory_time == pytest.approx(found.work.bytes / 3.0e12)
    slow = Machine("slow", H100.copy, {"bf16": 1e9}, 1e9)
    assert type(found)(**{**vars(found), "machine": slow}).bound == "arithmetic"


def test_text_and_json_say_the_same() -> None:
    found = norm.explain(torch.randn(5, 32), torch.randn(32), copy_rate=True)
    text = str(found)
    for part in ("norm (T=5, H=32)", "roofline    H100 SXM: at least", "bound by memory", "row = 8: ",
                 "this CPU copies", "schedule    triton", "passes      cpu"):  # fmt: skip
        assert part in text
    data = json.loads(found.to_json())
    assert data["bytes"] == found.work.bytes == 5 * 32 * 8 + 128
    assert data["schedules"]["triton"]["value"]["blocks"] == {"row": 8}
    assert data["schedules"]["triton"]["why"]["row"]
    assert data["pass_seconds"]["triton"][0][0] == "trace"
    assert data["cpu_copy"] == found.cpu_copy


def test_registers_come_from_the_binary_or_the_reason_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    x, w = torch.randn(5, 32), torch.randn(32)
    if importlib.util.find_spec("triton") is not None:
        found = norm.explain(x, w)
        assert found.binary["target"] == "sm_90a"
        assert found.binary["registers"] > 0
        assert found.binary["spilled_bytes"] == 0
        assert "registers" in str(found)
    monkeypatch.setattr("tilery.tile.explain.importlib.util.find_spec", lambda name: None)
    found = norm.explain(x, w)
    assert found.notes == ("registers and shared memory need the package triton, which is not installed",)
    assert found.notes[0] in str(found)


def test_a_copy_is_measured() -> None:
    assert measure_copy(4) > 1e8


def test_the_sizes_alone_are_enough_to_lower() -> None:
    lowered = norm.lower("triton", T=64, H=64)
    assert lowered.stage("padded").stage == "padded"
    assert norm.lower("cpu", torch.randn(5, 32), torch.randn(32)).kernel.stage == "bound"
    from tilery.tile.errors import LaunchError
    from tilery.tile.schedule import Schedule

    assert norm.lower("cpu", T=64, H=64, schedule=Schedule({"row": 2})).schedule["row"] == 2
    with pytest.raises(LaunchError, match="norm: no dimension or parameter 'W'; it has T, H, x, w, eps"):
        norm.lower("triton", T=64, W=64)
    with pytest.raises(LaunchError, match="dimension H must be a multiple of 16, got 60"):
        norm.lower("triton", T=64, H=60)


def test_a_declared_schedule_is_used_and_explained() -> None:
    from tilery.tile.schedule import Schedule

    @tile.kernel(schedule=lambda env, target: Schedule({"row": 2}) if target == "cpu" else None)
    def copy(x: Tensor[T, f32]):
        y = tile.empty([T], f32)
        for t in tile.parallel(tile.blocks(T, "row")):
            y[t] = x[t]
        return y

    x = torch.arange(5.0)
    found = copy.explain(x)
    assert found.schedules["cpu"]["row"] == 2
    assert found.schedules["cpu"].reasons["row"] == "given"
    assert found.schedules["triton"]["row"] > 2
    assert torch.equal(copy(x), x)
