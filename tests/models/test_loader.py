"""Checkpoints: equal values give equal logits however they are stored, and one error names all that is wrong."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import CONFIG, FP8, tensors, write_checkpoint
from tilery.models import cache as model_cache
from tilery.models.config import ConfigError
from tilery.models.loader import Checkpoint, CheckpointError, load_model
from tilery.models.step import Chunk, build_step
from tilery.ops import registry

TOKENS = torch.randint(2, CONFIG["vocab_size"], (60,), generator=torch.Generator().manual_seed(3)).tolist()


def load(folder, **options):
    return load_model(folder, registry.select(), torch.float32, **options)


def logits(folder, tokens=TOKENS):
    """Logits of the main model and, where the layer is there, of the first draft."""
    model = load(folder, mtp=True)
    caches = model_cache.allocate(model.config, 64, torch.float32, model.cache_layers)
    with torch.inference_mode():
        step = build_step([Chunk(tokens, 0, [0])], 64)
        hidden = model.forward(step, caches)
        return model.logits(hidden), model.logits(model.draft(hidden, step.token_ids.roll(-1), step, caches))


def rewrite(folder, change):
    """Loads the tensors, lets `change` edit them, and saves them again."""
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return logits(write_checkpoint(tmp_path_factory.mktemp("plain")))


def equal(got, expected):
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_fp8_equals_the_same_values_in_fp32(tmp_path, expected):
    equal(logits(write_checkpoint(tmp_path, fp8=True)), expected)


def test_bf16_equals_the_same_values_in_fp32(tmp_path):
    def rounded(stored):
        for name, value in stored.items():
            stored[name] = value.to(torch.bfloat16)

    def back(stored):
        for name, value in stored.items():
            stored[name] = value.float()

    folder = rewrite(write_checkpoint(tmp_path), rounded)
    in_bf16 = logits(folder)
    equal(logits(rewrite(folder, back)), in_bf16)


def test_fp8_config_over_dequantised_files(tmp_path, expected):
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": FP8}))
    equal(logits(tmp_path), expected)


def test_shards_with_an_index(tmp_path, expected):
    write_checkpoint(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(stored)
    weight_map = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: stored[name] for name in names if weight_map[name] == file}, tmp_path / file)
    equal(logits(tmp_path), expected)  # all files of the folder
    save_file({"stray.weight": torch.zeros(1)}, tmp_path / "unrelated.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    equal(logits(tmp_path), expected)  # those of the index only
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names files that are not there: model-00002-of-00003\.safetensors\.$"):
        load(tmp_path)


def test_one_error_names_everything(tmp_path):
    def spoil(stored):
        del stored["model.norm.weight"]
        del stored["model.layers.1.mlp.experts.3.up_proj.weight"]
        del stored["model.layers.2.self_attn.o_proj.weight_scale_inv"]
        stored["lm_head.weight"] = stored["lm_head.weight"][:, :-1].contiguous()
        stored["model.layers.0.mlp.up_proj.weight_scale_inv"] = torch.ones(2, 1)
        stored["model.layers.0.self_attn.k_proj.weight"] = torch.ones(2)

    folder = rewrite(write_checkpoint(tmp_path, fp8=True), spoil)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert str(caught.value) == "\n".join(
        [
            f"the tensors of {folder} do not fit its config.json:",
            "  missing (3):",
            "    model.norm.weight",
            "    model.layers.1.mlp.experts.3.up_proj.weight",
            "    model.layers.2.self_attn.o_proj.weight_scale_inv",
            "  wrong shape (2):",
            "    lm_head.weight is [48, 63], expected [48, 64]",
            "    model.layers.0.mlp.up_proj.weight_scale_inv is [2, 1], expected [1, 1]",
            "  unknown (1):",
            "    model.layers.0.self_attn.k_proj.weight",
            "Check that config.json belongs to these files and that the download is complete.",
        ]
    )


def test_an_fp8_tensor_without_scale_is_named_wherever_it_stands(tmp_path):
    def change(stored):
        stored["lm_head.weight"] = stored["lm_head.weight"].to(torch.float8_e4m3fn)

    with pytest.raises(CheckpointError, match=r"missing \(1\):\n    lm_head\.weight_scale_inv\n"):
        load(rewrite(write_checkpoint(tmp_path), change))


def test_buffers_of_released_files_are_ignored(tmp_path, expected):
    def add(stored):
        stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        stored["model.layers.0.self_attn.k_scale"] = torch.ones(1)

    equal(logits(rewrite(write_checkpoint(tmp_path), add)), expected)


def test_copies_in_the_mtp_layer_may_be_there(tmp_path, expected):
    def add(stored):
        stored["model.layers.3.embed_tokens.weight"] = stored["model.embed_tokens.weight"].clone()
        stored["model.layers.3.shared_head.head.weight"] = stored["lm_head.weight"].clone()

    equal(logits(rewrite(write_checkpoint(tmp_path), add)), expected)


def test_the_mtp_layer_is_ignored_when_it_is_not_used(tmp_path, expected):
    def spoil(stored):
        for name in [name for name in stored if name.startswith("model.layers.3.")][::2]:
            del stored[name]

    folder = rewrite(write_checkpoint(tmp_path), spoil)
    model = load(folder)
    caches = model_cache.allocate(model.config, 64, torch.float32, model.cache_layers)
    with torch.inference_mode():
        hidden = model.forward(build_step([Chunk(TOKENS, 0, [0])], 64), caches)
        assert torch.equal(model.logits(hidden), expected[0])


def test_drafts_without_an_mtp_layer_are_refused(tmp_path):
    def strip(stored):
        for name in [name for name in stored if name.startswith("model.layers.3.")]:
            del stored[name]

    folder = rewrite(write_checkpoint(tmp_path), strip)
    load(folder)
    with pytest.raises(
        ConfigError, match=r"has no multi-token-prediction layer: speculative decoding with it is not possi"
    ):
        load(folder, mtp=True)


def test_tied_embeddings(tmp_path):
    write_checkpoint(tmp_path, tie_word_embeddings=True)
    model = load(tmp_path)
    assert model.head is model.embed
    assert "lm_head.weight" not in tensors(CONFIG | {"tie_word_embeddings": True}, False)


def test_old_and_new_rope_keys_give_equal_logits(tmp_path):
    yarn = {"factor": 8.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.7}
    old = write_checkpoint(tmp_path / "old", rope_theta=2e4, rope_scaling={"type": "yarn", **yarn})
    new = write_checkpoint(tmp_path / "new", rope_parameters={"rope_type": "yarn", "rope_theta": 2e4, **yarn})
    equal(logits(new), logits(old))


def test_pickle_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match=r" has no \*\.safetensors file\.$"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} holds pickle files (pytorch_model.bin), which run code when they are loaded and are refused. "
        "Convert them to safetensors first."
    )


@pytest.mark.parametrize("keep", [0, 4, 100, 10_000, -1])
def test_a_file_cut_short_is_refused(tmp_path, keep):
    path = write_checkpoint(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file: "):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["[]", '{"weight_map": []}', "{"])
def test_a_broken_index_is_refused(tmp_path, text):
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises((ConfigError, CheckpointError), match=r"index\.json (must|is not)"):
        load(tmp_path)


def test_bf16_compute_is_close(tmp_path):
    folder = write_checkpoint(tmp_path)
    exact = logits(folder)[0]
    model = load_model(folder, registry.select(), torch.bfloat16)
    dtype = model.embed.dtype
    caches = model_cache.allocate(model.config, 64, dtype, model.cache_layers)
    with torch.inference_mode():
        got = model.logits(model.forward(build_step([Chunk(TOKENS, 0, [0])], 64), caches))
    assert got.dtype == torch.float32
    # The median, because a token whose router was nearly undecided may go to other experts.
    assert 0 < (got - exact).abs().median() < 0.05 * exact.abs().median()


def test_the_bundled_model_fits_its_config(bundled_model):
    load(bundled_model, mtp=True)
