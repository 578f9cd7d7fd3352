"""The entry points for other engines: their signatures, what they refuse, how they are installed and fall back."""

from __future__ import annotations

import inspect
import logging
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from tilery.adapters import deep_gemm, flash_mla, install
from tilery.adapters.unsupported import Unsupported

FLASH_MLA = {
    "flash_mla_with_kvcache": [
        "q", "k_cache", "block_table", "cache_seqlens", "head_dim_v", "tile_scheduler_metadata", "num_splits",
        "softmax_scale", "causal", "is_fp8_kvcache", "indices", "attn_sink", "extra_k_cache",
        "extra_indices_in_kvcache", "topk_length", "extra_topk_length",
    ],
    "flash_mla_sparse_fwd": [
        "q", "kv", "indices", "sm_scale", "d_v", "attn_sink", "topk_length", "indexer_topk",
    ],
}  # fmt: skip
"""The libraries' documented parameters, in order (FlashMLA 2026-04, DeepGEMM 2026-06)."""

DEEP_GEMM = {
    "fp8_gemm_nt": ["a", "b", "d", "c", "recipe"],
    "m_grouped_fp8_gemm_nt_contiguous": ["a", "b", "d", "m_indices", "recipe"],
    "m_grouped_fp8_gemm_nt_masked": ["a", "b", "d", "masked_m", "expected_m", "recipe"],
    "fp8_mqa_logits": [
        "q", "kv", "weights", "cu_seq_len_k_start", "cu_seq_len_k_end", "clean_logits", "max_seqlen_k",
    ],
    "get_paged_mqa_logits_metadata": ["context_lens", "block_kv", "num_sms", "indices"],
    "fp8_paged_mqa_logits": [
        "q", "kv_cache", "weights", "context_lens", "block_table", "schedule_meta", "max_context_len", "clean_logits",
        "indices",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "name", "parameters"),
    [(flash_mla, *item) for item in FLASH_MLA.items()] + [(deep_gemm, *item) for item in DEEP_GEMM.items()],
)
def test_parameters_have_the_libraries_names_and_order(module: ModuleType, name: str, parameters: list[str]) -> None:
    found = [
        one.name
        for one in inspect.signature(getattr(module, name)).parameters.values()
        if one.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    assert found == parameters


def test_the_schedule_of_flash_mla_needs_no_arguments() -> None:
    schedule, splits = flash_mla.get_mla_metadata(torch.zeros(2, dtype=torch.int32), 128, 1)
    assert isinstance(schedule, flash_mla.FlashMLASchedMeta)
    assert splits is None


def decode(**changes: Any) -> dict[str, Any]:
    call: dict[str, Any] = {
        "q": torch.zeros(2, 1, 128, 576, dtype=torch.bfloat16),
        "k_cache": torch.zeros(4, 64, 1, 656, dtype=torch.uint8),
        "block_table": None, "cache_seqlens": None, "head_dim_v": 512, "tile_scheduler_metadata": None,
        "is_fp8_kvcache": True, "indices": torch.zeros(2, 1, 64, dtype=torch.int32),
    }  # fmt: skip
    return {**call, **changes}


DENSE = {
    "indices": None, "causal": True, "block_table": torch.zeros(2, 1, dtype=torch.int32),
    "cache_seqlens": torch.ones(2, dtype=torch.int32),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim_v": 256}, "head_dim_v 256; only 512"),
        ({"k_cache": torch.zeros(4, 32, 1, 656, dtype=torch.uint8)}, "pages of 32 tokens"),
        ({"extra_k_cache": torch.zeros(1)}, "a second cache"),
        ({"is_fp8_kvcache": False}, "a sparse bf16 cache"),
        ({"indices": None}, "without block_table"),
        ({"k_cache": torch.zeros(4, 128, 1, 656, dtype=torch.uint8)[:, ::2]}, "not contiguous"),
        ({**DENSE, "q": torch.zeros(2, 1, 8, 576, dtype=torch.bfloat16)}, "dense attention of 8 heads"),
        ({**DENSE, "q": torch.zeros(2, 65, 16, 576, dtype=torch.bfloat16)}, "65 tokens a request"),
    ],
)
def test_what_no_kernel_does_is_refused_by_name(changes: dict[str, Any], reason: str) -> None:
    pytest.importorskip("triton")
    with pytest.raises(Unsupported, match=reason):
        flash_mla.flash_mla_with_kvcache(**decode(**changes))


def test_deep_gemm_refuses_what_changes_the_meaning() -> None:
    pytest.importorskip("triton")
    pair = (torch.zeros(1, 128), torch.zeros(1, 1))
    d = torch.zeros(1, 1, dtype=torch.bfloat16)
    with pytest.raises(Unsupported, match="an addend c"):
        deep_gemm.fp8_gemm_nt(pair, pair, d, c=d)
    with pytest.raises(Unsupported, match=r"recipe \(1, 1, 128\)"):
        deep_gemm.fp8_gemm_nt(pair, pair, d, recipe=(1, 1, 128))
    with pytest.raises(Unsupported, match="float32"):
        deep_gemm.fp8_gemm_nt(pair, pair, d.float())
    with pytest.raises(Unsupported, match="use_psum_layout"):
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(pair, pair, d, d, use_psum_layout=True)
    weights = (torch.zeros(2, 8, 128), torch.zeros(2, 1, 1))
    with pytest.raises(Unsupported, match="not contiguous"):
        deep_gemm.fp8_gemm_nt(pair, (weights[0][0], weights[1][0]), torch.zeros(1, 16, dtype=torch.bfloat16)[:, ::2])
    with pytest.raises(Unsupported, match=r"\[N, K\] = \[4, 128\]"):
        deep_gemm.fp8_gemm_nt(pair, (weights[0][0, :4], weights[1][0]), torch.zeros(1, 4, dtype=torch.bfloat16))
    rows = (torch.zeros(2, 32, 128), torch.zeros(2, 32, 1))
    with pytest.raises(Unsupported, match="room for 32 rows"):
        deep_gemm.m_grouped_fp8_gemm_nt_masked(rows, weights, torch.zeros(2, 32, 8, dtype=torch.bfloat16), d, 1)


@pytest.mark.parametrize(("clean", "fill"), [(True, 2), (False, 0)])
def test_clean_logits_are_clean_on_both_sides(monkeypatch: pytest.MonkeyPatch, clean: bool, fill: int) -> None:
    pytest.importorskip("triton")
    from tilery.ops.hopper import index_logits

    given = []

    def noted(*_: Any, fill: int) -> torch.Tensor:
        given.append(fill)
        return torch.zeros(2, 128)

    monkeypatch.setattr(index_logits, "index_logits", noted)
    monkeypatch.setattr(index_logits, "index_logits_paged", noted)
    q, weights, lengths = torch.zeros(2, 64, 128), torch.zeros(2, 64), torch.ones(2, dtype=torch.int32)
    deep_gemm.fp8_mqa_logits(q, (q[0], weights[0]), weights, lengths, lengths, clean)
    cache, table = torch.zeros(3, 64, 1, 132, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.int32)
    deep_gemm.fp8_paged_mqa_logits(q[:, None], cache, weights, lengths, table, None, 100, clean)
    assert given == [fill, fill]


def test_indices_behind_the_last_row_name_none() -> None:
    indices = torch.tensor([[0, 5, -1], [6, 7, 2**31 - 1]], dtype=torch.int32)
    kept = flash_mla.kept(indices, 6)
    assert kept.tolist() == [[0, 5, -1], [-1, -1, -1]]
    assert kept.dtype == torch.int32


@pytest.mark.parametrize(
    ("rows", "offsets"),
    [
        ([0, 0, -1, 1, 1, -1, 3, 3], [0, 3, 6, 6, 8]),
        ([1, 1, 2, 2, 2, 2, 2, -1], [0, 0, 2, 8, 8]),
        ([0] * 8, [0, 8, 8, 8, 8]),
    ],
)
def test_group_numbers_become_offsets(rows: list[int], offsets: list[int]) -> None:
    assert deep_gemm.offsets_of(torch.tensor(rows, dtype=torch.int32), 4).tolist() == offsets


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for an installed flash_mla whose functions say that they were called."""
    module = ModuleType("flash_mla")
    module.flash_mla_with_kvcache = lambda *_, **__: "original"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_mla", module)
    for name in ("flash_mla.flash_mla_interface", "sgl_kernel", "vllm", "deep_gemm"):
        monkeypatch.setitem(sys.modules, name, None)
    return module


def test_install_replaces_what_is_there_once_and_falls_back(
    library: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton")
    original = library.flash_mla_with_kvcache
    assert install.install(["flash_mla"]) == ["flash_mla.flash_mla_with_kvcache"]
    replaced = library.flash_mla_with_kvcache
    assert replaced.tilery_original is original
    assert install.install(["flash_mla", "deep_gemm"]) == ["flash_mla.flash_mla_with_kvcache"]
    assert library.flash_mla_with_kvcache is replaced
    with caplog.at_level(logging.INFO):
        assert [replaced(**decode(head_dim_v=256)) for _ in range(2)] == ["original", "original"]
    assert caplog.text.count("The library's own is called") == 1


def test_a_call_with_other_parameters_goes_to_the_library(
    library: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install.install(["flash_mla"])
    with caplog.at_level(logging.INFO):
        assert library.flash_mla_with_kvcache(**decode(), of_tomorrow=1) == "original"
    assert "of_tomorrow" in caplog.text

    def broken(q: Any) -> None:
        raise TypeError("inside")

    library.flash_mla_with_kvcache = lambda *_: "original"  # type: ignore[attr-defined]
    monkeypatch.setattr(flash_mla, "flash_mla_with_kvcache", broken)
    install.install(["flash_mla"])
    with pytest.raises(TypeError, match="inside"):
        library.flash_mla_with_kvcache(1)


def test_errors_of_the_kernels_are_not_swallowed(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("indices must be int32")

    monkeypatch.setattr(flash_mla, "flash_mla_with_kvcache", broken)
    install.install(["flash_mla"])
    with pytest.raises(ValueError, match="must be int32"):
        library.flash_mla_with_kvcache()


def test_an_unknown_adapter_is_named() -> None:
    with pytest.raises(ValueError, match="unknown adapter 'flashmla'; expected one of flash_mla, deep_gemm"):
        install.install(["flashmla"])


def test_the_plug_in_does_nothing_unasked(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    original = library.flash_mla_with_kvcache
    monkeypatch.delenv(install.VARIABLE, raising=False)
    install.plugin()
    assert library.flash_mla_with_kvcache is original


def test_the_plug_in_says_why_it_cannot(
    library: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = library.flash_mla_with_kvcache
    monkeypatch.setenv(install.VARIABLE, "flash_mla")
    monkeypatch.setattr(install, "unavailable", lambda: "torch sees no CUDA device")
    install.plugin()
    assert library.flash_mla_with_kvcache is original
    assert "TILERY_ADAPTERS=flash_mla is ignored: torch sees no CUDA device" in caplog.text
    monkeypatch.setattr(install, "unavailable", lambda: None)
    install.plugin()
    assert library.flash_mla_with_kvcache is not original


def test_vllm_finds_the_plug_in() -> None:
    from importlib.metadata import entry_points

    found = [point for point in entry_points(group="vllm.general_plugins") if point.name == "tilery"]
    assert [point.value for point in found] == ["tilery.adapters.install:plugin"]
