"""Logits equal transformers' DeepSeek-V3.2 and -V3 in fp32, however the tokens are fed."""

import itertools
import random

import pytest
import torch

from tilery.models import cache as model_cache
from tilery.models.loader import load_model
from tilery.models.step import Chunk, build_step, order_chunks
from tilery.ops import mla, registry

BLOCK = 64
TOLERANCE = 1e-4


def make_checkpoint(folder, sparse, seed, **changes):
    """Random weights of a small model in ordinary Hugging Face files; returns transformers' model."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV32Config, DeepseekV32ForCausalLM

    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 64}
    yarn |= {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
    shape = {
        "vocab_size": 320, "hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 48,
        "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 24, "n_routed_experts": 16,
        "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
        "max_position_embeddings": 512, "rope_parameters": yarn, "attn_implementation": "eager",
    }  # fmt: skip
    if sparse:
        shape |= {"index_n_heads": 32, "index_head_dim": 32, "index_topk": 48}
    shape |= changes
    config = (DeepseekV32Config if sparse else DeepseekV3Config)(**shape)
    torch.manual_seed(seed)
    model = (DeepseekV32ForCausalLM if sparse else DeepseekV3ForCausalLM)(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name and name.endswith("weight"):
                tensor.copy_(1 + 0.1 * torch.randn_like(tensor))
            elif "inv_freq" not in name:
                tensor.copy_(0.08 * torch.randn_like(tensor))
    model.save_pretrained(folder)
    return model


class Feeder:
    """Feeds one request in pieces to our model, with blocks scattered over the cache."""

    def __init__(self, folder, operators=None, cache_dtype=torch.float32):
        self.model = load_model(folder, operators or registry.select(), torch.float32)
        slots = 64 * BLOCK
        self.caches = model_cache.allocate(self.model.config, slots, cache_dtype, self.model.cache_layers)
        self.blocks = random.Random(0).sample(range(64), 64)

    def feed(self, chunks):
        """[(token_ids, start, blocks)] in one step; logits in the order given."""
        made = [Chunk(*chunk) for chunk in chunks]
        order = order_chunks(made)
        with torch.inference_mode():
            logits = self.model.logits(self.model.forward(build_step([made[i] for i in order], BLOCK), self.caches))
        parts = dict(zip(order, logits.split([len(made[i].token_ids) for i in order])))
        return [parts[i] for i in range(len(made))]

    def pieces(self, tokens, cuts, blocks=None):
        blocks = blocks or self.blocks[:8]
        bounds = [0, *cuts, len(tokens)]
        return torch.cat([self.feed([(tokens[a:b], a, blocks)])[0] for a, b in itertools.pairwise(bounds)])


def oracle(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float()


@pytest.fixture(scope="module", params=["v32", "v3"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = make_checkpoint(folder, request.param == "v32", seed=1)
    tokens = random.Random(5).choices(range(320), k=160)
    return folder, oracle(model, tokens), tokens


def close(ours, theirs):
    assert ours.shape == theirs.shape
    difference = (ours - theirs).abs().max().item()
    assert difference < TOLERANCE, f"logits differ by {difference}"


def test_whole_prefill(pair):
    folder, expected, tokens = pair
    close(Feeder(folder).pieces(tokens, []), expected)


def test_reference_operators(pair):
    folder, expected, tokens = pair
    close(Feeder(folder, registry.select(overrides={"*": "reference"})).pieces(tokens, [100, 150]), expected)


@pytest.mark.parametrize("cuts", [[1], [7, 48, 49, 101], [63, 64, 65, 129], list(range(11, 160, 11))])
def test_chunked_prefill_at_odd_boundaries(pair, cuts):
    folder, expected, tokens = pair
    close(Feeder(folder).pieces(tokens, cuts), expected)


def test_token_by_token(pair):
    folder, expected, tokens = pair
    close(Feeder(folder).pieces(tokens, list(range(1, 160))), expected)


def test_decode_after_shared_prefix_in_a_mixed_batch(pair):
    folder, expected, tokens = pair
    feeder = Feeder(folder)
    first, second = feeder.blocks[:8], [*feeder.blocks[:2], *feeder.blocks[20:26]]  # two whole blocks are shared
    feeder.pieces(tokens[:140], [], first)
    for position in range(128, 159):
        # One request decodes behind the shared prefix while another prefills an unrelated prompt.
        logits, _ = feeder.feed(
            [(tokens[position : position + 1], position, second), (tokens[:30], 0, feeder.blocks[40:48])]
        )
        close(logits, expected[position : position + 1])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sparse", [True, False])
def test_other_shapes(tmp_path, sparse, seed):
    draw = random.Random(seed)
    groups = draw.choice([1, 2, 4])
    experts = groups * draw.choice([2, 4])
    changes = {
        "hidden_size": draw.choice([64, 96, 160]), "num_attention_heads": draw.choice([1, 2, 6]),
        "q_lora_rank": draw.choice([32, 56]) if sparse or draw.random() < 0.5 else None,
        "kv_lora_rank": draw.choice([32, 128]), "qk_nope_head_dim": draw.choice([16, 48]),
        "v_head_dim": draw.choice([16, 40]), "n_routed_experts": experts, "n_group": groups,
        "topk_group": draw.randint(1, groups), "n_shared_experts": draw.choice([1, 2]),
        "first_k_dense_replace": draw.choice([0, 1, 3]), "norm_topk_prob": draw.random() < 0.7,
    }  # fmt: skip
    changes["num_key_value_heads"] = changes["num_attention_heads"]
    kept = changes["topk_group"] * experts // groups
    changes["num_experts_per_tok"] = draw.randint(1, min(4, kept))
    if sparse:
        changes |= {"index_n_heads": draw.choice([16, 32]), "index_topk": draw.choice([8, 33, 100])}
    if draw.random() < 0.5:
        changes["rope_parameters"] = {"rope_type": "default", "rope_theta": 50000.0}
    theirs = make_checkpoint(tmp_path, sparse, seed, **changes)
    tokens = draw.choices(range(320), k=draw.randint(70, 130))
    cuts = sorted(draw.sample(range(1, len(tokens)), 3))
    close(Feeder(tmp_path).pieces(tokens, cuts), oracle(theirs, tokens))


def test_interleaved_indexer_rope_is_caught(tmp_path, monkeypatch):
    """The field's most repeated bug: with MLA's rotation in the indexer the wrong positions are selected."""
    theirs = make_checkpoint(tmp_path, True, seed=1)
    tokens = random.Random(5).choices(range(320), k=160)
    wrong = registry.select(overrides={"*": "reference"})
    monkeypatch.setattr(mla, "rope_half_split", mla.rope_interleaved)
    logits = Feeder(tmp_path, wrong).pieces(tokens, [])
    expected = oracle(theirs, tokens)
    agree = (logits.argmax(1) == expected.argmax(1)).float().mean().item()
    assert (logits - expected).abs().max() > 0.1
    assert agree < 0.9


def test_mixed_prefill_and_decode_rows_above_and_below_topk(pair):
    folder, expected, tokens = pair
    feeder = Feeder(folder)
    tables = [feeder.blocks[i * 8 : i * 8 + 8] for i in range(4)]
    for table, length in zip(tables, (20, 47, 120)):
        feeder.pieces(tokens[:length], [], table)
    got = feeder.feed(
        [
            (tokens[20:23], 20, tables[0]),
            (tokens[:90], 0, tables[3]),
            (tokens[47:48], 47, tables[1]),
            (tokens[120:128], 120, tables[2]),
        ]
    )
    for logits, span in zip(got, (slice(20, 23), slice(0, 90), slice(47, 48), slice(120, 128))):
        close(logits, expected[span])
