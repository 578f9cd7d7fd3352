"""config.json: both spellings of rope, end-of-sequence tokens, and one clear error per thing that cannot run."""

import json
import re

import pytest

from tests.tiny import CONFIG
from tilery.models.config import BUNDLED, DEFAULT_MODEL, ConfigError, parse_config, read_config, resolve_model

YARN = {
    "factor": 40, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
    "mscale_all_dim": 1.0,
}  # fmt: skip


def without(name):
    return {key: value for key, value in CONFIG.items() if key != name}


def test_old_and_new_rope_keys_are_equal():
    old = parse_config(CONFIG | {"rope_theta": 5e4, "rope_scaling": {"type": "yarn", **YARN}})
    new = parse_config(without("rope_theta") | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e4, **YARN}})
    assert old == new
    assert (old.rope_theta, old.yarn.factor, old.yarn.original_positions) == (5e4, 40.0, 64)
    plain = parse_config(CONFIG | {"rope_scaling": None})
    assert plain == parse_config(
        without("rope_theta") | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    )
    assert plain.yarn is None


def test_softmax_scale_of_the_released_model():
    """192^-1/2 * (0.1 ln 40 + 1)^2 = 0.1352."""
    config = parse_config(
        CONFIG | {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rope_scaling": {"type": "yarn", **YARN}}
    )
    assert round(config.softmax_scale, 4) == 0.1352
    assert config.yarn.cos_sin_factor == 1.0


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [
        (1, None, (1,)),
        (None, None, ()),
        ([1, 7], None, (1, 7)),
        (1, {"eos_token_id": [3, 4]}, (3, 4)),
        (1, {"eos_token_id": 5}, (5,)),
        (1, {"eos_token_id": None}, (1,)),
        (1, {"temperature": 0.6}, (1,)),
        (1, {"eos_token_id": 0}, (0,)),
    ],
)
def test_eos(tmp_path, in_config, in_generation, expected):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"eos_token_id": in_config}))
    if in_generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(in_generation))
    assert read_config(tmp_path).eos_token_ids == expected


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported; this build runs: deepseek_v3, deepseek_v32."),
        ({"model_type": None}, "model_type None is not supported; this build runs: deepseek_v3, deepseek_v32."),
        ({"index_topk": None, "vocab_size": None}, "config.json lacks vocab_size, index_topk."),
        ({"q_lora_rank": None}, "config.json lacks q_lora_rank."),
        (
            {"vocab_size": "48", "index_topk": 0},
            "config.json needs whole numbers of at least 1, but vocab_size is '48', index_topk is 0.",
        ),
        (
            {"attention_bias": True},
            "attention_bias is not supported: no released model of this family has it.",
        ),
        ({"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported; expected 'sigmoid'."),
        ({"topk_method": "greedy"}, "topk_method 'greedy' is not supported; expected 'noaux_tc'."),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; expected 'silu'."),
        (
            {"rope_interleave": False},
            "rope_interleave false is not supported: this family's MLA rotates interleaved pairs.",
        ),
        (
            {"rope_scaling": {"type": "linear"}},
            "rope type 'linear' is not supported; this family uses 'default' or 'yarn'.",
        ),
        ({"rope_scaling": {"type": "yarn"}}, "rope type 'yarn' needs a factor."),
        (
            {"quantization_config": {"quant_method": "awq", "weight_block_size": [64, 64]}},
            "quantization 'awq' with block size [64, 64] is not supported; expected 'fp8' with [128, 128].",
        ),
        ({"n_group": 3}, "n_routed_experts (8) must be a multiple of n_group (3)."),
        ({"n_group": 8}, "n_group (8) leaves one expert per group; a group is ranked by its best two."),
        (
            {"num_experts_per_tok": 5},
            "num_experts_per_tok (5) is more than the 4 experts that topk_group (2) of n_group (4) leaves to choose "
            "from.",
        ),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim (15) must be even: it is rotated in pairs."),
        ({"index_head_dim": 8}, "index_head_dim (8) must be at least qk_rope_head_dim (16)."),
    ],
)
def test_what_cannot_run_is_refused(changes, text):
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        parse_config(CONFIG | changes)


def test_v3_needs_neither_indexer_nor_q_lora():
    config = parse_config(CONFIG | {"model_type": "deepseek_v3", "index_topk": None, "q_lora_rank": None})
    assert (config.sparse, config.q_lora_rank) == (False, None)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_broken_file_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json (is not valid JSON|must hold a JSON object)"):
        read_config(tmp_path)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r" has no config\.json: it is not a Hugging Face checkpoint folder\.$"):
        read_config(tmp_path)


def test_resolve_model(tmp_path):
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(DEFAULT_MODEL) == BUNDLED / DEFAULT_MODEL
    with pytest.raises(ConfigError) as caught:
        resolve_model("no-such-model")
    assert str(caught.value) == (
        "no model folder 'no-such-model'. Give a folder with config.json and *.safetensors, or a bundled model: "
        "tilery-books-26m."
    )
