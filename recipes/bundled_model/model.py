"""DeepSeek-V3.2's architecture for training: MLA, sparse attention with the lightning indexer, noaux_tc MoE, MTP.

Written for reading and for a 26 M-parameter model, not for serving: nothing is cached, the experts are computed as one
dense product with zero weights for the experts that were not chosen, and sparse attention is a mask over full scores.

Shape suffixes: B batch, S query positions, T key positions, H hidden, N attention heads, D head dim, R rope dims,
L latent, J indexer heads, E experts, G groups, I expert width, V vocabulary, K top-k.
Module names equal the checkpoint's key names; only the routed experts are stacked (`export.py` splits them).
"""

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attend(Enum):
    """How attention chooses keys, and what it reports.

    DENSE: every earlier key.
    DISTIL: every earlier key; also the indexer's KL divergence from the dense attention distribution.
    SPARSE: the indexer's top-k keys; also the KL divergence on the chosen keys.
    SPARSE_ONLY: the indexer's top-k keys, no divergence (evaluation and generation).
    """

    DENSE = 0
    DISTIL = 1
    SPARSE = 2
    SPARSE_ONLY = 3


@dataclass(frozen=True)
class ModelConfig:
    """Sizes, named as in DeepSeek's config.json."""

    vocab_size: int = 8192
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_nextn_predict_layers: int = 1
    first_k_dense_replace: int = 1
    intermediate_size: int = 768
    num_attention_heads: int = 16
    q_lora_rank: int = 192
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 64
    v_head_dim: int = 32
    index_n_heads: int = 16
    index_head_dim: int = 128
    index_topk: int = 256
    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4
    n_group: int = 4
    topk_group: int = 2
    moe_intermediate_size: int = 128
    routed_scaling_factor: float = 2.5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def to_hf(self) -> dict:
        """config.json of the checkpoint, without `quantization_config`."""
        return {
            "architectures": ["DeepseekV32ForCausalLM"],
            "model_type": "deepseek_v32",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            "ep_size": 1,
            "first_k_dense_replace": self.first_k_dense_replace,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "index_head_dim": self.index_head_dim,
            "index_n_heads": self.index_n_heads,
            "index_topk": self.index_topk,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.intermediate_size,
            "kv_lora_rank": self.kv_lora_rank,
            "max_position_embeddings": self.max_position_embeddings,
            "moe_intermediate_size": self.moe_intermediate_size,
            "moe_layer_freq": 1,
            "n_group": self.n_group,
            "n_routed_experts": self.n_routed_experts,
            "n_shared_experts": self.n_shared_experts,
            "norm_topk_prob": True,
            "num_attention_heads": self.num_attention_heads,
            "num_experts_per_tok": self.num_experts_per_tok,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_attention_heads,
            "num_nextn_predict_layers": self.num_nextn_predict_layers,
            "q_lora_rank": self.q_lora_rank,
            "qk_nope_head_dim": self.qk_nope_head_dim,
            "qk_rope_head_dim": self.qk_rope_head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": None,
            "rope_theta": self.rope_theta,
            "routed_scaling_factor": self.routed_scaling_factor,
            "scoring_func": "sigmoid",
            "tie_word_embeddings": False,
            "topk_group": self.topk_group,
            "topk_method": "noaux_tc",
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "v_head_dim": self.v_head_dim,
            "vocab_size": self.vocab_size,
        }

    @classmethod
    def from_hf(cls, path: Path) -> "ModelConfig":
        """Read a config.json; keys this class does not know are ignored."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})


class Linear(nn.Linear):
    """Bias-free linear layer: FP32 master weight, product in the input's dtype."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(x.dtype)


class LayerNorm(nn.Module):
    """LayerNorm with bias, in FP32 (the indexer's k_norm)."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps).to(x.dtype)


def rope_table(length: int, dims: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [length, dims / 2], FP32."""
    inv_freq = theta ** (-torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), inv_freq)
    return angle.cos(), angle.sin()


def rope_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (2i, 2i + 1): MLA's convention. x [..., S, R]; cos, sin [S, R / 2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def rope_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + R / 2): the indexer's convention. x [..., S, R]; cos, sin [S, R / 2]."""
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1).to(x.dtype)


def topk_mask(score_BST: Tensor, k: int) -> Tensor:
    """Mask [B, S, T] of each row's k largest causal scores; equal scores go to the lowest position.

    Rows with at most k earlier positions keep all of them.
    """
    queries, keys = score_BST.shape[-2:]
    causal_ST = torch.ones(queries, keys, dtype=torch.bool, device=score_BST.device).tril(keys - queries)
    if keys <= k:
        return causal_ST.expand_as(score_BST)
    score_BST = score_BST.masked_fill(~causal_ST, float("-inf"))
    smallest_BS1 = score_BST.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above_BST = score_BST > smallest_BS1
    equal_BST = score_BST == smallest_BS1
    room_BS1 = k - above_BST.sum(-1, keepdim=True, dtype=torch.int32)
    earlier_BST = equal_BST.cumsum(-1, dtype=torch.int32)
    return (above_BST | (equal_BST & (earlier_BST <= room_BS1))) & causal_ST


class Indexer(nn.Module):
    """Lightning indexer: one score per (query, key), a weighted sum over heads of relu(q . k)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.heads, self.dim, self.rope_dims = cfg.index_n_heads, cfg.index_head_dim, cfg.qk_rope_head_dim
        self.wq_b = Linear(cfg.q_lora_rank, self.heads * self.dim)
        self.wk = Linear(cfg.hidden_size, self.dim)
        self.k_norm = LayerNorm(self.dim)
        self.weights_proj = Linear(cfg.hidden_size, self.heads)

    def forward(self, x_BSH: Tensor, qr_BSL: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Scores [B, S, S] in FP32, not masked."""
        q_BJSD = self.wq_b(qr_BSL).unflatten(-1, (self.heads, self.dim)).transpose(1, 2)
        k_BSD = self.k_norm(self.wk(x_BSH))
        split = [self.rope_dims, self.dim - self.rope_dims]
        q_rope, q_pass = q_BJSD.split(split, -1)
        k_rope, k_pass = k_BSD.split(split, -1)
        q_BJSD = torch.cat((rope_half_split(q_rope, cos, sin), q_pass), -1)
        k_BSD = torch.cat((rope_half_split(k_rope, cos, sin), k_pass), -1)
        scale = self.heads**-0.5 * self.dim**-0.5
        w_BSJ = F.linear(x_BSH.float(), self.weights_proj.weight) * scale
        dot_BJST = q_BJSD @ k_BSD.unsqueeze(1).transpose(-1, -2)
        return (dot_BJST.float().relu() * w_BSJ.transpose(1, 2).unsqueeze(-1)).sum(1)


def index_divergence(score_BST: Tensor, attention_BST: Tensor, mask_BST: Tensor) -> Tensor:
    """Mean over queries of KL(attention || softmax(score)) over the keys in `mask`. The target carries no gradient."""
    target = attention_BST.detach()
    log_index = score_BST.masked_fill(~mask_BST, float("-inf")).log_softmax(-1).masked_fill(~mask_BST, 0.0)
    entropy = torch.special.xlogy(target, target)
    return (entropy - target * log_index).sum(-1).mean()


class Attention(nn.Module):
    """Multi-head latent attention. Interleaved RoPE; per head the nope dims come first, then the rope dims."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.heads, self.topk = cfg.num_attention_heads, cfg.index_topk
        self.nope, self.rope, self.v_dim = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
        self.latent = cfg.kv_lora_rank
        self.scale = cfg.qk_head_dim**-0.5
        self.q_a_proj = Linear(cfg.hidden_size, cfg.q_lora_rank)
        self.q_a_layernorm = RMSNorm(cfg.q_lora_rank, cfg.rms_norm_eps)
        self.q_b_proj = Linear(cfg.q_lora_rank, self.heads * cfg.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(cfg.hidden_size, cfg.kv_lora_rank + cfg.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(cfg.kv_lora_rank, cfg.rms_norm_eps)
        self.kv_b_proj = Linear(cfg.kv_lora_rank, self.heads * (cfg.qk_nope_head_dim + cfg.v_head_dim))
        self.o_proj = Linear(self.heads * cfg.v_head_dim, cfg.hidden_size)
        self.indexer = Indexer(cfg)

    def forward(self, x_BSH: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> tuple[Tensor, Tensor | None]:
        """Output [B, S, H] and, for DISTIL and SPARSE, the indexer's divergence (a scalar)."""
        batch, length, _ = x_BSH.shape
        qr_BSL = self.q_a_layernorm(self.q_a_proj(x_BSH))
        q_BNSD = self.q_b_proj(qr_BSL).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q_nope, q_rope = q_BNSD.split([self.nope, self.rope], -1)
        latent_BSL, k_rope_BSR = self.kv_a_proj_with_mqa(x_BSH).split([self.latent, self.rope], -1)
        kv_BNTD = self.kv_b_proj(self.kv_a_layernorm(latent_BSL)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_nope, v_BNTD = kv_BNTD.split([self.nope, self.v_dim], -1)
        k_rope = rope_interleaved(k_rope_BSR, cos, sin).unsqueeze(1).expand(-1, self.heads, -1, -1)
        q_BNSD = torch.cat((q_nope, rope_interleaved(q_rope, cos, sin)), -1)
        k_BNTD = torch.cat((k_nope, k_rope), -1)
        if attend is Attend.DENSE:
            # Flash kernels want one head dim: pad v with zeros, drop the padding from the output.
            pad = self.nope + self.rope - self.v_dim
            out_BNSD = F.scaled_dot_product_attention(
                q_BNSD, k_BNTD, F.pad(v_BNTD, (0, pad)), is_causal=True, scale=self.scale
            )[..., : self.v_dim]
            divergence = None
        else:
            # The indexer reads the layer's input but sends no gradient into it.
            score_BST = self.indexer(x_BSH.detach(), qr_BSL.detach(), cos, sin)
            keep = length if attend is Attend.DISTIL else self.topk
            with torch.no_grad():
                mask_BST = topk_mask(score_BST, keep)
            dot_BNST = (q_BNSD * self.scale) @ k_BNTD.transpose(-1, -2)
            prob_BNST = dot_BNST.float().masked_fill(~mask_BST.unsqueeze(1), float("-inf")).softmax(-1)
            out_BNSD = prob_BNST.to(v_BNTD.dtype) @ v_BNTD
            divergence = None
            if attend is not Attend.SPARSE_ONLY:
                divergence = index_divergence(score_BST, prob_BNST.detach().mean(1), mask_BST)
        return self.o_proj(out_BNSD.transpose(1, 2).reshape(batch, length, -1)), divergence


class MLP(nn.Module):
    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_proj = Linear(hidden, width)
        self.up_proj = Linear(hidden, width)
        self.down_proj = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """noaux_tc router: sigmoid scores, bias only for the choice, groups first, then experts."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.groups, self.kept_groups, self.topk = cfg.n_group, cfg.topk_group, cfg.num_experts_per_tok
        self.scaling = cfg.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(cfg.n_routed_experts, cfg.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(cfg.n_routed_experts))

    @staticmethod
    def rank(values: Tensor) -> Tensor:
        """Rank of each element along the last axis, 0 for the largest; equal values go to the lowest index.

        Counts pairwise wins: for 16 values this fuses into one kernel, where a sort would not.
        """
        index = torch.arange(values.shape[-1], device=values.device)
        mine, other = values.unsqueeze(-1), values.unsqueeze(-2)
        beaten_by = (other > mine) | ((other == mine) & (index < index.unsqueeze(-1)))
        return beaten_by.sum(-1)

    def forward(self, x_BSH: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [B, S, E] in FP32 (zero where not chosen) and the tokens per expert [E]."""
        score_BSE = F.linear(x_BSH.float(), self.weight).sigmoid()
        with torch.no_grad():
            choice_BSE = score_BSE + self.e_score_correction_bias
            choice_BSGE = choice_BSE.unflatten(-1, (self.groups, -1))
            best_two = self.rank(choice_BSGE) < 2
            group_BSG = (choice_BSGE * best_two).sum(-1)
            open_BSG1 = (self.rank(group_BSG) < self.kept_groups).unsqueeze(-1)
            choice_BSE = choice_BSGE.masked_fill(~open_BSG1, float("-inf")).flatten(-2)
            chosen_BSE = self.rank(choice_BSE) < self.topk
            load_E = chosen_BSE.flatten(0, 1).sum(0).float()
        weight_BSE = score_BSE * chosen_BSE
        weight_BSE = weight_BSE / (weight_BSE.sum(-1, keepdim=True) + 1e-20) * self.scaling
        return weight_BSE, load_E


class Experts(nn.Module):
    """Routed experts, stacked: gate_proj, up_proj [E, I, H]; down_proj [E, H, I]."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        shape = (cfg.n_routed_experts, cfg.moe_intermediate_size, cfg.hidden_size)
        self.gate_proj = nn.Parameter(torch.empty(shape))
        self.up_proj = nn.Parameter(torch.empty(shape))
        self.down_proj = nn.Parameter(torch.empty(shape[0], shape[2], shape[1]))

    def forward(self, x_BSH: Tensor, weight_BSE: Tensor) -> Tensor:
        dtype = x_BSH.dtype
        gate = F.linear(x_BSH, self.gate_proj.to(dtype).flatten(0, 1))
        up = F.linear(x_BSH, self.up_proj.to(dtype).flatten(0, 1))
        act_BSEI = (F.silu(gate) * up).unflatten(-1, self.gate_proj.shape[:2]) * weight_BSE.to(dtype).unsqueeze(-1)
        return F.linear(act_BSEI.flatten(-2), self.down_proj.to(dtype).transpose(0, 1).flatten(1))


class MoE(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate = Gate(cfg)
        self.experts = Experts(cfg)
        self.shared_experts = MLP(cfg.hidden_size, cfg.moe_intermediate_size * cfg.n_shared_experts)

    def forward(self, x_BSH: Tensor) -> tuple[Tensor, Tensor]:
        weight_BSE, load_E = self.gate(x_BSH)
        return self.experts(x_BSH, weight_BSE) + self.shared_experts(x_BSH), load_E


def attention_branch(
    norm: RMSNorm, attention: Attention, x_BSH: Tensor, cos: Tensor, sin: Tensor, attend: Attend
) -> tuple[Tensor, Tensor | None]:
    out, divergence = attention(norm(x_BSH), cos, sin, attend)
    return x_BSH + out, divergence


def mlp_branch(norm: RMSNorm, mlp: MLP | MoE, x_BSH: Tensor) -> tuple[Tensor, Tensor | None]:
    out = mlp(norm(x_BSH))
    out, load_E = out if isinstance(mlp, MoE) else (out, None)
    return x_BSH + out, load_E


class Block(nn.Module):
    """Decoder layer: h = x + attn(norm(x)); y = h + mlp(norm(h)).

    The two halves are plain functions, so that one compiled version of each serves all layers (`compile_layers`).
    """

    def __init__(self, cfg: ModelConfig, dense: bool):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size) if dense else MoE(cfg)
        self.dense = dense
        self.attention_branch, self.mlp_branch = attention_branch, mlp_branch

    def forward(
        self, x_BSH: Tensor, cos: Tensor, sin: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Output, the indexer's divergence (or None), the tokens per expert (None for the dense layer)."""
        x_BSH, divergence = self.attention_branch(self.input_layernorm, self.self_attn, x_BSH, cos, sin, attend)
        x_BSH, load_E = self.mlp_branch(self.post_attention_layernorm, self.mlp, x_BSH)
        return x_BSH, divergence, load_E


class MTPHead(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)


class MTPBlock(Block):
    """Multi-token prediction: a MoE decoder layer over (embedding of token t + 1, final hidden state of token t)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg, dense=False)
        self.enorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.hnorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.eh_proj = Linear(2 * cfg.hidden_size, cfg.hidden_size)
        self.shared_head = MTPHead(cfg)

    def combine(self, next_embed_BSH: Tensor, hidden_BSH: Tensor) -> Tensor:
        return self.eh_proj(torch.cat((self.enorm(next_embed_BSH), self.hnorm(hidden_BSH)), -1))


class Decoder(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg, i < cfg.first_k_dense_replace) for i in range(cfg.num_hidden_layers))
        self.layers.extend(MTPBlock(cfg) for _ in range(cfg.num_nextn_predict_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)


@dataclass(frozen=True)
class Output:
    """Result of `DeepSeekV32.forward`."""

    hidden_BSH: Tensor  # after model.norm: feed to `logits`
    mtp_BSH: Tensor | None  # after shared_head.norm; position t predicts token t + 2
    divergence: Tensor | None  # mean over layers of the indexer's KL divergence
    load_LE: Tensor  # tokens per expert, one row for each MoE layer, the MTP layer last


class DeepSeekV32(nn.Module):
    """The whole model. Parameters are FP32; `dtype` is the dtype of activations and products."""

    def __init__(self, cfg: ModelConfig, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.cfg, self.dtype = cfg, dtype
        self.model = Decoder(cfg)
        self.lm_head = Linear(cfg.hidden_size, cfg.vocab_size)
        self._rope: dict[tuple, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> "DeepSeekV32":
        """Normal weights with `initializer_range`; outputs of residual branches scaled by (2 layers)^-1/2."""
        generator = torch.Generator().manual_seed(seed)
        depth = (2 * self.cfg.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                std = self.cfg.initializer_range * (
                    depth if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                )
                std = std * depth if name.endswith("experts.down_proj") else std
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        return self

    def compile_layers(self) -> "DeepSeekV32":
        """Compile the halves of a layer, once per kind and shape rather than once per layer."""
        torch._dynamo.config.cache_size_limit = 64
        compiled = torch.compile(attention_branch, dynamic=False), torch.compile(mlp_branch, dynamic=False)
        for layer in self.model.layers:
            layer.attention_branch, layer.mlp_branch = compiled
        return self

    def rope(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        key = (length, device)
        if key not in self._rope:
            self._rope[key] = rope_table(length, self.cfg.qk_rope_head_dim, self.cfg.rope_theta, device)
        return self._rope[key]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden).float()

    def forward(self, tokens_BS: Tensor, next_tokens_BS: Tensor | None = None, attend: Attend = Attend.DENSE) -> Output:
        """Hidden states for `tokens_BS`; with `next_tokens_BS` (token t + 1 at position t) also the MTP layer's."""
        cos, sin = self.rope(tokens_BS.shape[1], tokens_BS.device)
        main = self.cfg.num_hidden_layers
        x = self.model.embed_tokens(tokens_BS).to(self.dtype)
        divergences, loads = [], []

        def run(layer: Block, x: Tensor) -> Tensor:
            x, divergence, load = layer(x, cos, sin, attend)
            divergences.extend([] if divergence is None else [divergence])
            loads.extend([] if load is None else [load])
            return x

        for layer in self.model.layers[:main]:
            x = run(layer, x)
        hidden = self.model.norm(x)
        mtp = None
        if next_tokens_BS is not None:
            layer = self.model.layers[main]
            y = layer.combine(self.model.embed_tokens(next_tokens_BS).to(self.dtype), hidden)
            mtp = layer.shared_head.norm(run(layer, y))
        divergence = torch.stack(divergences).mean() if divergences else None
        return Output(hidden, mtp, divergence, torch.stack(loads))

    def moe_layers(self) -> list[Block]:
        """Layers in the order of `Output.load_LE`'s rows."""
        return [layer for layer in self.model.layers if not layer.dense]

    @torch.no_grad()
    def balance(self, load_LE: Tensor, rate: float) -> None:
        """Auxiliary-loss-free balancing: raise the choice bias of experts below the mean load, lower the others'."""
        for layer, load in zip(self.moe_layers(), load_LE, strict=True):
            layer.mlp.gate.e_score_correction_bias += rate * (load.mean() - load).sign()
