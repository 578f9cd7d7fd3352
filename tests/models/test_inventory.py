"""The generated list of tensors reproduces DeepSeek-V3's published totals."""

from tilery.models.config import parse_config
from tilery.models.inventory import inventory

V3 = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1, "rope_theta": 10000,
}  # fmt: skip


def totals(raw):
    stored = [row for spec in inventory(parse_config(raw)) for row in spec.stored(fp8=True)]
    assert len({name for name, _, _ in stored}) == len(stored)
    return len(stored), sum(size for _, _, size in stored)


def test_v3_totals():
    assert totals(V3) == (91_991, 688_574_839_360)


def test_v32_totals():
    count, size = totals(
        V3 | {"model_type": "deepseek_v32", "index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128}
    )
    assert count == 92_425
    assert round(size / 1e9, 2) == 689.47
