"""DeepSeek-V3 and -V3.2: multi-head latent attention, lightning indexer, mixture of experts, multi-token prediction.

The mathematics on one page; operators come from `ops`, weights from `loader`, the cache from `cache`.

Attention. x -> q_a -> RMSNorm -> q_b gives per head a nope part and a rope part; x -> kv_a gives one latent of L
numbers (RMSNorm) and one rope key for all heads. Both cached. Decode is *absorbed*: q_nope @ W_UK attends to the
latent itself and W_UV turns the result into values, so a row is read once for all heads. Prefill is *un-absorbed*:
keys and values are expanded from the latent, which costs far fewer operations when many queries share a context.

Sparse attention. The indexer scores every cached position and each token attends to the best `index_topk`
(`ops.indexer`). While the context is no longer than that, all of it is chosen: the dense path skips scoring.
RoPE: MLA rotates interleaved pairs of the *last* dims of a head, the indexer half-split pairs of the *first* dims of
its.

Legend: T tokens, H hidden, N heads, D head dim, L latent, R rope, E experts, I expert width, V vocabulary.
Sources: DeepSeek-V2, -V3 and -V3.2-Exp reports; checkpoint names as released.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilery.models.cache import LayerCache
from tilery.models.config import DeepseekConfig
from tilery.models.step import DecodeRows, StepInput
from tilery.ops.quant import stack_rows
from tilery.ops.registry import Operators

Weights = Callable[..., Any]
"""`weight(name)` is a matrix of the checkpoint as it is kept (see `ops.quant.Weight`), `weight(name, torch.float32)` a
tensor in fp32."""


def rope_table(config: DeepseekConfig, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, R/2] fp32 on the CPU, YaRN blended (the same frequencies for MLA and indexer)."""
    dim, theta = config.qk_rope_head_dim, config.rope_theta
    inverse = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    factor = 1.0
    if (yarn := config.yarn) is not None:

        def dimension(rotations: float) -> float:
            return dim * math.log(yarn.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(dimension(yarn.beta_fast)), 0)
        high = min(math.ceil(dimension(yarn.beta_slow)), dim - 1)
        ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
        keep = 1.0 - ramp.clamp(0, 1)
        inverse = inverse / yarn.factor * (1.0 - keep) + inverse * keep
        factor = yarn.cos_sin_factor
    angle = torch.outer(torch.arange(positions, dtype=torch.float32), inverse)
    return angle.cos() * factor, angle.sin() * factor


@dataclass(frozen=True)
class Rope:
    """cos and sin of this step's tokens, [T, R/2]."""

    cos: Tensor
    sin: Tensor

    def __getitem__(self, rows: slice) -> Rope:
        return Rope(self.cos[rows], self.sin[rows])


class Indexer:
    """Scores positions for sparse attention: one key head, many query heads, weights per head from the hidden state."""

    def __init__(self, config: DeepseekConfig, ops: Operators, weight: Weights, prefix: str) -> None:
        self.ops, self.topk = ops, config.index_topk
        self.heads, self.dim = config.index_n_heads, config.index_head_dim
        self.wq_b = weight(f"{prefix}wq_b.weight")
        self.norm_weight = weight(f"{prefix}k_norm.weight", torch.float32)
        self.norm_bias = weight(f"{prefix}k_norm.bias", torch.float32)
        self.weights_proj = weight(f"{prefix}weights_proj.weight", torch.float32)

    def queries(self, x_TH: Tensor, q_latent: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Rotated queries [T, heads, D] and head weights [T, heads] fp32."""
        q = self.ops.linear(q_latent, self.wq_b).view(-1, self.heads, self.dim)
        weights = self.ops.linear(x_TH.float(), self.weights_proj)
        # n_heads^-0.5 and head_dim^-0.5 belong to the head weights; both are positive, so ReLU does not mind.
        return self.ops.index_queries(q, weights, rope.cos, rope.sin, (self.heads * self.dim) ** -0.5)


class Attention:
    """Multi-head latent attention over the paged latent cache, sparse when the model has an indexer."""

    def __init__(self, config: DeepseekConfig, ops: Operators, weight: Weights, prefix: str) -> None:
        self.config, self.ops = config, ops
        self.heads, self.nope, self.latent = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank
        self.q_rank = config.q_lora_rank or self.heads * config.qk_head_dim
        self.kv_width = self.latent + config.qk_rope_head_dim
        self.indexer = Indexer(config, ops, weight, f"{prefix}indexer.") if config.sparse else None
        # Everything that reads x is one product: q_a (or q), kv_a and the indexer's key.
        names = ["q_a_proj" if config.q_lora_rank else "q_proj", "kv_a_proj_with_mqa"]
        names += ["indexer.wk"] if config.sparse else []
        self.w_in = stack_rows([weight(f"{prefix}{name}.weight") for name in names])
        self.q_b = weight(f"{prefix}q_b_proj.weight") if config.q_lora_rank else None
        self.q_norm = weight(f"{prefix}q_a_layernorm.weight", torch.float32) if config.q_lora_rank else None
        self.kv_norm = weight(f"{prefix}kv_a_layernorm.weight", torch.float32)
        self.kv_b = weight(f"{prefix}kv_b_proj.weight")  # per head: nope rows of K, then V rows
        per_head = self.kv_b.unflatten(0, (self.heads, self.nope + config.v_head_dim))
        self.w_uk, self.w_uv = per_head[:, : self.nope], per_head[:, self.nope :]  # [N, nope, L], [N, v, L]: views
        self.o_proj = weight(f"{prefix}o_proj.weight")

    def __call__(self, x_TH: Tensor, rope: Rope, step: StepInput, cache: LayerCache) -> Tensor:
        ops, tokens = self.ops, x_TH.shape[0]
        q_latent = self._prolog(ops.linear(x_TH, self.w_in), rope, step.slots, cache)
        q = q_latent if self.q_b is None else ops.linear(q_latent, self.q_b)
        q = q.view(tokens, self.heads, self.config.qk_head_dim)

        parts = []
        if step.decode is not None:
            rows = slice(0, step.decode.count)
            parts.append(self._decode(q[rows], x_TH[rows], q_latent[rows], rope[rows], step.decode, cache))
        for segment in step.prefills:
            rows = slice(segment.start, segment.stop)
            parts.append(self._prefill(q[rows], x_TH[rows], q_latent[rows], rope[rows], segment.slots, cache))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return ops.linear(out.reshape(tokens, -1), self.o_proj)

    def _prolog(self, y_TI: Tensor, rope: Rope, slots: Tensor, cache: LayerCache) -> Tensor:
        """Writes the tokens' cache rows from the first product; returns the normalised query latent (or the query)."""
        q, kv = y_TI[:, : self.q_rank], y_TI[:, self.q_rank : self.q_rank + self.kv_width]
        tables = (rope.cos, rope.sin, slots, cache.mla)
        if self.indexer is None:
            return self.ops.mla_prolog(q, kv, self.q_norm, self.kv_norm, *tables, 1e-6)
        key = y_TI[:, self.q_rank + self.kv_width :]
        norms = (self.q_norm, self.kv_norm, self.indexer.norm_weight, self.indexer.norm_bias)
        return self.ops.mla_indexer_prolog(q, kv, key, *norms, *tables, cache.index, 1e-6)

    def _decode(self, q_TND, x_TH, q_latent, rope: Rope, rows: DecodeRows, cache: LayerCache) -> Tensor:
        ops, slots = self.ops, rows.slots
        if self.indexer is not None and rows.max_len > self.indexer.topk:
            q, weights = self.indexer.queries(x_TH, q_latent, rope)
            slots = ops.select_decode(q, weights, cache.index, slots, self.indexer.topk)
        nope, absorbed = ops.split_queries(q_TND, rope.cos, rope.sin, self.latent)
        ops.heads_absorb(nope, self.w_uk, absorbed[:, :, : self.latent])
        out = ops.mla_decode(absorbed, cache.mla, slots, self.latent, self.config.softmax_scale)
        return ops.heads_linear(out, self.w_uv)

    def _prefill(self, q_TND, x_TH, q_latent, rope: Rope, slots: Tensor, cache: LayerCache) -> Tensor:
        ops, config, context = self.ops, self.config, slots.shape[0]
        allowed = None
        if self.indexer is not None and context > self.indexer.topk:
            q, weights = self.indexer.queries(x_TH, q_latent, rope)
            keys = ops.read_index(cache.index, slots, q.dtype)
            allowed = ops.select_prefill(q, weights, keys, self.indexer.topk)
        rows = ops.read_mla(cache.mla, slots, self.latent, q_TND.dtype)
        kv = ops.linear(rows[:, : self.latent], self.kv_b).view(context, self.heads, self.nope + config.v_head_dim)
        k_rope = rows[:, None, self.latent :].expand(-1, self.heads, -1)
        k = torch.cat((kv[..., : self.nope], k_rope), dim=2)
        q_TND = ops.rotate_queries(q_TND, rope.cos, rope.sin)
        return ops.mha_prefill(q_TND, k, kv[..., self.nope :], allowed, config.softmax_scale)


class FeedForward:
    """down(silu(gate x) * up x): the dense layers' network and the shared expert."""

    def __init__(self, ops: Operators, weight: Weights, prefix: str) -> None:
        self.ops = ops
        self.gate_up = stack_rows([weight(f"{prefix}{name}_proj.weight") for name in ("gate", "up")])
        self.down = weight(f"{prefix}down_proj.weight")

    def __call__(self, x_TH: Tensor) -> Tensor:
        return self.ops.linear(self.ops.swiglu(self.ops.linear(x_TH, self.gate_up)), self.down)


class MoE:
    """Routed experts chosen by a sigmoid gate within the best groups, plus a shared expert for every token."""

    def __init__(self, config: DeepseekConfig, ops: Operators, weight: Weights, prefix: str) -> None:
        self.config, self.ops = config, ops
        self.gate = weight(f"{prefix}gate.weight", torch.float32)
        self.bias = weight(f"{prefix}gate.e_score_correction_bias", torch.float32)
        first = weight(f"{prefix}experts.0.gate_proj.weight")
        experts, width = config.n_routed_experts, config.moe_intermediate_size
        self.gate_up = first.new_empty(experts, 2 * width, config.hidden_size)
        self.down = first.new_empty(experts, config.hidden_size, width)
        for e in range(experts):
            self.gate_up[e, :width] = weight(f"{prefix}experts.{e}.gate_proj.weight")
            self.gate_up[e, width:] = weight(f"{prefix}experts.{e}.up_proj.weight")
            self.down[e] = weight(f"{prefix}experts.{e}.down_proj.weight")
        self.shared = None
        if config.n_shared_experts:
            shared = FeedForward(ops, weight, f"{prefix}shared_experts.")
            self.shared = (shared.gate_up, shared.down)

    def __call__(self, x_TH: Tensor) -> Tensor:
        c = self.config
        logits = self.ops.linear(x_TH.float(), self.gate)
        weights, experts = self.ops.route_grouped(
            logits, self.bias, c.num_experts_per_tok, c.n_group, c.topk_group, c.norm_topk_prob, c.routed_scaling_factor
        )
        return self.ops.experts_swiglu(x_TH, weights, experts, self.gate_up, self.down, self.shared)


class Layer:
    """x += attention(norm(x)); x += ffn(norm(x)).

    The last addition is left to the norm that follows, which does both in one pass: a layer takes and gives x and what
    is still to be added to it (None: nothing)."""

    def __init__(self, config: DeepseekConfig, ops: Operators, weight: Weights, index: int) -> None:
        prefix = f"model.layers.{index}."
        self.ops, self.eps = ops, config.rms_norm_eps
        self.input_norm = weight(f"{prefix}input_layernorm.weight", torch.float32)
        self.post_norm = weight(f"{prefix}post_attention_layernorm.weight", torch.float32)
        self.attention = Attention(config, ops, weight, f"{prefix}self_attn.")
        self.ffn: MoE | FeedForward
        if config.is_moe(index):
            self.ffn = MoE(config, ops, weight, f"{prefix}mlp.")
        else:
            self.ffn = FeedForward(ops, weight, f"{prefix}mlp.")

    def __call__(
        self, x_TH: Tensor, more_TH: Tensor | None, rope: Rope, step: StepInput, cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        if more_TH is None:
            y_TH = self.ops.rms_norm(x_TH, self.input_norm, self.eps)
        else:
            y_TH, x_TH = self.ops.add_rms_norm(more_TH, x_TH, self.input_norm, self.eps)
        y_TH, x_TH = self.ops.add_rms_norm(self.attention(y_TH, rope, step, cache), x_TH, self.post_norm, self.eps)
        return x_TH, self.ffn(y_TH)


class MultiTokenPrediction:
    """One more layer that predicts the token after next from a hidden state and the next token's embedding.

    z = eh_proj [enorm(embed(token[t+1])); hnorm(hidden[t])], hidden after the model's final norm; then a whole layer.
    """

    def __init__(self, config: DeepseekConfig, ops: Operators, weight: Weights) -> None:
        index = config.num_hidden_layers
        prefix = f"model.layers.{index}."
        self.ops, self.eps = ops, config.rms_norm_eps
        self.enorm, self.hnorm = (
            weight(f"{prefix}enorm.weight", torch.float32),
            weight(f"{prefix}hnorm.weight", torch.float32),
        )
        self.eh_proj = weight(f"{prefix}eh_proj.weight")
        self.layer = Layer(config, ops, weight, index)
        self.head_norm = weight(f"{prefix}shared_head.norm.weight", torch.float32)

    def __call__(
        self, embedded_TH: Tensor, hidden_TH: Tensor, rope: Rope, step: StepInput, cache: LayerCache
    ) -> Tensor:
        e = self.ops.rms_norm(embedded_TH, self.enorm, self.eps)
        h = self.ops.rms_norm(hidden_TH, self.hnorm, self.eps)
        x, more = self.layer(self.ops.linear(torch.cat((e, h), dim=1), self.eh_proj), None, rope, step, cache)
        return self.ops.add_rms_norm(more, x, self.head_norm, self.eps)[0]


class DeepseekModel:
    """The whole model, on the device of what `weight` returns. `positions` is the longest context it will see (tables
    are made for it), `dtype` that of activations (weights may be narrower where the operators allow it).

    `mtp` loads the multi-token-prediction layer, whose cache is the last of the list that `forward` and `draft` take.
    """

    def __init__(
        self,
        config: DeepseekConfig,
        ops: Operators,
        weight: Weights,
        positions: int,
        dtype: torch.dtype,
        mtp: bool = False,
    ) -> None:
        self.config, self.ops, self.dtype = config, ops, dtype
        self.embed = weight("model.embed_tokens.weight")
        self.layers = [Layer(config, ops, weight, i) for i in range(config.num_hidden_layers)]
        self.norm = weight("model.norm.weight", torch.float32)
        self.head = self.embed if config.tie_word_embeddings else weight("lm_head.weight")
        self.mtp = MultiTokenPrediction(config, ops, weight) if mtp else None
        self.cos, self.sin = (table.to(self.embed.device) for table in rope_table(config, positions))

    @property
    def cache_layers(self) -> int:
        return len(self.layers) + (self.mtp is not None)

    def _inputs(self, ids_T: Tensor, positions_T: Tensor) -> tuple[Tensor, Rope]:
        x, cos, sin = self.ops.embed(self.embed, ids_T, self.cos, self.sin, positions_T, self.dtype)
        return x, Rope(cos, sin)

    def forward(self, step: StepInput, caches: list[LayerCache]) -> Tensor:
        """Writes the step's cache rows and returns hidden states [T, H] after the final norm."""
        x, rope = self._inputs(step.token_ids, step.positions)
        more = None
        for layer, cache in zip(self.layers, caches):
            x, more = layer(x, more, rope, step, cache)
        return self.ops.add_rms_norm(more, x, self.norm, self.config.rms_norm_eps)[0]

    def draft(self, hidden_TH: Tensor, next_ids: Tensor, step: StepInput, caches: list[LayerCache]) -> Tensor:
        """Hidden states [T, H] whose logits predict the token after `next_ids` [T] (int64: the token after each)."""
        if self.mtp is None:
            raise ValueError("the multi-token-prediction layer was not loaded")
        embedded, rope = self._inputs(next_ids, step.positions)
        return self.mtp(embedded, hidden_TH, rope, step, caches[-1])

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """[T, H] -> [T, V] fp32."""
        return self.ops.linear(hidden_TH, self.head).float()
