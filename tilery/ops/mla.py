"""What stands between the matrix products of latent attention, one operator for each gap.

The references are made of the operators they join; on a device each is one launch.

Legend: T tokens, H hidden, Q query rank, N heads, P nope dim, L latent, R rope, D indexer head dim, V vocabulary, M
positions of the rotary tables.
"""

import torch
from torch import Tensor

from tilery.ops.cache import write_index, write_mla
from tilery.ops.elementwise import layer_norm, rms_norm, rope_half_split, rope_interleaved
from tilery.ops.registry import implementation, operator


@operator
def embed(
    table_VH: Tensor, ids_T: Tensor, cos_MR: Tensor, sin_MR: Tensor, positions_T: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """A step's inputs: (embeddings [T, H] in `dtype`, cos [T, R/2], sin [T, R/2] of the tokens' positions).

    ids, positions [T] int64; the rotary tables fp32.
    """
    return table_VH[ids_T].to(dtype), cos_MR[positions_T], sin_MR[positions_T]


@implementation("embed", "gather", "cpu")
def embed_cpu(
    table_VH: Tensor, ids_T: Tensor, cos_MR: Tensor, sin_MR: Tensor, positions_T: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    rows = table_VH.index_select(0, ids_T).to(dtype)
    return rows, cos_MR.index_select(0, positions_T), sin_MR.index_select(0, positions_T)


@operator
def mla_prolog(
    q_TQ: Tensor, kv_TD: Tensor, q_weight: Tensor | None, kv_weight: Tensor, cos: Tensor, sin: Tensor, slots_T: Tensor,
    cache: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """Normalises the query latent and stores the MLA cache row: returns q' [T, Q] = rms_norm(q).

    kv [T, L + R] is normalised up to L and rotated (interleaved pairs) from there; the row goes to `cache` (see
    `cache.py`) at slots [T] int64, distinct. Without q_weight (a model without a query latent) q is returned as it is.
    """
    latent = kv_weight.shape[0]
    write_mla(
        cache, slots_T, rms_norm(kv_TD[:, :latent], kv_weight, eps), rope_interleaved(kv_TD[:, latent:], cos, sin)
    )
    return q_TQ if q_weight is None else rms_norm(q_TQ, q_weight, eps)


@operator
def mla_indexer_prolog(
    q_TQ: Tensor, kv_TD: Tensor, key_TD: Tensor, q_weight: Tensor | None, kv_weight: Tensor, key_weight: Tensor,
    key_bias: Tensor, cos: Tensor, sin: Tensor, slots_T: Tensor, cache: Tensor, index: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """`mla_prolog`, and the indexer's key (LayerNorm, the first R dims rotated, half-split) stored in `index`."""
    key, rope = layer_norm(key_TD, key_weight, key_bias, eps), 2 * cos.shape[1]
    write_index(index, slots_T, torch.cat((rope_half_split(key[:, :rope], cos, sin), key[:, rope:]), dim=1))
    return mla_prolog(q_TQ, kv_TD, q_weight, kv_weight, cos, sin, slots_T, cache, eps)


@operator
def split_queries(q_TND: Tensor, cos: Tensor, sin: Tensor, latent: int) -> tuple[Tensor, Tensor]:
    """(nope [T, N, P], absorbed [T, N, L + R]) of queries [T, N, P + R], for decode.

    The rotated last R dims stand at the end of `absorbed`; its first L are left for `heads_absorb` to fill.
    """
    nope = q_TND.shape[2] - 2 * cos.shape[1]
    absorbed = q_TND.new_empty(*q_TND.shape[:2], latent + 2 * cos.shape[1])
    absorbed[:, :, latent:] = rope_interleaved(q_TND[:, :, nope:], cos, sin)
    return q_TND[:, :, :nope], absorbed


@operator
def rotate_queries(q_TND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries [T, N, P + R] with their last R dims rotated (interleaved pairs), for prefill. New tensor."""
    nope = q_TND.shape[2] - 2 * cos.shape[1]
    return torch.cat((q_TND[:, :, :nope], rope_interleaved(q_TND[:, :, nope:], cos, sin)), dim=2)


@operator
def index_queries(q_TND: Tensor, weight_TN: Tensor, cos: Tensor, sin: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Indexer queries [T, N, D] with their first R dims rotated (half-split), and head weights [T, N] fp32 * scale."""
    rope = 2 * cos.shape[1]
    rotated = torch.cat((rope_half_split(q_TND[:, :, :rope], cos, sin), q_TND[:, :, rope:]), dim=2)
    return rotated, weight_TN.float() * scale
