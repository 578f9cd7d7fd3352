"""Tiny checkpoints of DeepSeek-V3.2's architecture with random weights, written as ordinary Hugging Face files."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tilery.models.config import parse_config
from tilery.models.inventory import Kind, inventory
from tilery.ops.quant import dequantize_blocks, quantize_blocks

CONFIG = {
    "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "vocab_size": 48, "hidden_size": 64,
    "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "q_lora_rank": 48, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 24,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2,
    "first_k_dense_replace": 1, "index_topk": 32, "index_n_heads": 16, "index_head_dim": 128,
    "num_nextn_predict_layers": 1, "max_position_embeddings": 1024, "rope_theta": 10000.0, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6, "eos_token_id": 1, "bos_token_id": 0,
}  # fmt: skip
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def tensors(config: dict, fp8: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    """The weights of an FP8 checkpoint, or the same values dequantised to fp32."""
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for spec in inventory(parse_config(config)):
        if spec.optional:
            continue
        value = torch.randn(spec.shape, generator=draw) * 0.15
        if "norm" in spec.name and spec.name.endswith("weight"):
            value = 1 + value
        if spec.kind is Kind.MATRIX:
            quantised, scale = quantize_blocks(value)
            if fp8:
                made[spec.name], made[f"{spec.name}_scale_inv"] = quantised, scale
            else:
                made[spec.name] = dequantize_blocks(quantised, scale)
        elif spec.kind is Kind.PLAIN:
            made[spec.name] = value.to(torch.bfloat16)
        else:
            made[spec.name] = value
    return made


def write_checkpoint(folder: Path, *, fp8: bool = False, seed: int = 0, **changes) -> Path:
    config = CONFIG | changes
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors(config, fp8, seed), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | ({"quantization_config": FP8} if fp8 else {})))
    return folder
