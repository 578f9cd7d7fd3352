"""`verify`: the table, the first bad stage, and what each mistake is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tile.runtime_kernels import T, clear, norm, scale
from tilery import tile
from tilery.tile import Tensor, Tolerance, f32
from tilery.tile.errors import LoweringError, VerifyError
from tilery.tile.targets.cpu.executable import compile_many
from tilery.tile.tolerance import EXACT, default_tolerance
from tilery.tile.verify_all import verify_all


def test_every_stage_of_every_case_is_compared() -> None:
    report = scale.verify()
    assert report.ok
    assert report.first_bad is None
    stages = {row.stage for row in report.rows}
    assert {"trace", "cpu: bound", "triton: padded", "triton: emitted", "cpu: compiled"} <= stages
    assert {"cpu: bound, blocks of 1", "triton: padded, blocks of 4"} <= stages
    assert {row.case for row in report.rows} == {"with_both", "alone"}
    table = str(report)
    assert table.splitlines()[0] == "scale"
    assert "max abs" in table
    assert " NO" not in table


def test_arguments_are_verified_and_left_alone() -> None:
    x = torch.ones(4)
    report = scale.verify(x, None, 3, k=1)
    assert {row.case for row in report.rows} == {"arguments"}
    assert x.tolist() == [1, 1, 1, 1]
    assert clear.verify(torch.ones(20)).ok  # without a reference the traced IR is one
    assert norm.verify(case="empty").ok


def wrong(offset: float, **options):
    @tile.kernel(reference=lambda x: x + offset, **options)
    def plus(x: Tensor[T, f32]):
        y = tile.empty([T], f32)
        for t in tile.parallel(tile.blocks(T, "row")):
            y[t] = x[t] + 1.0
        return y

    return plus


def test_a_wrong_kernel_fails_at_its_first_stage() -> None:
    plus = wrong(1.5)
    with pytest.raises(
        VerifyError,
        match="kernel 'plus', case 'arguments': stage 'trace' is the first that differs from the reference: y has "
        r"100.00% of its elements outside the tolerance, the largest error is 0.5",
    ):
        plus.verify(torch.zeros(3))
    report = plus.verify(torch.zeros(3), raises=False)
    assert not report.ok
    assert " NO" in str(report)


def test_a_wrong_pass_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilery.tile import passes
    from tilery.tile.ir import rewrite

    def spoil(kernel, *args):
        kernel = passes.bind(kernel, *args)

        def visit(op):
            if op.name == "add":
                return (replace(op, operands=tuple(3.0 if o == 1.0 else o for o in op.operands)),)
            return None

        return replace(kernel, body=rewrite(kernel.body, visit))

    plus = wrong(1.0)
    original = passes.bind
    with monkeypatch.context() as patch:
        patch.setattr("tilery.tile.lowering.passes.bind", lambda *a: spoil_with(original, *a))

        def spoil_with(bind, kernel, *args):
            patch.setattr("tilery.tile.lowering.passes.bind", bind)
            try:
                return spoil(kernel, *args)
            finally:
                patch.setattr("tilery.tile.lowering.passes.bind", lambda *a: spoil_with(bind, *a))

        report = plus.verify(torch.zeros(3), raises=False)
    bad = report.first_bad
    assert bad is not None
    assert bad.stage == "cpu: bound"
    assert report.rows[0].ok


def test_a_stage_that_raises_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plus = wrong(1.0)
    monkeypatch.setattr("tilery.tile.targets.cpu.executable.compile_many", lambda *a: 1 / 0)
    with pytest.raises(VerifyError, match="stage 'cpu: compiled' does not run: ZeroDivisionError: division by zero"):
        plus.verify(torch.zeros(3))


def test_a_case_that_does_not_compile_spoils_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def compile_some(items, *options):
        runs.append(len(items))
        if any("load(r," in str(kernel) for kernel, *_ in items):  # the case that has r
            raise LoweringError("no such instruction")
        return compile_many(items, *options)

    monkeypatch.setattr("tilery.tile.targets.cpu.executable.compile_many", compile_some)
    report = scale.verify(raises=False)
    assert [(r.case, r.stage, r.error) for r in report.rows if not r.ok] == [
        ("with_both", "cpu: compiled", "LoweringError: no such instruction")
    ]
    assert runs == [2, 1, 1]  # together, then one by one


@pytest.mark.parametrize("processes", [1, 2])
def test_many_kernels_at_a_time(processes: int) -> None:
    bad = wrong(1.0)  # has no cases; another process does not even find it
    found = list(verify_all([norm, bad, scale], processes))
    assert [kernel for kernel, *_ in found] == [norm, bad, scale]
    for _, report, seconds in (found[0], found[2]):
        assert not isinstance(report, str)
        assert report.ok
        assert seconds > 0
    assert found[1][1].startswith(
        "VerifyError: kernel 'plus' has no cases" if processes == 1 else "TileError: no kernel"
    )


def test_mistakes_of_a_declaration() -> None:
    with pytest.raises(
        VerifyError, match=r"kernel 'clear' has no cases: declare one with @clear\.case, or give arguments"
    ):
        clear.verify()
    plus = wrong(1.0, tolerance=(EXACT, EXACT))
    with pytest.raises(VerifyError, match="kernel 'plus' declares 2 tolerances for 1 compared tensors"):
        plus.verify(torch.zeros(3))
    plus = wrong(1.0)
    plus.reference = lambda x: None
    with pytest.raises(VerifyError, match="the reference of kernel 'plus' returns 0 tensors, the kernel 1: y"):
        plus.verify(torch.zeros(3))
    plus.reference = lambda x: x.double()
    with pytest.raises(VerifyError, match=r"the reference of kernel 'plus' gives torch.float64 \[3\] for 'y'"):
        plus.verify(torch.zeros(3))


def test_tolerances() -> None:
    a = torch.tensor([1.0, 2.0, float("nan"), float("inf")])
    assert EXACT.compare(a, a).ok
    assert not EXACT.compare(a, torch.tensor([1.0, 2.0, float("nan"), 1.0])).ok
    found = Tolerance(0.1, 0.0).compare(torch.tensor([1.0, 2.5, 3.05, 4.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (found.ok, found.outside, found.absolute) == (False, 0.25, 0.5)
    assert Tolerance(0.1, 0.0, bad=0.25).compare(torch.tensor([1.0, 2.5, 3.0, 4.0]), torch.arange(1.0, 5.0)).ok
    assert EXACT.compare(torch.empty(0), torch.empty(0)).ok
    assert default_tolerance(torch.int32) == EXACT
    assert default_tolerance(torch.bfloat16).rtol > default_tolerance(torch.float32).rtol
    with pytest.raises(ValueError, match="a tolerance needs atol >= 0"):
        Tolerance(-1.0)
