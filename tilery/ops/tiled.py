"""The operators' kernels in the tile language (`ops.kernels`) as implementations named "tile", for CPUs and GPUs alike.

Each wrapper only gives a kernel its arguments in the kernel's order and picks the variant for the cache's format. Where
the shapes are not a kernel's, the operator's reference runs. Kernels compile at their first call: generated C++ on a
CPU, Triton on a GPU.
Imports: the operators' modules, and kernels when they are first called.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tilery.ops import attention, cache, elementwise, mla
from tilery.ops.native import build as native_build
from tilery.ops.quant import BLOCK
from tilery.ops.registry import Platform, implementation

FEW = 8
"""Tokens up to which the gate handles one at a time."""


def _unavailable(platform: Platform) -> str | None:
    if platform.device == "cuda":
        return None if importlib.util.find_spec("triton") else "needs the triton package"
    if os.environ.get(native_build.DISABLE, "") not in ("", "0"):
        return f"switched off by {native_build.DISABLE}"
    from tilery.tile.targets.cpu import build

    return None if build.compiler() else "no C++ compiler found"


def _unavailable_beside_bf16(platform: Platform) -> str | None:
    if platform.device == "cpu" and platform.bf16_matmul:
        return "this CPU multiplies bf16 matrices natively; torch does"
    return _unavailable(platform)


def tiled(of: str, unavailable: Callable[[Platform], str | None] = _unavailable) -> Any:
    return implementation(of, "tile", "any", rank=20, unavailable=unavailable)


@functools.cache
def _kernels() -> SimpleNamespace:
    """The modules of `ops.kernels` used here, imported at the first call: making all the kernels takes a moment."""
    from tilery.ops.kernels import (
        activation,
        attention,
        cache,
        embedding,
        indexer_prolog,
        mla_indexer_prolog,
        mla_prolog,
        moe,
        norm,
        rope,
    )
    from tilery.tile.dtypes import BY_TORCH

    return SimpleNamespace(
        activation=activation, attention=attention, cache=cache, embedding=embedding, indexer_prolog=indexer_prolog,
        mla_indexer_prolog=mla_indexer_prolog, mla_prolog=mla_prolog, moe=moe, norm=norm, rope=rope, dtype=BY_TORCH,
    )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """`x` with rows that are dense in themselves, as kernels want them."""
    return x if x.stride(-1) == 1 else x.contiguous()


# ---- elementwise -----------------------------------------------------------------------------------------------------


@tiled("rms_norm")
def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    if x_TH.dim() != 2:
        return elementwise.rms_norm(x_TH, weight_H, eps)
    return _kernels().norm.rms_norm(_rows(x_TH), weight_H, eps)


@tiled("add_rms_norm")
def add_rms_norm(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _kernels().norm.rms_norm_residual(_rows(x_TH), _rows(residual_TH), weight_H, eps)


@tiled("layer_norm")
def layer_norm(x_TH: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float) -> Tensor:
    if x_TH.dim() != 2:
        return elementwise.layer_norm(x_TH, weight_H, bias_H, eps)
    return _kernels().norm.layer_norm(_rows(x_TH), weight_H, bias_H, eps)


@tiled("swiglu")
def swiglu(gate_up_TI: Tensor) -> Tensor:
    if gate_up_TI.dim() != 2:
        return elementwise.swiglu(gate_up_TI)
    return _kernels().activation.swiglu(_rows(gate_up_TI))


@tiled("embed")
def embed(
    table_VH: Tensor, ids_T: Tensor, cos_MR: Tensor, sin_MR: Tensor, positions_T: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    k = _kernels()
    return k.embedding.embed_at(table_VH, ids_T, cos_MR, sin_MR, positions_T, k.dtype[dtype])


# ---- between the products of attention -------------------------------------------------------------------------------


def _packs(cache_rows: Tensor, latent: int) -> bool:
    """Whether the latent's kernels fit: any plain row, packed rows of whole groups."""
    return cache_rows.dtype is not torch.uint8 or latent % BLOCK == 0


@tiled("mla_prolog")
def mla_prolog(
    q_TQ: Tensor, kv_TD: Tensor, q_weight: Tensor | None, kv_weight: Tensor, cos: Tensor, sin: Tensor, slots_T: Tensor,
    cache: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    if q_weight is None or not _packs(cache, kv_weight.shape[0]):
        return mla.mla_prolog(q_TQ, kv_TD, q_weight, kv_weight, cos, sin, slots_T, cache, eps)
    k = _kernels().mla_prolog
    kernel = k.mla_prolog_packed if cache.dtype is torch.uint8 else k.mla_prolog
    return kernel(_rows(q_TQ), _rows(kv_TD), q_weight, kv_weight, cos, sin, slots_T, cache, eps)


@tiled("mla_indexer_prolog")
def mla_indexer_prolog(
    q_TQ: Tensor, kv_TD: Tensor, key_TD: Tensor, q_weight: Tensor | None, kv_weight: Tensor, key_weight: Tensor,
    key_bias: Tensor, cos: Tensor, sin: Tensor, slots_T: Tensor, cache: Tensor, index: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    arguments = (kv_weight, key_weight, key_bias, cos, sin, slots_T, cache, index, eps)
    if q_weight is None or not _packs(cache, kv_weight.shape[0]) or key_TD.shape[1] <= 2 * cos.shape[1]:
        return mla.mla_indexer_prolog(q_TQ, kv_TD, key_TD, q_weight, *arguments)
    k = _kernels().mla_indexer_prolog
    rows = (_rows(q_TQ), _rows(kv_TD), _rows(key_TD))
    if cache.dtype is torch.uint8:
        return k.mla_indexer_prolog_packed(*rows, q_weight, *arguments, False)
    return k.mla_indexer_prolog(*rows, q_weight, *arguments)


@tiled("split_queries")
def split_queries(q_TND: Tensor, cos: Tensor, sin: Tensor, latent: int) -> tuple[Tensor, Tensor]:
    absorbed = q_TND.new_empty(*q_TND.shape[:2], latent + 2 * cos.shape[1])
    return _kernels().mla_prolog.mla_query(_rows(q_TND), cos, sin, absorbed), absorbed


@tiled("rotate_queries")
def rotate_queries(q_TND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _kernels().rope.rope(_rows(q_TND), cos, sin, True, True)


@tiled("index_queries")
def index_queries(q_TND: Tensor, weight_TN: Tensor, cos: Tensor, sin: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if q_TND.shape[2] <= 2 * cos.shape[1]:
        return mla.index_queries(q_TND, weight_TN, cos, sin, scale)
    return _kernels().indexer_prolog.index_query(_rows(q_TND), _rows(weight_TN), cos, sin, scale)


@tiled("mla_decode", _unavailable_beside_bf16)
def mla_decode(q_TND: Tensor, cache: Tensor, slots_TK: Tensor, latent: int, scale: float) -> Tensor:
    if not _packs(cache, latent) or cache.shape[1] % 4:
        return attention.mla_decode(q_TND, cache, slots_TK, latent, scale)
    return _kernels().attention.mla_decode(_rows(q_TND), cache, _rows(slots_TK), None, None, latent, scale)


# ---- the cache's rows ------------------------------------------------------------------------------------------------


@tiled("read_mla")
def read_mla(rows: Tensor, slots_T: Tensor, latent: int, dtype: torch.dtype) -> Tensor:
    k = _kernels()
    if rows.dtype is not torch.uint8:
        return k.cache.read_rows(rows, slots_T, k.dtype[dtype])
    if latent % BLOCK:
        return cache.read_mla(rows, slots_T, latent, dtype)
    return k.cache.read_mla_fp8(rows, slots_T, latent, k.dtype[dtype])


@tiled("read_index")
def read_index(rows: Tensor, slots_T: Tensor, dtype: torch.dtype) -> Tensor:
    k = _kernels()
    read = k.cache.read_index_fp8 if rows.dtype is torch.uint8 else k.cache.read_rows
    return read(rows, slots_T, k.dtype[dtype])


# ---- experts ---------------------------------------------------------------------------------------------------------


@tiled("route_grouped")
def route_grouped(
    logits_TE: Tensor, bias_E: Tensor, k: int, groups: int, kept_groups: int, normalize: bool, factor: float
) -> tuple[Tensor, Tensor]:
    gate = _kernels().moe.gate
    logits, bias = logits_TE.float().unflatten(1, (groups, -1)), bias_E.view(groups, -1)
    kept = kept_groups if 1 < groups != kept_groups else 0
    if logits.shape[0] <= FEW:
        return gate(logits, bias, k, kept, False, normalize, factor, 1)[:2]
    return gate(logits, bias, k, kept, False, normalize, factor)[:2]
