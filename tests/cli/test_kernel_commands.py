"""`tilery kernels`: tile kernels listed, shown at each stage and verified."""

from __future__ import annotations

import importlib.util

import pytest

from tests.tile import runtime_kernels
from tilery.cli import kernels

NAMES = ("norm", "scale", "clear", "counts")


@pytest.fixture(autouse=True)
def _own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands over the tests' kernels, which are quick to compile."""
    monkeypatch.setattr(kernels, "KERNELS", "tests.tile")
    monkeypatch.setattr("tilery.tile.registry.discover", lambda package: None)
    found = [getattr(runtime_kernels, name) for name in NAMES]
    monkeypatch.setattr("tilery.tile.registry._KERNELS", {k.full_name: k for k in found})


def test_list_names_kernels_with_targets_and_cases(tilery) -> None:
    out = tilery("kernels", "list").out
    for name in NAMES:
        assert name in out
    assert "cpu, cuda" in out
    assert "ragged, empty" in out
    assert "RMSNorm." in out


def test_show_prints_each_stage(tilery) -> None:
    assert "def norm(x: Tensor[T, H, bf16], w: Tensor[H, bf16], eps: f32)" in tilery("kernels", "show", "norm").out
    bound = tilery("kernels", "show", "norm", "--stage", "bound", "--dim", "T=64", "--dim", "H=48").out
    assert "Tensor[T, 48, bf16]" in bound
    assert 'stage="padded"' in tilery("kernels", "show", "norm", "--stage", "padded", "--case", "ragged").out
    assert "k_norm_launch" in tilery("kernels", "show", "norm", "--stage", "cpu").out
    assert "@triton.jit" in tilery("kernels", "show", "norm", "--stage", "triton", "--dim", "H=64").out
    static = tilery("kernels", "show", "counts", "--dim", "bins=4")
    assert "Tensor[4, i32]" in static.out


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_show_prints_machine_code(tilery) -> None:
    assert ".target sm_90a" in tilery("kernels", "show", "norm", "--stage", "ptx").out
    assert "EXIT" in tilery("kernels", "show", "norm", "--stage", "sass").out


def test_machine_code_without_triton_says_what_is_missing(tilery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilery.tile.show.importlib.util.find_spec", lambda name: None)
    ran = tilery("kernels", "show", "norm", "--stage", "sass")
    assert ran.code == 2
    assert "sass needs the package triton, which is not installed" in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nrm"], "no kernel is named 'nrm'; expected one of clear, counts, norm, scale."),
        (["norm", "--stage", "soup"], "no stage 'soup'; there are: trace"),
        (["norm", "--dim", "T"], "--dim T: expected NAME=VALUE with a Python literal, as in --dim T=64."),
        (["norm", "--dim", "T=many"], "--dim T=many: expected NAME=VALUE"),
        (["norm", "--dim", "W=3"], "norm: no dimension or parameter 'W'; it has T, H, x, w, eps"),
        (["norm", "--dim", "T=3", "--stage", "cpu"], "norm: H shapes tiles and needs a value: T=64, H=64"),
        (["norm", "--dim", "T=3", "--case", "ragged"], "--dim and --case both choose the sizes; give one of them."),
        (["norm", "--case", "none"], "kernel 'norm' has no case 'none'; it has ragged, empty"),
        (["clear"], "clear declares no case: give its dimensions, T=64"),
        (["counts", "--dim", "N=4"], "counts: the static parameter 'bins' needs a value: bins=..."),
    ],
)
def test_mistakes_of_show(tilery, arguments: list[str], message: str) -> None:
    ran = tilery("kernels", "show", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err


def test_verify_one_and_all(tilery, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tilery("kernels", "verify", "norm")
    assert ran.code == 0
    assert "triton: padded" in ran.out
    assert "norm: ok, 2 cases" in ran.out
    monkeypatch.setattr(runtime_kernels.norm, "reference", lambda x, w, eps=1e-6: x * 3)
    ran = tilery("kernels", "verify", "--all")
    assert ran.code == 2
    assert ran.err == "tilery: kernels verify: 1 of 2 kernels failed: norm.\n"
    assert "norm: WRONG" in ran.out
    assert "scale: ok" in ran.out
    monkeypatch.setattr(runtime_kernels.norm, "reference", lambda *args, **kwargs: 1 / 0)
    assert "norm: ZeroDivisionError: division by zero" in tilery("kernels", "verify", "norm").out


def test_verify_wants_a_name_or_all(tilery) -> None:
    for arguments in ([], ["norm", "--all"]):
        ran = tilery("kernels", "verify", *arguments)
        assert (ran.code, ran.err) == (2, "tilery: kernels verify: name one kernel, or give --all.\n")


def test_the_packages_own_kernels_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = kernels.known_kernels()
    assert found
    for kernel in found:
        assert kernel.full_name.startswith("tilery.ops.kernels.")
        assert kernel.reference is not None, f"{kernel.name} has no reference"
        assert kernel.cases, f"{kernel.name} has no case"
