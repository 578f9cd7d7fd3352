"""Random inputs in the formats of the models: quantised matrices, packed cache rows, pages in shuffled order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tilery.ops.quant import BLOCK, E4M3, quantize_groups

PAGE = 64


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers times `scale` on the generator's device."""
    x = torch.randn(*shape, generator=generator, device=generator.device, dtype=torch.float32)
    return x.mul_(scale).to(dtype)


def group_quantised(generator: torch.Generator, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Normal activations as e4m3 [rows, columns] with power-of-two scales [rows, columns / 128] (1x128)."""
    values = torch.empty(rows, columns, dtype=E4M3, device=generator.device)
    scales = torch.empty(rows, columns // BLOCK, device=generator.device)
    step = max(1, (1 << 26) // columns)
    for start in range(0, rows, step):
        end = min(rows, start + step)
        values[start:end], scales[start:end] = quantize_groups(normal(generator, end - start, columns))
    return values, scales


def block_quantised(generator: torch.Generator, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Weights of deviation about columns^-0.5: e4m3 [rows, columns], fp32 scales of 128x128 blocks, drawn."""
    values = torch.empty(rows, columns, dtype=E4M3, device=generator.device)
    step = max(1, (1 << 26) // columns)
    for start in range(0, rows, step):
        part = normal(generator, min(step, rows - start), columns, scale=100.0).clamp_(-448, 448)
        values[start : start + part.shape[0]] = part.to(E4M3)
    blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
    draw = torch.rand(*blocks, generator=generator, device=generator.device)
    return values, (draw + 0.5) * (0.01 * columns**-0.5)


def packed_rows(generator: torch.Generator, count: int, latent: int = 512, rope: int = 64) -> Tensor:
    """uint8 [count, latent + 4 * latent / 128 + 2 * rope]: packed MLA rows of normal latents (656 bytes)."""
    rows = torch.empty(count, latent + latent // 32 + 2 * rope, dtype=torch.uint8, device=generator.device)
    for start in range(0, count, 1 << 17):
        size = min(1 << 17, count - start)
        values, scale = quantize_groups(normal(generator, size, latent))
        tail = normal(generator, size, rope, dtype=torch.bfloat16)
        parts = [part.contiguous().view(torch.uint8) for part in (values, scale, tail)]
        rows[start : start + size] = torch.cat(parts, dim=1)
    return rows


def unpack_rows(rows: Tensor, latent: int = 512) -> Tensor:
    """Packed rows [..., bytes] as float64 [..., latent + rope]."""
    groups = latent // BLOCK
    values = rows[..., :latent].contiguous().view(E4M3).double().unflatten(-1, (groups, BLOCK))
    scale = rows[..., latent : latent + 4 * groups].contiguous().view(torch.float32).double()
    tail = rows[..., latent + 4 * groups :].contiguous().view(torch.bfloat16).double()
    return torch.cat(((values * scale[..., None]).flatten(-2), tail), dim=-1)


def normal_lengths(generator: torch.Generator, batch: int, mean: float, least: int) -> Tensor:
    """int32 [batch] about normal(mean, mean / 2), at least `least`, scaled so that their sum is batch * mean."""
    wild = (normal(generator, batch) * (mean / 2) + mean).clamp_(min=least)
    return (wild * (batch * mean / wild.sum())).round_().clamp_(min=least).to(torch.int32)


def even_lengths(generator: torch.Generator, batch: int, mean: float) -> Tensor:
    """int32 [batch], uniform within 30 % of the mean, scaled so that their sum is batch * mean."""
    wild = 0.7 + 0.6 * torch.rand(batch, generator=generator, device=generator.device)
    return (wild * (batch * mean / wild.sum())).round_().to(torch.int32)


@dataclass(frozen=True)
class Pages:
    """Requests of random lengths over pages in shuffled order.

    lengths: int32 [B]. table: int32 [B, W], page numbers, 0 past a request's end. count: pages in all.
    """

    lengths: Tensor
    table: Tensor
    count: int

    @staticmethod
    def draw(generator: torch.Generator, lengths: Tensor) -> Pages:
        """Pages for requests of these lengths, shuffled over the cache."""
        lengths = lengths.to(torch.int32)
        batch = lengths.numel()
        needed = (lengths + PAGE - 1) // PAGE
        count, width = int(needed.sum()), int(needed.max())
        order = torch.randperm(count, generator=generator, device=generator.device).to(torch.int32)
        table = torch.zeros(batch, width, dtype=torch.int32, device=generator.device)
        inside = torch.arange(width, device=generator.device) < needed[:, None]
        table[inside] = order
        return Pages(lengths, table, count)

    def slots(self, request: int) -> Tensor:
        """int64: the rows of one request's tokens in order of position."""
        positions = torch.arange(int(self.lengths[request]), device=self.table.device)
        return self.table[request, positions // PAGE].long() * PAGE + positions % PAGE
