"""Top-k on Hopper: what is launched, what the binaries need, and the stated winners: by the kernel's PTX, run on a CPU,
and by the kernel itself where there is a Hopper GPU."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.ops.hopper import ptx
from tests.ops.kernels.support import gen
from tilery.ops.kernels import topk as portable

pytest.importorskip("triton")

from tilery.ops.hopper import topk
from tilery.ops.hopper.topk import Launch
from tilery.ops.hopper.variant import build

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)

KINDS = (
    "normal", "ties", "relu", "holes", "extremes", "equal", "signed zeros", "rising", "falling", "none", "close",
    "negative", "infinite", "bits",
)  # fmt: skip


def data(kind: str, rows: int, length: int) -> torch.Tensor:
    rand = gen(5)
    if kind in ("normal", "ties", "relu", "holes", "extremes"):
        return portable._scores(rand, kind, rows, length)
    x = torch.randn(rows, length, generator=rand)
    if kind == "equal":
        return torch.full_like(x, -2.5)
    if kind == "signed zeros":
        return torch.where(x > 0, 0.0, -0.0)
    if kind in ("rising", "falling"):
        return x.sort(1, descending=kind == "falling").values
    if kind == "none":
        return torch.full_like(x, float("-inf"))
    if kind == "close":
        return 1 + 1e-6 * x
    if kind == "negative":
        return -1e30 * x.abs()
    if kind == "infinite":
        return torch.where(x > 1, float("inf"), x)
    bits = torch.randint(-(2**31), 2**31 - 1, (rows, length), generator=rand, dtype=torch.int32).view(torch.float32)
    return bits.nan_to_num(0.0, 3e38, -3e38)


def lengths(rows: int, length: int, k: int) -> torch.Tensor:
    some = (length, 0, 1, k, k + 1, length // 2, length - 7, -3)
    return torch.tensor([some[r % len(some)] for r in range(rows)], dtype=torch.int32).clamp(max=length)


def test_launches():
    assert topk.plan(64, 500, 2048) == (Launch(500, 8, 4, 1),)
    assert topk.plan(64, 8192, 2048) == (Launch(8192, 8, 32, 1),)
    assert topk.plan(64, 8193, 2048) == (Launch(8193, 32, 16, 1),)
    assert topk.plan(64, 32768, 2048) == (Launch(32768, 32, 32, 1),)
    assert topk.plan(4, 131072, 2048) == (Launch(131072, 32, 16, 8), Launch(16384, 32, 16, 1))
    assert topk.plan(64, 131072, 2048) == (Launch(131072, 32, 32, 4), Launch(8192, 8, 32, 1))
    assert topk.plan(1, 10**6, 2048) == (
        Launch(10**6, 32, 16, 62), Launch(62 * 2048, 32, 16, 8), Launch(16384, 32, 16, 1)
    )  # fmt: skip


@pytest.mark.parametrize(("length", "k"), [(100, 0), (100, topk.MOST + 1), (33000, 11000)])
def test_what_has_no_plan(length, k):
    assert topk.plan(1, length, k) == ()
    with pytest.raises(ValueError, match="no plan"):
        topk.top_k(torch.zeros(1, length), k)


@pytest.mark.parametrize("length", [1, 9, 1024, 1025, 8193, 32767, 32769, 123457, 10**7])
@pytest.mark.parametrize("k", [1, 64, 2048, topk.MOST])
@pytest.mark.parametrize("rows", [0, 1, 64, 5000])
def test_launches_hold_all_candidates(rows, length, k):
    """Each launch covers what it is given, its winners are the next one's candidates, the last has one piece."""
    left = length
    for launch in topk.plan(rows, length, k):
        assert launch.length == left
        assert launch.pieces * 32 * launch.warps * launch.each >= left
        assert 4 <= launch.each <= 32
        assert launch.each & (launch.each - 1) == 0
        left = launch.pieces * k
    assert left == k


def test_other_dtypes_and_strides_are_refused():
    with pytest.raises(ValueError, match="must be f32"):
        topk.top_k(torch.zeros(2, 50, dtype=torch.bfloat16), 3)
    with pytest.raises(ValueError, match="dense rows"):
        topk.top_k(torch.zeros(50, 2).T, 3)


@pytest.mark.parametrize("variant", topk.variants(), ids=lambda v: v.name)
def test_binaries(variant):
    """Scores stay in registers, and every count is the one instruction that merges equal addresses."""
    built = build(variant)
    assert built.registers <= topk.REGISTERS
    assert (built.spills, built.stack) == (0, 0)
    assert built.sass.count("ATOMS.POPC.INC") == 3 * variant.constexprs["N"]
    assert "ATOMS.CAS" not in built.sass


def test_the_operator_takes_this_way_on_hopper(monkeypatch):
    monkeypatch.setattr(portable, "_is_hopper", lambda device: True)
    monkeypatch.setattr(topk, "top_k", lambda scores, k, lens: ("taken", scores.stride(1)))
    assert portable.top_k_fast(torch.zeros(2, 40), 3) == ("taken", 1)
    assert portable.top_k_fast(torch.zeros(40, 2).T, 3) == ("taken", 1)
    assert portable.top_k_fast(torch.zeros(1, 20), topk.MOST + 1).tolist()[0][:21] == [*range(20), -1]


@functools.cache
def code(warps: int, pieces: int, first: bool, last: bool) -> str:
    """PTX of a kernel with 4 scores per thread and at most 1,024 winners."""
    constexprs = {
        "N": 4, "WARPS": warps, "PIECES": pieces, "LENS": first, "NAMES": not first, "VALUES": not last, "WIDE": 1024,
        "WAIT": not first,
    }  # fmt: skip
    return build(replace(topk.variants()[0], constexprs=constexprs, num_warps=warps)).ptx


def emulated(scores: torch.Tensor, k: int, lens: torch.Tensor, warps: int, pieces: int) -> torch.Tensor:
    """One launch, or two of which the first has `pieces`, of programs with 128 * warps candidates."""
    rows = scores.shape[0]
    x = scores.numpy().copy()
    names, values = x, x
    for number, count in enumerate((pieces, 1) if pieces > 1 else (1,)):
        last = count == 1
        out = np.full((rows, count * k), -7, np.int32)
        values = x if last else np.full((rows, count * k), np.nan, np.float32)
        text = code(warps, count, number == 0, last)
        for program in range(rows * count):
            arguments = [x, lens.numpy(), names, out, values, x.shape[1], x.shape[1], k, x, x]
            ptx.run(text, program, 32 * warps, arguments, 33792)
        x, names = values, out
    return torch.from_numpy(out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("warps", "length", "k"), [(8, 1000, 300), (8, 77, 512), (32, 4001, 1024)])
def test_the_stated_winners_by_its_ptx(kind, warps, length, k):
    scores, lens = data(kind, 3, length), torch.tensor([length, length // 2 + k // 2, -3], dtype=torch.int32)
    got = emulated(scores, k, lens.clamp(max=length), warps, 1)
    assert torch.equal(got, portable._top_k_reference(scores, k, lens))


@pytest.mark.parametrize("kind", ["normal", "ties", "holes", "equal"])
def test_pieces_by_their_ptx(kind):
    scores, lens = data(kind, 2, 3500), torch.tensor([3500, 1300], dtype=torch.int32)
    assert torch.equal(emulated(scores, 250, lens, 8, 4), portable._top_k_reference(scores, 250, lens))


@on_hopper
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("rows", "length", "k"),
    [(2, 3, 1), (9, 60, 17), (3, 5000, 2048), (9, 8193, 100), (8, 32768, 2048), (2, 16384, 8192), (4, 131072, 2048),
     (2, 300001, 1000)],
)  # fmt: skip
@pytest.mark.parametrize("ragged", [False, True])
def test_the_stated_winners(kind, rows, length, k, ragged):
    scores = data(kind, rows, length).cuda()
    lens = lengths(rows, length, k).cuda() if ragged else None
    got = topk.top_k(scores, k, lens)
    assert torch.equal(got, portable._top_k_reference(scores, k, lens))


@on_hopper
def test_rows_may_be_strided():
    scores = data("normal", 5, 9000).cuda()[:, 37:8000]
    assert torch.equal(topk.top_k(scores, 300), portable._top_k_reference(scores, 300, None))


@on_hopper
def test_nan_breaks_nothing():
    """What NaN does to a row is not stated, but positions stay positions, each at most once, and other rows stay."""
    scores = data("normal", 3, 20000)
    scores[1, ::7] = float("nan")
    scores[1, 1::7] = -float("nan")
    got = topk.top_k(scores.cuda(), 2048).cpu()
    assert torch.equal(got[::2], portable._top_k_reference(scores[::2], 2048, None))
    there = got[1][got[1] >= 0]
    assert len(set(there.tolist())) == len(there)
    assert there.max() < 20000
