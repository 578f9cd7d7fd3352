"""Attention over the latent cache: absorbed for decode, un-absorbed for prefill.

Legend: T query tokens, N heads, K cache rows a query reads, C context length, L latent, R rope, D = nope + R,
V value dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tilery.ops.cache import read_mla, read_mla_cpu
from tilery.ops.registry import implementation, operator


@operator
def mla_decode(q_TND: Tensor, cache: Tensor, slots_TK: Tensor, latent: int, scale: float) -> Tensor:
    """Attention of absorbed queries over chosen cache rows; sparse and dense decode alike.

    q [T, N, L + R]: the query's nope part times W_UK, then its rotated rope part. cache: MLA rows (see `cache.py`).
    slots [T, K] int64: the rows each token attends to, in any order and pattern; -1 means none there. Every row must
    name at least one slot; rows it does not name have no influence, be they NaN. scale multiplies the scores. Softmax
    in fp32. Returns [T, N, L] in q's dtype (values are the rows' latent part). Source: DeepSeek-V2 report, section
    2.1.
    """
    tokens, width = slots_TK.shape
    rows = read_mla(cache, _fill_holes(slots_TK).flatten(), latent, torch.float32).view(tokens, width, -1)
    scores = torch.einsum("tnd,tkd->tnk", q_TND.float(), rows) * scale
    scores = scores.masked_fill((slots_TK < 0)[:, None], float("-inf"))
    return torch.einsum("tnk,tkl->tnl", scores.softmax(-1), rows[..., :latent]).to(q_TND.dtype)


def _fill_holes(slots_TK: Tensor) -> Tensor:
    """-1 -> another slot of the same token. A hole weighs 0, but 0 * NaN is NaN: were slot 0 read instead, a request
    whose rows overflowed there would spoil everybody's output."""
    return torch.where(slots_TK < 0, slots_TK.amax(1, keepdim=True), slots_TK)


@implementation("mla_decode", "batched-gather", "cpu")
def mla_decode_cpu(q_TND: Tensor, cache: Tensor, slots_TK: Tensor, latent: int, scale: float) -> Tensor:
    tokens, width = slots_TK.shape
    hole = slots_TK < 0
    holes = bool(hole.any())
    slots = _fill_holes(slots_TK) if holes else slots_TK
    rows = read_mla_cpu(cache, slots.reshape(-1), latent, q_TND.dtype).view(tokens, width, -1)
    scores = torch.bmm(q_TND, rows.transpose(1, 2))
    if holes:
        scores.masked_fill_(hole[:, None], float("-inf"))
    weights = torch.softmax(scores.mul_(scale), dim=-1)
    return torch.bmm(weights, rows[..., :latent])


@operator
def mha_prefill(q_TND: Tensor, k_CND: Tensor, v_CNV: Tensor, allowed_TC: Tensor | None, scale: float) -> Tensor:
    """Un-absorbed attention of one request's T newest tokens over its whole context of C >= T tokens.

    q [T, N, D], k [C, N, D], v [C, N, V]; query t sits at position C - T + t and sees positions up to its own. With
    `allowed` (bool [T, C]) only the allowed ones among them; each row must allow at least one. Softmax in fp32.
    Returns [T, N, V] in q's dtype.
    """
    tokens, context = q_TND.shape[0], k_CND.shape[0]
    causal = torch.ones(tokens, context, dtype=torch.bool, device=q_TND.device).tril(context - tokens)
    seen = causal if allowed_TC is None else causal & allowed_TC
    scores = torch.einsum("tnd,cnd->ntc", q_TND.float(), k_CND.float()) * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("ntc,cnv->tnv", weights, v_CNV.float()).to(q_TND.dtype)


@implementation("mha_prefill", "sdpa", "any")
def mha_prefill_sdpa(q_TND: Tensor, k_CND: Tensor, v_CNV: Tensor, allowed_TC: Tensor | None, scale: float) -> Tensor:
    # The flash kernel wants equal head dims: the narrower ones are padded with zeros.
    tokens, context, value_dim = q_TND.shape[0], k_CND.shape[0], v_CNV.shape[2]
    mask = None
    if allowed_TC is not None or tokens != context:
        mask = torch.ones(tokens, context, dtype=torch.bool, device=q_TND.device).tril_(context - tokens)
        if allowed_TC is not None:
            mask &= allowed_TC
    width = max(q_TND.shape[2], value_dim)
    q, k, v = (F.pad(x, (0, width - x.shape[2])).transpose(0, 1)[None] for x in (q_TND, k_CND, v_CNV))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out[0, :, :, :value_dim].transpose(0, 1)
