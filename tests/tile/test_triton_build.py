"""Binaries for sm_90a without a GPU, their cache, and what a launch does before it reaches a driver."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.tile.test_triton_emit import NORM, lowered, norm
from tilery import tile
from tilery.tile import Dim, Static, Tensor, bf16, e4m3, f32, i32, u8
from tilery.tile.errors import LaunchError, LoweringError, VerifyError
from tilery.tile.schedule import Schedule
from tilery.tile.targets.triton import Spec, compile_kernel, emit, find_cached, native, report, run_interpreted
from tilery.tile.targets.triton.launch import launch_source

pytest.importorskip("triton")

T, H, P, K = Dim("T"), Dim("H", multiple_of=128), Dim("P"), Dim("K")


@tile.kernel
def gemm(x: Tensor[T, H, (bf16, e4m3)], w: Tensor[P, H, (bf16, e4m3)], precision: Static[str] = "ieee"):
    y = tile.empty([T, P], bf16)
    for t, p in tile.parallel(tile.blocks(T, "t"), tile.blocks(P, "p")):
        acc = tile.zeros([t.extent, p.extent], f32)
        for h in tile.range(tile.blocks(H, "h")):
            acc = tile.dot(x[t, h], w[p, h].T, acc=acc, precision=precision)
        y[t, p] = acc.to(bf16)
    return y


@tile.kernel
def rows(cache: Tensor[P, 656, u8], at: Tensor[K, i32]):
    """Rows of 512 FP8 values with four scales, gathered and expanded."""
    y = tile.empty([K, 512], bf16)
    values = cache.view(e4m3, [P, 512], strides=[656, 1])
    scales = cache.view(f32, [P, 4], strides=[164, 1], offset=128)
    for k in tile.parallel(tile.blocks(K, "k")):
        v = values[at[k], :].to(f32).reshape(k.extent, 4, 128) * scales[at[k], :][:, :, None]
        y[k, :] = v.reshape(k.extent, 512).to(bf16)
    return y


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory):
    """A cache of this module's own."""
    before = os.environ.get("TILERY_CACHE_DIR")
    os.environ["TILERY_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["TILERY_CACHE_DIR"]
    else:
        os.environ["TILERY_CACHE_DIR"] = before


def test_memory_bound_kernel_uses_wide_loads():
    x = (torch.zeros(2, 7168).bfloat16(), torch.zeros(7168).bfloat16(), 1e-6)
    low = lowered(norm, *x, schedule=Schedule({"row": 1}, warps=8))
    facts = report(emit(low.kernel, low.schedule))
    assert facts.spills == 0
    assert facts.registers <= 80
    assert facts.loads() == {128: 8}
    assert facts.variants["STG.E.128"] >= 2
    assert str(facts).startswith(f"{facts.registers} registers, 0 B spilled")


def test_packed_rows_are_loaded_wide():
    low = lowered(rows, torch.zeros(3, 656).to(torch.uint8), torch.zeros(9, dtype=torch.int32))
    facts = report(emit(low.kernel, low.schedule))
    assert facts.loads()[128] >= 2
    assert facts.spills == 0


@pytest.mark.parametrize(("precision", "spelt"), [("ieee", "ieee"), ("tf32", "tf32"), ("fp8", "ieee")])
def test_products_of_f32_are_those_of_f32_unless_cut(precision, spelt):
    @tile.kernel
    def product(x: Tensor[T, H, f32], w: Tensor[P, H, f32]):
        y = tile.empty([T, P], f32)
        for t, p in tile.parallel(tile.blocks(T, "t"), tile.blocks(P, "p")):
            y[t, p] = tile.dot(x[t, :], w[p, :].T, precision=precision)
        return y

    assert f'input_precision="{spelt}"' in product.lower("triton", T=64, H=128, P=64).source


@pytest.mark.parametrize(("dtype", "precision"), [(bf16, "ieee"), (e4m3, "ieee"), (e4m3, "fp8")])
def test_product_uses_the_tensor_cores(dtype, precision):
    """FP8 units only where asked for: on Hopper they do not sum in f32."""
    x, w = torch.zeros(128, 512).to(dtype.torch), torch.zeros(256, 512).to(dtype.torch)
    low = lowered(
        gemm, x, w, precision, schedule=Schedule({"t": 128, "p": 128, "h": 64 if dtype is bf16 else 128}, 8, 3)
    )
    facts = report(emit(low.kernel, low.schedule, Spec(divisible=frozenset("P"))))
    used, other = ("QGMMA", "HGMMA") if precision == "fp8" else ("HGMMA", "QGMMA")
    assert facts.count(used) > 0
    assert facts.count(other) == 0
    assert facts.count("LDGSTS") > 0
    assert facts.spills == 0


@tile.kernel
def turn(x: Tensor[T, f32], y: Tensor[T, f32], cos: Tensor[T, f32], sin: Tensor[T, f32], apart: Static[bool]):
    z = tile.empty([T], f32)
    for t in tile.parallel(tile.blocks(T, "t")):
        if apart:
            z[t] = tile.mul_rn(x[t], cos[t]) - tile.mul_rn(y[t], sin[t])
        else:
            z[t] = x[t] * cos[t] - y[t] * sin[t]
    return z


@pytest.mark.parametrize("apart", [False, True])
def test_products_rounded_by_themselves_are_not_fused(apart):
    numbers = [torch.randn(64) for _ in range(4)]
    low = lowered(turn, *numbers, apart)
    facts = report(emit(low.kernel, low.schedule))
    assert (facts.count("FFMA") == 0) == apart
    x, y, cos, sin = numbers
    found = run_interpreted(low, dict(zip(("x", "y", "cos", "sin"), numbers)), {"T": 64})
    assert torch.equal(found[0], x * cos - y * sin)


def test_registers_can_be_limited():
    x = (torch.zeros(2, 7168).bfloat16(), torch.zeros(7168).bfloat16(), 1e-6)
    low = lowered(norm, *x, schedule=Schedule({"row": 1}, warps=8))
    free = report(emit(low.kernel, low.schedule)).registers
    few = report(emit(low.kernel, replace(low.schedule, registers=40))).registers
    assert few <= 40 < free
    assert Schedule.from_json(Schedule(registers=24).to_json()).registers == 24
    with pytest.raises(LoweringError, match="registers must be 16 to 255"):
        Schedule(registers=256)


def test_dependent_launch_and_persistence_compile():
    low = lowered(norm, *NORM, schedule=Schedule({"row": 2}, persistent=2, pdl=True))
    facts = report(emit(low.kernel, low.schedule))
    assert facts.count("ACQBULK") > 0  # griddepcontrol.wait


def test_a_later_process_finds_the_binary_without_triton():
    low = lowered(norm, *NORM)
    made = compile_kernel(low.kernel, low.schedule, name="norm-of-this-test")
    assert "def norm(x, w, y, T, eps):" in made.source
    assert made.report().registers > 0
    assert "norm" in repr(made)
    code = (
        "import sys\n"
        "from tilery.tile.targets.triton import find_cached\n"
        "found = find_cached('norm-of-this-test')\n"
        "assert found is not None and len(found.binary.cubin) > 1000\n"
        "assert 'triton' not in sys.modules\n"
        "print(found.plan.grid_size({'T': 5, 'H': 128}, {}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == made.plan.grid_size({"T": 5, "H": 128}, {})
    assert find_cached("never-made") is None


def test_a_damaged_entry_is_built_again():
    low = lowered(norm, *NORM, schedule=Schedule({"row": 4}))
    made = compile_kernel(low.kernel, low.schedule)
    (made.binary.folder / "binary.json").write_text("{")
    again = compile_kernel(low.kernel, low.schedule)
    assert again.binary.cubin == made.binary.cubin
    assert (made.binary.folder / "binary.json").read_text() != "{"


def test_what_triton_refuses_is_told_with_the_source(monkeypatch):
    from tilery.tile.targets.triton import values

    monkeypatch.setitem(values.VALUES, "reduce", lambda op, args, helpers: f"tl.no_such_reduction({args[0]})")
    low = lowered(norm, *NORM, schedule=Schedule({"row": 8}))
    emitted = emit(low.kernel, low.schedule)
    with pytest.raises(LoweringError, match=r"Triton cannot compile 'norm'(.|\n)*no_such_reduction(.|\n)*failed-"):
        report(emitted)
    with pytest.raises(VerifyError, match=r"interpreter fails on 'norm': (.|\n)*no_such_reduction"):
        run_interpreted(low, norm.signature.bind(NORM, {}), {"T": 5, "H": 128})


def test_launch_needs_cuda():
    low = lowered(norm, *NORM)
    made = compile_kernel(low.kernel, low.schedule)
    with pytest.raises(LaunchError, match=r"norm: the Triton target needs CUDA tensors; move them with .cuda\(\)"):
        made.launch(norm.signature.bind(NORM, {}), {"T": 5, "H": 128})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_launcher_builds_and_says_that_there_is_no_driver():
    with pytest.raises(RuntimeError, match=r"libcuda.so.1 cannot be loaded: there is no NVIDIA driver"):
        native.load().load(b"", "name", 0, 4, 0, 0, "pi")
    with pytest.raises(TypeError, match="launch"):
        native.load().launch()


def test_the_launch_function():
    """What a launch does, as text: outputs that are given are used, strides are read, the grid is computed."""
    low = lowered(norm, *NORM, schedule=Schedule({"row": 2}, persistent=3))
    text = launch_source(emit(low.kernel, low.schedule, Spec(strided=frozenset("x"))).plan)
    for line in (
        "    y = arguments.get('y')",
        "        y = _empty((T, 128, ), dtype=_dtypes['e4m3'], device=_where)",
        "    _grid = max(-(-(T) // 2), 0)",
        "    _grid = min(_grid, 3 * _processors(_index))",
        "x.data_ptr(), x.stride(0), w.data_ptr(), y.data_ptr(), T, arguments['eps'])",
        "    return (y, )",
    ):
        assert line in text
