"""Every tensor a DeepSeek checkpoint holds, derived from its config: names, shapes, storage kinds.

Without the indexer it reproduces the published totals of DeepSeek-V3: 91,991 tensors, 688,574,839,360 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from tilery.models.config import DeepseekConfig


class Kind(StrEnum):
    MATRIX = "matrix"  # FP8 with block scales in an FP8 checkpoint, else BF16
    PLAIN = "plain"  # BF16 always
    FLOAT = "float"  # FP32 always


@dataclass(frozen=True)
class TensorSpec:
    name: str
    shape: tuple[int, ...]
    kind: Kind
    optional: bool = False
    """A copy of a tensor of the main model (MTP's embedding and head): files may leave it out."""

    @property
    def scale_shape(self) -> tuple[int, int]:
        return (-(-self.shape[0] // 128), -(-self.shape[1] // 128))

    def stored(self, fp8: bool) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """(name, shape, bytes) of what the file holds for it."""
        count = math.prod(self.shape)
        if self.kind is Kind.MATRIX and fp8:
            yield self.name, self.shape, count
            yield f"{self.name}_scale_inv", self.scale_shape, 4 * math.prod(self.scale_shape)
        else:
            yield self.name, self.shape, count * (4 if self.kind is Kind.FLOAT else 2)


def _feed_forward(prefix: str, hidden: int, width: int) -> Iterator[TensorSpec]:
    for name in ("gate_proj", "up_proj"):
        yield TensorSpec(f"{prefix}{name}.weight", (width, hidden), Kind.MATRIX)
    yield TensorSpec(f"{prefix}down_proj.weight", (hidden, width), Kind.MATRIX)


def _layer(c: DeepseekConfig, index: int) -> Iterator[TensorSpec]:
    p, h = f"model.layers.{index}.", c.hidden_size
    a = f"{p}self_attn."
    yield TensorSpec(f"{p}input_layernorm.weight", (h,), Kind.PLAIN)
    yield TensorSpec(f"{p}post_attention_layernorm.weight", (h,), Kind.PLAIN)
    heads = c.num_attention_heads
    if c.q_lora_rank:
        yield TensorSpec(f"{a}q_a_proj.weight", (c.q_lora_rank, h), Kind.MATRIX)
        yield TensorSpec(f"{a}q_a_layernorm.weight", (c.q_lora_rank,), Kind.PLAIN)
        yield TensorSpec(f"{a}q_b_proj.weight", (heads * c.qk_head_dim, c.q_lora_rank), Kind.MATRIX)
    else:
        yield TensorSpec(f"{a}q_proj.weight", (heads * c.qk_head_dim, h), Kind.MATRIX)
    yield TensorSpec(f"{a}kv_a_proj_with_mqa.weight", (c.kv_lora_rank + c.qk_rope_head_dim, h), Kind.MATRIX)
    yield TensorSpec(f"{a}kv_a_layernorm.weight", (c.kv_lora_rank,), Kind.PLAIN)
    out = heads * (c.qk_nope_head_dim + c.v_head_dim)
    yield TensorSpec(f"{a}kv_b_proj.weight", (out, c.kv_lora_rank), Kind.MATRIX)
    yield TensorSpec(f"{a}o_proj.weight", (h, heads * c.v_head_dim), Kind.MATRIX)
    if c.sparse:
        i = f"{a}indexer."
        q_in = c.q_lora_rank or h
        yield TensorSpec(f"{i}wq_b.weight", (c.index_n_heads * c.index_head_dim, q_in), Kind.MATRIX)
        yield TensorSpec(f"{i}wk.weight", (c.index_head_dim, h), Kind.MATRIX)
        yield TensorSpec(f"{i}k_norm.weight", (c.index_head_dim,), Kind.FLOAT)
        yield TensorSpec(f"{i}k_norm.bias", (c.index_head_dim,), Kind.FLOAT)
        yield TensorSpec(f"{i}weights_proj.weight", (c.index_n_heads, h), Kind.PLAIN)
    m = f"{p}mlp."
    if not c.is_moe(index):
        yield from _feed_forward(m, h, c.intermediate_size)
        return
    yield TensorSpec(f"{m}gate.weight", (c.n_routed_experts, h), Kind.PLAIN)
    yield TensorSpec(f"{m}gate.e_score_correction_bias", (c.n_routed_experts,), Kind.FLOAT)
    for e in range(c.n_routed_experts):
        yield from _feed_forward(f"{m}experts.{e}.", h, c.moe_intermediate_size)
    if c.n_shared_experts:
        yield from _feed_forward(f"{m}shared_experts.", h, c.moe_intermediate_size * c.n_shared_experts)


def inventory(config: DeepseekConfig, mtp: bool = True) -> Iterator[TensorSpec]:
    """Every tensor of the checkpoint, the multi-token-prediction layers included unless `mtp` is False."""
    h, vocab = config.hidden_size, config.vocab_size
    yield TensorSpec("model.embed_tokens.weight", (vocab, h), Kind.PLAIN)
    yield TensorSpec("model.norm.weight", (h,), Kind.PLAIN)
    if not config.tie_word_embeddings:
        yield TensorSpec("lm_head.weight", (vocab, h), Kind.PLAIN)
    for index in range(config.num_hidden_layers):
        yield from _layer(config, index)
    for index in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers * mtp):
        p = f"model.layers.{index}."
        yield from _layer(config, index)
        for name in ("enorm", "hnorm", "shared_head.norm"):
            yield TensorSpec(f"{p}{name}.weight", (h,), Kind.PLAIN)
        yield TensorSpec(f"{p}eh_proj.weight", (h, 2 * h), Kind.PLAIN)
        yield TensorSpec(f"{p}embed_tokens.weight", (vocab, h), Kind.PLAIN, optional=True)
        yield TensorSpec(f"{p}shared_head.head.weight", (vocab, h), Kind.PLAIN, optional=True)
