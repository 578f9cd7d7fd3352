"""The cache tensors of a DSA model: per layer one group of MLA rows and, for sparse models, one of indexer keys.

All groups of all layers share one slot numbering, so whatever moves a block of slots moves the same range of every
tensor in `LayerCache.groups`. Engines that moved one of the two DSA groups decoded garbage.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilery.models.config import DeepseekConfig
from tilery.models.step import CPU
from tilery.ops.cache import PAGE, packed_index_bytes, packed_mla_bytes


@dataclass(frozen=True)
class LayerCache:
    mla: Tensor
    """[S, L + R] float, or [S, 656] uint8."""
    index: Tensor | None
    """[S, D] float, or [S / 64, 64 * 132] uint8; None without an indexer."""

    @property
    def groups(self) -> tuple[Tensor, ...]:
        return (self.mla,) if self.index is None else (self.mla, self.index)


def bytes_per_token(config: DeepseekConfig, dtype: torch.dtype, layers: int) -> int:
    """Cache bytes one token takes over `layers` layers; `torch.uint8` stands for the packed FP8 rows."""
    if dtype == torch.uint8:
        row = packed_mla_bytes(config.kv_lora_rank, config.qk_rope_head_dim)
        index = packed_index_bytes(config.index_head_dim) if config.sparse else 0
    else:
        row = (config.kv_lora_rank + config.qk_rope_head_dim) * dtype.itemsize
        index = config.index_head_dim * dtype.itemsize if config.sparse else 0
    return layers * (row + index)


def allocate(
    config: DeepseekConfig, slots: int, dtype: torch.dtype, layers: int, device: torch.device = CPU
) -> list[LayerCache]:
    """Zeroed cache for `slots` tokens (a multiple of 64) on `device`. Raises `ValueError` for shapes the packed rows
    cannot hold."""
    if slots % PAGE:
        raise ValueError(f"the cache holds whole pages of {PAGE} tokens; {slots} is not a multiple")
    if dtype == torch.uint8:
        mla = (slots, packed_mla_bytes(config.kv_lora_rank, config.qk_rope_head_dim))
        index = (slots // PAGE, PAGE * packed_index_bytes(config.index_head_dim)) if config.sparse else None
    else:
        mla = (slots, config.kv_lora_rank + config.qk_rope_head_dim)
        index = (slots, config.index_head_dim) if config.sparse else None

    def zeros(shape: tuple[int, int]) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return [LayerCache(zeros(mla), zeros(index) if index else None) for _ in range(layers)]
