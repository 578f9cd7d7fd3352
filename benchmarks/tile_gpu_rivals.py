"""What torch.compile is given beside a tile kernel, where that is not the kernel's reference.

A reference is written to be right and easy to check: some walk over rows in Python, look at numbers on the host, or
multiply in f32 whatever comes. torch.compile makes nothing good of that, and beating it would say nothing. Each
function here does the same work as a user would write it in torch: in whole tensors, products in the dtype of the
operands, attention by `scaled_dot_product_attention`. Where a reference leaves out holes (slots of -1), which needs a
look at the numbers, the function takes all rows: the benchmarks' arguments have no holes.

`RIVALS`: (what it is, function of the kernel's arguments) by kernel. `PART_OF`: kernels that are one launch of an
operator and have no counterpart of their own, with the operator they are compared as.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tilery.ops import cache as torch_cache
from tilery.ops.cache import PAGE
from tilery.ops.kernels import activation, indexer_prolog, mla_indexer_prolog, mla_prolog
from tilery.ops.quant import quantize_groups

Call = Callable[..., Any]


# --- writing all rows -------------------------------------------------------------------------------------------


def _write_mla(cache: Tensor, slots: Tensor, latent: Tensor, rope: Tensor) -> None:
    torch_cache.write_mla(cache, slots.long(), latent, rope)


def _write_index(pages: Tensor, slots: Tensor, keys: Tensor) -> None:
    """Scales as f32: inductor cannot view a column of scales as bytes."""
    values, scale = quantize_groups(keys)
    page, offset = slots // PAGE, slots % PAGE
    pages[:, : PAGE * 128].unflatten(1, (PAGE, 128))[page, offset] = values.view(torch.uint8)
    pages.view(torch.float32)[page, PAGE * 32 + offset] = scale[:, 0]


def _write_int8(values: Tensor, scales: Tensor, tail: Tensor, slots: Tensor, latent: Tensor, rope: Tensor) -> None:
    codes, scale = mla_prolog.quantize_int8_reference(latent.unflatten(1, (-1, 128)))
    values[slots], scales[slots], tail[slots] = codes.flatten(1), scale, rope.to(tail.dtype)


def _write_key_int8(keys: Tensor, scales: Tensor, slots: Tensor, rows: Tensor) -> None:
    codes, scale = indexer_prolog.quantize_int8_reference(rows)
    keys[slots], scales[slots] = codes, scale.half()


_ALL_ROWS = {
    "write_mla_reference": _write_mla, "write_index_reference": _write_index, "write_int8_reference": _write_int8,
    "write_key_int8_reference": _write_key_int8,
}  # fmt: skip


def all_rows(reference: Call) -> Call:
    """The reference with writes that do not look for holes."""
    assert isinstance(reference, types.FunctionType)
    names = {**reference.__globals__, **{n: f for n, f in _ALL_ROWS.items() if n in reference.__globals__}}
    return types.FunctionType(reference.__code__, names, reference.__name__, reference.__defaults__)


# --- routing ----------------------------------------------------------------------------------------------------


def _chosen(
    logits: Tensor, bias: Tensor | None, k: int, kept: int, softmax: bool, normalize: bool, factor: float
) -> tuple[Tensor, Tensor]:
    """Weights and experts as in DeepSeek-V3's published gate: top-k of groups, then of the experts in them."""
    groups, size = logits.shape[1:]
    score = logits.flatten(1).softmax(1) if softmax else logits.flatten(1).sigmoid()
    choice = score if bias is None else score + bias.flatten()
    if kept:
        worth = choice.unflatten(1, (groups, size)).topk(2, dim=2).values.sum(2)
        best = worth.topk(kept, dim=1, sorted=False).indices
        mask = torch.ones_like(worth, dtype=torch.bool).scatter_(1, best, False)
        choice = choice.unflatten(1, (groups, size)).masked_fill(mask[..., None], float("-inf")).flatten(1)
    experts = choice.topk(k, dim=1).indices
    weights = score.gather(1, experts)
    if normalize:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return weights * factor, experts


def _sorted_by_expert(experts: Tensor, count: int) -> tuple[Tensor, ...]:
    """(row of each choice, order, total, offset)."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    rows = torch.empty_like(order).scatter_(0, order, torch.arange(len(flat), device=flat.device))
    total = torch.zeros(count, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    offset = total.cumsum(0) - total
    return rows.view_as(experts).int(), order.int(), total.int(), offset.int()


def gate(
    logits: Tensor, bias: Tensor | None, k: int, kept: int, softmax: bool = False, normalize: bool = True,
    factor: float = 1.0, chunk: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weights and experts only: what a chunk's members are is of no use to torch."""
    weights, experts = _chosen(logits, bias, k, kept, softmax, normalize, factor)
    return weights, experts.int()


def route(
    logits: Tensor, bias: Tensor | None, k: int, kept: int, softmax: bool = False, normalize: bool = True,
    factor: float = 1.0, chunk: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    weights, experts = _chosen(logits, bias, k, kept, softmax, normalize, factor)
    return weights, experts.int(), *_sorted_by_expert(experts, logits.shape[1] * logits.shape[2])


def sort_by_expert(experts: Tensor, counts: Tensor, members: Tensor, chunk: int) -> tuple[Tensor, ...]:
    return _sorted_by_expert(experts.long(), counts.shape[1])


def permute(x: Tensor, scale: Tensor | None, rows: Tensor, out: Tensor, out_scale: Tensor | None, k: int) -> None:
    flat = rows.flatten().long()
    raw = torch.uint8 if x.element_size() == 1 else x.dtype
    out.view(raw)[flat] = x.view(raw).repeat_interleave(k, 0)
    if scale is not None and out_scale is not None:
        out_scale[flat] = scale.repeat_interleave(k, 0)


def swiglu_quant_masked(gate_up: Tensor, counts: Tensor, q: Tensor, s: Tensor) -> None:
    """All M rows of every expert, kept where they count: the shapes may not depend on the counts."""
    values, scale = activation._quant_reference(gate_up.flatten(0, 1))
    below = (torch.arange(gate_up.shape[1], device=counts.device) < counts[:, None])[..., None]
    raw = q.view(torch.uint8)
    raw.copy_(torch.where(below, values.view(torch.uint8).view_as(raw), raw))
    s.copy_(torch.where(below, scale.view_as(s), s))


# --- sampling ---------------------------------------------------------------------------------------------------


@torch.compiler.disable
def _running_sum(x: Tensor) -> Tensor:
    """Outside of the compiled graph: inductor fails on a scan of rows this long (torch 2.11)."""
    return x.cumsum(1)


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """The usual form: one sort for all cuts, then an exponential race with torch's own noise (no seed per row)."""
    greedy = temperature < 1e-5
    x = logits / torch.where(greedy, 1.0, temperature)[:, None]
    probability, ids = x.softmax(1).sort(dim=1, descending=True)
    rank = torch.arange(logits.shape[1], device=x.device)
    kept = probability >= min_p[:, None] * probability[:, :1]
    kept = kept & ((top_k[:, None] <= 0) | (rank < top_k[:, None]))
    mass = torch.where(kept, probability, 0.0)
    kept = kept & (_running_sum(mass) - mass < top_p[:, None] * mass.sum(1, keepdim=True))
    race = torch.where(kept, mass, 0.0) / torch.empty_like(mass).exponential_()
    place = torch.where(greedy, 0, race.argmax(1))[:, None]
    return ids.gather(1, place)[:, 0], probability.gather(1, place)[:, 0].log()


def apply_penalties(
    logits: Tensor, rows: Tensor, tokens: Tensor, counts: Tensor, repetition: Tensor, frequency: Tensor,
    presence: Tensor,
) -> None:  # fmt: skip
    row, token, count = rows.long(), tokens.long(), counts.float()
    x = logits[row, token]
    x = torch.where(x > 0, x / repetition[row], x * repetition[row])
    logits[row, token] = x - (frequency[row] * count + presence[row] * (count > 0))


# --- indexer and attention --------------------------------------------------------------------------------------


def index_scores(
    q: Tensor, weights: Tensor, keys: Tensor, table: Tensor, lens: Any = None, key_scale: Any = None,
    q_scale: Any = None, page: int = 64,
) -> Tensor:  # fmt: skip
    """Gathers each token's keys in q's dtype, then one batched product; all blocks are there and all rows full."""
    page_keys = keys[:, : page * 128].view(torch.float8_e4m3fn).unflatten(1, (page, 128))
    page_scales = keys[:, page * 128 :].view(torch.float32)
    picked = page_keys.view(torch.uint8)[table.long()].view(torch.float8_e4m3fn).flatten(1, 2).to(q.dtype)
    products = torch.bmm(q, picked.transpose(1, 2)).relu().float()
    return (products * weights[..., None]).sum(1) * page_scales[table.long()].flatten(1)


def index_scores_prefill(q: Tensor, weights: Tensor, keys: Tensor, key_scale: Tensor, together: int) -> Tensor:
    """In slices of 256 tokens: all products at once would take 17 GB. bf16 holds e4m3 exactly."""
    tokens, context = q.shape[0], keys.shape[0]
    matrix = keys.bfloat16().T
    position = torch.arange(context, device=q.device)
    parts = []
    for start in range(0, tokens, 256):
        own = q[start : start + 256].bfloat16()
        products = (own.flatten(0, 1) @ matrix).unflatten(0, own.shape[:2]).relu().float()
        score = (products * weights[start : start + 256, :, None]).sum(1) * key_scale
        last = torch.arange(start, start + len(own), device=q.device) + (context - tokens)
        parts.append(score.masked_fill(position > last[:, None], float("-inf")))
    return torch.cat(parts)


def _packed_rows(rows: Tensor, slots: Tensor, latent: int, dtype: torch.dtype) -> Tensor:
    """[T, K, L + R] of `dtype` from packed MLA rows."""
    return torch_cache.read_mla(rows, slots.flatten().long(), latent, dtype).unflatten(0, slots.shape)


def mla_decode(
    q: Tensor, cache: Tensor, slots: Tensor, table: Any, lens: Any, latent: int, scale: float, page: int
) -> Tensor:
    rows = _packed_rows(cache, slots, latent, q.dtype)
    scores = torch.bmm(q, rows.transpose(1, 2)).float() * scale
    return torch.bmm(scores.softmax(2).to(q.dtype), rows[..., :latent])


def mla_partial(
    q: Tensor, cache: Tensor, slots: Tensor, table: Any, lens: Any, latent: int, scale: float, splits: int, page: int
) -> tuple[Tensor, Tensor]:
    tokens, heads = q.shape[:2]
    rows = _packed_rows(cache, slots, latent, q.dtype).unflatten(1, (splits, -1)).flatten(0, 1)
    own = q[:, None].expand(-1, splits, -1, -1).flatten(0, 1)
    scores = torch.bmm(own, rows.transpose(1, 2)).float() * scale
    part = torch.bmm(scores.softmax(2).to(q.dtype), rows[..., :latent]).float()
    weight = scores.logsumexp(2) * 1.4426950408889634
    return part.view(tokens, splits, heads, latent), weight.view(tokens, splits, heads)


def mha_prefill(q: Tensor, k: Tensor, v: Tensor, allowed: Any, scale: float, part: int) -> Tensor:
    own, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(own, keys, values, is_causal=True, scale=scale)[0].transpose(0, 1)


# --- selection --------------------------------------------------------------------------------------------------


def top_k(scores: Tensor, k: int, lens: Any = None) -> Tensor:
    return scores.topk(k, sorted=False).indices


def top_k_mask(scores: Tensor, k: int, lens: Any = None, width: int = 0) -> Tensor:
    best = scores.topk(k, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)


def top_k_tile(scores: Tensor, k: int, width: int, lens: Any = None, names: Any = None) -> tuple[Tensor, Tensor]:
    best = scores.unflatten(1, (-1, width)).topk(k, sorted=False)
    first = torch.arange(0, scores.shape[1], width, device=scores.device)[:, None]
    return (best.indices + first).int(), best.values


_WHOLE = "whole tensors in place of a loop over rows"
_NO_HOLES = "the reference, all rows written"

RIVALS: dict[str, tuple[str, Call]] = {
    "gate": ("DeepSeek-V3's gate with torch.topk; weights and experts only", gate),
    "route": ("DeepSeek-V3's gate with torch.topk, then a stable argsort", route),
    "gate_and_sort": ("DeepSeek-V3's gate with torch.topk, then a stable argsort", route),
    "sort_by_expert": ("a stable argsort and scatter_add", sort_by_expert),
    "permute": ("index_put of repeated rows", permute),
    "swiglu_quant_masked": (_WHOLE, swiglu_quant_masked),
    "sample": ("one sort for all cuts, exponential race with torch's noise", sample),
    "sample_fast": ("one sort for all cuts, exponential race with torch's noise", sample),
    "apply_penalties": ("the reference without looking for unused entries", apply_penalties),
    "index_scores": ("gathered keys, one batched product in q's dtype", index_scores),
    "index_scores_prefill": ("products in bf16, 256 tokens at a time", index_scores_prefill),
    "mla_decode": ("gathered rows in bf16, two batched products", mla_decode),
    "mla_partial": ("gathered rows in bf16, two batched products", mla_partial),
    "mha_prefill": ("scaled_dot_product_attention", mha_prefill),
    "top_k": ("torch.topk", top_k),
    "top_k_fast": ("torch.topk", top_k),
    "top_k_mask": ("torch.topk and scatter", top_k_mask),
    "top_k_mask_tile": ("torch.topk and scatter", top_k_mask),
    "top_k_tile": ("torch.topk of the pieces", top_k_tile),
    "argmax": ("torch.argmax", lambda logits: logits.argmax(1)),
    "write_mla_fp8": (_NO_HOLES, _write_mla),
    "index_key_fp8": (_NO_HOLES, all_rows(indexer_prolog._index_key_fp8)),
    "mla_prolog_fp8": (_NO_HOLES, all_rows(mla_prolog._mla_prolog_fp8)),
    "mla_prolog_int8": (_NO_HOLES, all_rows(mla_prolog._mla_prolog_int8)),
    "mla_indexer_prolog_fp8": (_NO_HOLES, all_rows(mla_indexer_prolog._fp8)),
}
PART_OF = {"argmax_pieces": "argmax", "sample_pieces": "sample_fast"}


def rival(kernel: Any) -> tuple[str, Call]:
    """(what it is, the function that torch.compile gets) of a kernel or operator."""
    return RIVALS.get(kernel.name, ("reference", kernel.reference))
