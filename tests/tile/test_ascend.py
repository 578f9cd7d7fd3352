"""The Ascend target: the kept texts, what they compute in plain Triton's interpreter, what is refused and where."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from tilery import tile
from tilery.cli import kernels
from tilery.cli.errors import CliError
from tilery.ops.kernels import amla, attention, norm, products, quantize, rope
from tilery.tile import Dim, Kernel, Schedule, Static, Tensor, bf16, e4m3, f32, i8, i32, i64, interpret, u8
from tilery.tile.errors import LaunchError, LoweringError
from tilery.tile.show import text_of
from tilery.tile.targets.ascend import A2, emit_lowered, golden, linalg, run_interpreted
from tilery.tile.targets.ascend.capabilities import KIB, Capabilities
from tilery.tile.targets.ascend.emit import emit
from tilery.tile.targets.ascend.memory import doubled, footprint
from tilery.tile.verify import clone, tolerances

T, H, K, P = Dim("T"), Dim("H"), Dim("K", min=1), Dim("P", min=1)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


# ---- the kept texts --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> list[golden.Result]:
    """Every kernel of the operators, tried."""
    return list(golden.results())


def test_texts_and_table_are_up_to_date(found):
    wrong = golden.stale(found)
    assert not wrong, f"{wrong} differ; if that is meant: python -m tilery.tile.targets.ascend.golden"


def test_every_kernel_is_expressed_or_says_why(found):
    assert len(found) >= 70
    for result in found:
        assert result.text or result.refused, result.kernel
        for reason in result.refused:
            assert "`" in reason, f"{result.kernel}: no source line in {reason!r}"
    assert sum(bool(r.text) for r in found) >= 40


def test_texts_keep_to_what_triton_ascend_has(found):
    total = 0
    for result in (r for r in found if r.text):
        total += len(result.text)
        assert "tl.num_programs(0)" in result.text, "one program per core"
        for word in ("evict", "gdc_", "libdevice", "inline_asm", "float8", "uint8", "debug_barrier", "descriptor",
                     "relaxed", "tl.sort", "tl.histogram", "fp8", "*u8"):  # fmt: skip
            assert word not in result.text, f"{result.kernel}: {word}"
        assert set(linalg.signature_of(result.text).values()) <= {
            "*i1", "*i8", "*i16", "*i32", "*i64", "*fp16", "*bf16", "*fp32", "i32", "i64", "fp32",
        }  # fmt: skip
    assert total < 600_000


def test_a_changed_text_is_noticed(found, tmp_path, monkeypatch):
    monkeypatch.setattr(golden, "GOLDEN", tmp_path / "texts")
    monkeypatch.setattr(golden, "PAGE", tmp_path / "page.md")
    golden.PAGE.write_text(f"before\n{golden.BEGIN}\nold\n{golden.END}\nafter\n")
    golden.write(found)
    assert golden.stale(found) == []
    assert golden.PAGE.read_text().startswith("before\n")
    assert golden.PAGE.read_text().endswith(f"{golden.END}\nafter\n")
    (golden.GOLDEN / "rms_norm.txt").write_text("something else")
    (golden.GOLDEN / "gone.txt").write_text("")
    assert golden.stale(found) == ["rms_norm.txt", "gone.txt"]


# ---- what the texts compute ------------------------------------------------------------------------------------------

RUN: tuple[tuple[Kernel, str], ...] = (
    (norm.rms_norm, "ragged"), (attention.mla_decode, "plain_slots"), (attention.mla_combine, "with_an_empty_part"),
    (quantize.quantize_int8_rows, "odd_width"), (products.int8_gemm, "int8_ragged"), (rope.rope, "mla_query"),
    (rope.rope_inplace, "inplace_interleaved"), (amla.amla_decode, "amla_peaky"), (amla.amla_decode, "amla_holes"),
)  # fmt: skip


@needs_triton
@pytest.mark.parametrize(("kernel", "case"), RUN, ids=lambda v: v if isinstance(v, str) else v.name)
def test_the_text_computes_what_the_reference_does(kernel: Kernel, case: str) -> None:
    assert golden.differences(kernel, case) == []


@needs_triton
def test_a_wrong_text_is_noticed(monkeypatch):
    def doubled_outputs(*given: Any) -> Any:
        return tuple(2 * out for out in run_interpreted(*given))

    monkeypatch.setattr(golden, "run_interpreted", doubled_outputs)
    assert golden.differences(norm.rms_norm, "ragged") == ["y"]


def test_every_stage_runs_in_the_reference_interpreter():
    kernel = norm.rms_norm
    arguments = kernel.signature.bind((), kernel.arguments("ragged"))
    low = kernel.lower("ascend", **arguments)
    _, env = kernel.specialise(arguments)
    assert kernel.reference is not None
    wanted = kernel.reference(**arguments)
    assert {"trace", "bound", "padded"} <= {name for name, _ in low.stages}
    for _, stage in low.stages:
        (out,) = interpret.run(stage, clone(arguments), env)
        assert tolerances(kernel, [out.dtype])[0].compare(out, wanted).ok


@tile.kernel
def scaled(x: Tensor[T, H, bf16], factor: float):
    y = tile.empty([T, H], bf16)
    for t in tile.parallel(tile.blocks(T, "row")):
        y[t, :] = (x[t, :].to(f32) * factor).to(bf16)
    return y


def test_show_and_print(capsys):
    low = scaled.lower("ascend", T=64, H=256)
    low.print()
    assert capsys.readouterr().out.strip() == low.source.strip()
    assert text_of(scaled, "ascend", known={"T": 64, "H": 256}) == emit_lowered(
        low, emit_spec := golden_spec(T=64, H=256)
    ).source  # fmt: skip
    assert emit_spec.divisible
    assert 'stage="padded"' in text_of(scaled, "padded", known={"T": 64, "H": 256}, target="ascend")
    with pytest.raises(LaunchError, match="this one is for 'triton'"):
        emit_lowered(scaled.lower("triton", T=64, H=256))


def test_the_command_shows_a_target(capsys):
    kernels.show_kernel("rms_norm", target="ascend", dim=["T=64", "H=256"])
    assert "# rms_norm for Atlas A2/A3" in capsys.readouterr().out
    kernels.show_kernel("rms_norm", stage="padded", target="ascend", dim=["T=64", "H=256"])
    assert 'stage="padded"' in capsys.readouterr().out
    with pytest.raises(CliError, match="FP8"):
        kernels.show_kernel("rms_norm_quant", target="ascend")


def golden_spec(**dims: int) -> Any:
    from tilery.tile.targets.triton import Spec

    return Spec(divisible=frozenset(n for n, v in dims.items() if v % 16 == 0))


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_the_bound_counts_what_lives_at_once():
    """x bf16, its f32 form and the product live together; then the product and the result."""
    low = scaled.lower("ascend", schedule=Schedule({"row": 4}), T=64, H=250)
    at_product = 4 * 256 * (4 + 4)
    assert footprint(low.kernel, A2).unified == at_product
    assert doubled(footprint(low.kernel, A2), A2)
    assert "# memory: at most 8 KiB of the unified buffer, 0 KiB of L1\n" in low.source


def test_blocks_are_halved_until_they_fit():
    low = scaled.lower("ascend", schedule=Schedule({"row": 64}), T=64, H=4096)
    assert low.schedule["row"] == 4
    assert low.schedule.reasons["row"] == "halved from 8: the tiles took 256 KiB of 192"
    assert low.schedule.persistent == 1
    assert "compile with multibuffer=False" in low.source


def test_a_row_that_never_fits_says_where():
    with pytest.raises(
        LoweringError, match=r"test_ascend.py:\d+: ascend: the tiles that live here take 256 KiB"
    ) as error:
        scaled.lower("ascend", T=4, H=32768)
    assert "y[t, :] = (x[t, :].to(f32) * factor).to(bf16)" in str(error.value)


@tile.kernel
def product(a: Tensor[T, K, bf16], b: Tensor[P, K, bf16]):
    c = tile.empty([T, P], f32)
    for t, p in tile.parallel(tile.blocks(T, "t"), tile.blocks(P, "p")):
        acc = tile.zeros([t.extent, p.extent], f32)
        for k in tile.range(tile.blocks(K, "k")):
            acc = tile.dot(a[t, k], b[p, k].T, acc)
        c[t, p] = acc
    return c


def test_products_fit_the_cube_core():
    """Operands go from memory to L1; no block falls below what a product takes."""
    low = product.lower("ascend", schedule=Schedule({"t": 256, "p": 256, "k": 16}), T=999, P=999, K=999)
    assert (low.schedule["t"], low.schedule["k"]) == (128, 16)
    found = footprint(low.kernel, A2)
    assert found.l1 >= (low.schedule["t"] + low.schedule["p"]) * 16 * 2
    assert "cube cores (24)" in low.source
    small = product.lower("ascend", schedule=Schedule({"t": 1, "p": 1, "k": 1}), T=999, P=999, K=999)
    assert dict(small.schedule.blocks) == {"t": 16, "p": 16, "k": 16}
    with pytest.raises(LoweringError, match="dot needs 1 KiB of L0C"):
        emit(small.kernel, small.schedule, record=Capabilities(l0c=512))


def test_another_core_is_another_record():
    low = scaled.lower("ascend", T=64, H=4096)
    with pytest.raises(LoweringError, match="a core has 16"):
        emit(low.kernel, low.schedule, record=Capabilities(unified=16 * KIB))


# ---- what is refused -------------------------------------------------------------------------------------------------


@tile.kernel
def to_fp8(x: Tensor[T, f32]):
    y = tile.empty([T], e4m3)
    for t in tile.parallel(tile.blocks(T, "t")):
        y[t] = x[t].to(e4m3)
    return y


@tile.kernel
def bytes_(x: Tensor[T, u8]):
    y = tile.empty([T], i32)
    for t in tile.parallel(tile.blocks(T, "t")):
        y[t] = x[t].to(i32)
    return y


@tile.kernel
def field_(x: Tensor[T, 64, i8]):
    y = tile.empty([T], f32)
    scales = x.view(f32, [T, 16], strides=[16, 1])
    for t in tile.parallel(tile.blocks(T, "t")):
        y[t] = scales[t, 3]
    return y


@tile.kernel
def one_of(x: Tensor[T, 64, (f32, i32, i64)], what: Static[str]):
    y = tile.empty([T, 64], x.dtype)
    for t in tile.parallel(tile.blocks(T, "t")):
        v = x[t, :]
        if what == "sort":
            v = tile.sort(v)
        elif what == "tanh":
            v = tile.tanh(v)
        elif what == "mul_rn":
            v = tile.mul_rn(v, v)
        elif what == "where":
            v = tile.where(v > 0, v, 0)
        elif what == "take":
            v = tile.take(v, tile.zeros([t.extent, 64], i32), axis=1)
        elif what == "transpose":
            v = v.reshape(t.extent, 8, 8).transpose(2, 1, 0).transpose(2, 1, 0).reshape(t.extent, 64)
        elif what == "scan":
            v = tile.cummax(v, axis=1, reverse=True)
        elif what == "axes":
            v = v.reshape(t.extent, 2, 2, 2, 2, 4).reshape(t.extent, 64)
        y[t, :] = v
    return y


@tile.kernel
def old_count(x: Tensor[T, i32], read: Static[bool]):
    counts, at = tile.empty([16], i32, init=0), tile.empty([T], i32, init=0)
    for t in tile.parallel(tile.blocks(T, "t")):
        before = counts.atomic_add(x[t], 1)
        if read:
            at[t] = before
    return counts, at


@tile.kernel
def gathered(x: Tensor[P, 64, f32], at: Tensor[T, i32]):
    y = tile.empty([T, 64], f32)
    for t in tile.parallel(tile.blocks(T, "t")):
        y[t, :] = x[at[t], :]
    return y


@pytest.mark.parametrize(
    ("kernel", "known", "message", "line"),
    [
        (to_fp8, {}, r"FP8 \(e4m3\), which cores of A2 and A3 neither load", "y[t] = x[t].to(e4m3)"),
        (bytes_, {}, "load of u8: triton-ascend documents it for b1, bf16", "y[t] = x[t].to(i32)"),
        (field_, {}, "view of i8 memory as f32: triton-ascend does not convert a pointer", "scales = x.view("),
        (one_of, {"what": "sort"}, "sort: triton-ascend's table", "v = tile.sort(v)"),
        (one_of, {"what": "tanh"}, "tanh is a libdevice function", "v = tile.tanh(v)"),
        (one_of, {"what": "mul_rn"}, "mul_rn: whether bisheng keeps", "v = tile.mul_rn(v, v)"),
        (one_of, {"what": "where", "x": i64}, "where of i64: triton-ascend documents it for", "v = tile.where("),
        (one_of, {"what": "take", "x": i32}, "take of i32: triton-ascend documents it for bf16", "v = tile.take("),
        (one_of, {"what": "transpose"}, r"transpose\(2, 1, 0\): triton-ascend swaps neighbouring", "v.reshape("),
        (one_of, {"what": "scan"}, "a reverse cummax needs unmasked loads", "v = tile.cummax("),
        (one_of, {"what": "axes"}, "has 6 axes, triton-ascend takes 5", "v.reshape(t.extent, 2, 2"),
        (old_count, {"read": True}, "the old value of an atomic", "before = counts.atomic_add(x[t], 1)"),
    ],
)
def test_refusals_name_the_line(kernel: Kernel, known: dict[str, Any], message: str, line: str) -> None:
    with pytest.raises(LoweringError, match=r"test_ascend\.py:\d+: ascend: .*" + message) as error:
        kernel.lower("ascend", T=64, **known)
    assert line in str(error.value)


def test_what_is_like_it_is_not_refused():
    assert "tl.atomic_add" in old_count.lower("ascend", T=64, read=False).source
    assert 'sem="acq_rel"' in old_count.lower("ascend", T=64, read=False).source
    assert "tl.where" in one_of.lower("ascend", T=64, what="where").source
    assert "tl.gather" in one_of.lower("ascend", T=64, what="take").source


def test_gathers_start_at_two_rows():
    low = gathered.lower("ascend", schedule=Schedule({"t": 1}), T=64, P=9)
    assert low.schedule["t"] == 2
    alone = gathered.lower("triton", schedule=Schedule({"t": 1}), T=64, P=9)
    with pytest.raises(LoweringError, match="a gather of one row"):
        emit(alone.kernel, alone.schedule)


# ---- the lowering to linalg ------------------------------------------------------------------------------------------


def test_without_triton_ascend_the_command_says_what_to_do(capsys, monkeypatch):
    monkeypatch.setattr(linalg, "installed", lambda: None)
    assert linalg.main([]) == 2
    told = capsys.readouterr()
    assert "triton-ascend is not installed" in told.err
    assert "pip install 'numpy<2.4' triton-ascend==3.2.0" in told.err
    assert not told.out


def test_a_text_that_is_none_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(linalg, "installed", lambda: "3.2.0")
    monkeypatch.setattr(linalg, "to_linalg", lambda text, folder: str(linalg.signature_of(text)))
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text(scaled.lower("ascend", T=4, H=64).source)
    bad.write_text("x = 1\n")
    assert linalg.main([str(good), "--out", str(tmp_path / "out")]) == 0
    assert "'x': '*bf16'" in (tmp_path / "out" / "good.mlir").read_text()
    assert linalg.main([str(good), str(bad)]) == 1
    assert "bad: ValueError: no line begins with '# signature: '" in capsys.readouterr().out
