"""Calling a kernel: binding, results, `out=`, the table of plans, and what each mistake is told."""

from __future__ import annotations

import pytest
import torch

from tests.tile.runtime_kernels import clear, counts, norm, norm_reference, scale
from tilery import tile
from tilery.tile import Dim, Tensor, f32
from tilery.tile.errors import LaunchError, TileError, TraceError

T = Dim("T")


def tensors(rows: int = 5, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    rand = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 32, generator=rand).to(dtype), torch.randn(32, generator=rand).to(dtype)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.allclose(a.float(), b.float(), atol=1e-2, rtol=1e-2)


def test_positions_names_and_defaults_bind_as_in_python() -> None:
    x, w = tensors()
    wanted = norm_reference(x, w)
    for out in (norm(x, w), norm(x, w, 1e-6), norm(w=w, x=x), norm(x, eps=1e-6, w=w)):
        assert close(out, wanted)
    assert close(norm(x, w, eps=0.5), norm_reference(x, w, 0.5))


@pytest.mark.parametrize("rows", [0, 1, 2, 17])
def test_one_kernel_serves_all_sizes_and_dtypes(rows: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        x, w = tensors(rows, dtype)
        assert close(norm(x, w), norm_reference(x, w))


def test_strided_tensors() -> None:
    x, w = tensors(10)
    assert close(norm(x[::2], w), norm_reference(x[::2], w))
    wide = torch.randn(4, 64).bfloat16()
    assert close(norm(wide[:, 16:48], w), norm_reference(wide[:, 16:48], w))
    odd = torch.randn(5 * 32 + 1)[1:].view(5, 32)  # not on a multiple of 16 bytes
    assert close(norm(odd, w.float()), norm_reference(odd, w.float()))


def test_several_outputs_inout_optional_and_static() -> None:
    x, r = torch.arange(4.0), torch.ones(4)
    y, z = scale(x, r, 7, k=3)
    assert torch.equal(x, torch.tensor([3.0, 6.0, 9.0, 12.0]))
    assert torch.equal(z, torch.arange(4.0) + 1)
    assert torch.equal(y, torch.full((4, 3), 7, dtype=torch.int32))
    y, z = scale(torch.ones(2), None, 1)
    assert y.shape == (2, 2)
    assert z.tolist() == [1, 1]


def test_a_kernel_may_return_nothing_or_start_from_an_initial_value() -> None:
    x = torch.ones(3)
    assert clear(x) is None
    assert x.tolist() == [0, 0, 0]
    for _ in range(2):
        assert counts(torch.tensor([1, 1, 3], dtype=torch.int32), 4).tolist() == [0, 2, 0, 1]


def test_out_takes_the_results() -> None:
    x, w = tensors()
    y = torch.empty_like(x)
    assert norm(x, w, out=y) is y
    assert close(y, norm_reference(x, w))
    bins = torch.full((4,), 9, dtype=torch.int32)
    assert counts(torch.tensor([2], dtype=torch.int32), 4, out=bins).tolist() == [0, 0, 1, 0]
    with pytest.raises(LaunchError, match=r"norm: out= for y must be a contiguous torch.bfloat16 tensor \[5, 32\] on "
                       r"cpu, got torch.bfloat16 \[4, 32\]"):  # fmt: skip
        norm(x, w, out=y[:4])
    with pytest.raises(LaunchError, match="scale: out= must have 2 tensors, got 1"):
        scale(torch.ones(2), None, 1, out=y)


def test_a_second_call_takes_the_plan_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = tensors(6)
    norm(x, w)
    before = len(norm.launcher.plans)

    def never(*args: object) -> None:
        raise AssertionError("the slow path ran")

    monkeypatch.setattr(norm.launcher, "plan", never)
    assert close(norm(x + 1, w), norm_reference(x + 1, w))
    assert len(norm.launcher.plans) == before
    assert norm.launcher.executables  # one binary serves the sizes of a bucket
    monkeypatch.undo()
    norm(*tensors(7))
    norm(*tensors(8))
    assert len(norm.launcher.plans) == before + 2


def test_static_values_that_compare_equal_are_told_apart() -> None:
    @tile.kernel
    def kind(x: Tensor[T, f32], k: tile.Static[object]):
        y = tile.empty([T], f32)
        for t in tile.parallel(tile.blocks(T)):
            y[t] = x[t] + (1.0 if k is True else 2.0)
        return y

    x = torch.zeros(2)
    assert [kind(x, k)[0].item() for k in (True, 1, True, 1.0)] == [1, 2, 1, 2]
    with pytest.raises(LaunchError, match=r"kind: the static value k=\[1\] must be hashable"):
        kind(x, [1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: norm(x), "norm: argument 'w' is missing"),
        (lambda x, w: norm(x, w, 1e-6, 3), "norm takes 3 arguments, got 4"),
        (lambda x, w: norm(x, w, epsilon=1), "norm has no parameter 'epsilon'; it has x, w, eps"),
        (lambda x, w: norm(x, w, x=x), "norm: 'x' is given twice"),
        (lambda x, w: norm(x, [1]), r"norm: w must be a tensor Tensor\[H, bf16/f16/f32\], got list"),
        (lambda x, w: norm(x, w, "a"), "norm: eps must be a Python float, got 'a'"),
        (lambda x, w: norm(x.long(), w), "norm: x must be .* got dtype torch.int64"),
        (lambda x, w: norm(x[:, :16], w), r"norm: w.shape\[0\] is H = 32, but x.shape\[1\] says H = 16"),
        (lambda x, w: norm(x[:, :24], w[:24]), "dimension H must be a multiple of 16, got 24"),
        (lambda x, w: norm(x.to("meta"), w), "norm: x is on meta; kernels run on cpu and cuda tensors: move it"),
        (lambda x, w: norm(x.float().requires_grad_(), w), "norm: x requires grad, and kernels have no gradient; call "
         r"it under torch.no_grad\(\) or torch.inference_mode\(\), or pass x.detach\(\)"),
    ],
)  # fmt: skip
def test_mistakes_of_a_call(call, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        call(*tensors())
    x, w = tensors()
    norm(x, w)  # and again where a plan exists
    with pytest.raises(LaunchError, match=message):
        call(x, w)


def test_gradients_are_no_matter_where_they_are_off() -> None:
    x, w = tensors(5, torch.float32)
    p = torch.nn.Parameter(w)
    with torch.no_grad():
        assert close(norm(x, p), norm_reference(x, w))
    with torch.inference_mode():
        assert close(norm(x, p), norm_reference(x, w))
    with pytest.raises(LaunchError, match="w requires grad"):
        norm(x, p)


def test_names_and_declarations() -> None:
    from tilery.tile import registry

    assert registry.find("tests.tile.runtime_kernels.norm") is norm
    assert norm in registry.kernels("tests.tile.")
    with pytest.raises(TileError, match=r"no kernel is named 'nrm'; expected one of .*norm"):
        registry.find("nrm", "tests.tile.")
    with pytest.raises(TraceError, match="kernel 'norm' has no case 'x'; it has ragged, empty"):
        norm.arguments("x")
    with pytest.raises(TraceError, match="kernel 'norm' has two cases named 'ragged'; rename one"):
        norm.case(norm.cases["ragged"])
    assert repr(norm) == "<tile kernel tests.tile.runtime_kernels.norm>"
    assert norm.__doc__ == "RMSNorm."


def test_a_parameter_named_out_is_the_parameter() -> None:
    @tile.kernel
    def into(x: Tensor[T, f32], out: tile.InOut[T, f32]):
        for t in tile.parallel(tile.blocks(T)):
            out[t] = x[t]

    y = torch.empty(3)
    assert into(torch.arange(3.0), out=y) is None
    assert y.tolist() == [0, 1, 2]
