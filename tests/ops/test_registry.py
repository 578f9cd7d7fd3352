"""Which implementation runs, and why; overrides and their errors."""

from dataclasses import replace

import pytest

from tilery.ops import registry
from tilery.ops.registry import Platform

CPU = Platform("cpu", "AVX2", True, 1)
CUDA = Platform("cuda", "sm_90", True, 1)


def test_the_best_valid_implementation_is_bound():
    ops = registry.select(CPU)
    for info in registry.list_operators(CPU):
        chosen = [row.name for row in info.implementations if row.chosen]
        assert chosen == [ops.chosen[info.name]] == [info.implementations[0].name]
    assert ops.platform is CPU
    assert ops.chosen["mla_decode"] == "batched-gather"


def test_every_operator_has_a_contract_and_a_reference():
    infos = registry.list_operators(CPU)
    assert [info.name for info in infos] == sorted(info.name for info in infos)
    for info in infos:
        assert len(info.contract) > 20
        assert "reference" in [row.name for row in info.implementations]


def test_reasons():
    (cpu,) = [info for info in registry.list_operators(CPU) if info.name == "mha_prefill"]
    assert [(row.name, row.target, row.available, row.reason, row.chosen) for row in cpu.implementations] == [
        ("sdpa", "any", True, "the fastest valid one here", True),
        ("reference", "any", True, "valid, but ranked lower", False),
        ("hopper", "cuda", False, "needs cuda, this is cpu", False),
    ]
    (cuda,) = [info for info in registry.list_operators(CUDA) if info.name == "mha_prefill"]
    assert ("sdpa", True) in [(row.name, row.available) for row in cuda.implementations]
    (cuda,) = [info for info in registry.list_operators(CUDA) if info.name == "swiglu"]
    assert ("fused", False, "needs cpu, this is cuda") in [
        (row.name, row.available, row.reason) for row in cuda.implementations
    ]


def test_a_wildcard_passes_over_what_is_for_another_device():
    pytest.importorskip("triton")
    chosen = registry.select(replace(CUDA, isa="sm_90"), {"*": "sdpa"}).chosen
    assert chosen["mha_prefill"] == "sdpa"
    gathered = registry.select(CPU, {"*": "batched-gather"}).chosen
    assert gathered["mla_decode"] == "batched-gather"
    with pytest.raises(ValueError, match=r"^no operator has an implementation 'hopper' for cpu$"):
        registry.select(CPU, {"*": "hopper"})
    with pytest.raises(ValueError, match="needs cuda, this is cpu"):
        registry.select(CPU, {"mla_decode": "hopper"})


def test_hopper_kernels_are_for_hopper():
    ampere = replace(CUDA, isa="sm_80")
    (decode,) = [info for info in registry.list_operators(ampere) if info.name == "mla_decode"]
    assert ("hopper", False, "needs compute capability 9.0 (sm_90), this is sm_80") in [
        (row.name, row.available, row.reason) for row in decode.implementations
    ]
    pytest.importorskip("triton")
    chosen = registry.select(replace(CUDA, isa="sm_90")).chosen
    assert [chosen[name] for name in ("mla_decode", "mha_prefill", "top_k_positions")] == ["hopper", "hopper", "tile"]
    assert registry.select(ampere).chosen["mla_decode"] == "tile"


def test_overrides():
    ops = registry.select(CPU, {"swiglu": "reference"})
    assert ops.chosen["swiglu"] == "reference"
    assert ops.chosen["add_rms_norm"] in ("tile", "fused")
    assert set(registry.select(CPU, {"*": "reference"}).chosen.values()) == {"reference"}
    mixed = registry.select(CPU, {"*": "reference", "swiglu": "fused"})
    assert mixed.chosen["swiglu"] == "fused"
    assert mixed.chosen["rms_norm"] == "reference"


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"^unknown operator 'attention'; there are: add_rms_norm, .*write_mla$"):
        registry.select(CPU, {"attention": "reference"})
    with pytest.raises(
        ValueError, match=r"^operator 'mha_prefill' has no implementation 'magic'; it has: reference, sdpa, hopper$"
    ):
        registry.select(CPU, {"mha_prefill": "magic"})
    with pytest.raises(ValueError, match=r"^no operator has an implementation 'magic'$"):
        registry.select(CPU, {"*": "magic"})
    with pytest.raises(
        ValueError, match=r"^implementation 'fused' of 'swiglu' cannot run here: needs cpu, this is cuda$"
    ):
        registry.select(CUDA, {"swiglu": "fused"})
    with pytest.raises(AttributeError, match=r"^no operator named 'flash'; there are: add_rms_norm,"):
        _ = registry.select(CPU).flash
