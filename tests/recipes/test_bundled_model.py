"""The bundled model's recipe at tiny sizes: maths against transformers, checkpoint format, resume, data windows."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.bundled_model import corpus, export, model_card
from recipes.bundled_model.data import Windows, chat_text, conversations, turn, write_tokens
from recipes.bundled_model.model import Attend, DeepSeekV32, Gate, ModelConfig, topk_mask
from recipes.bundled_model.optim import orthogonalize
from recipes.bundled_model.tokenizer import BOS_ID, SPECIAL_TOKENS, config, train

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "tilery/bundled/tilery-books-26m"

TINY = ModelConfig(
    vocab_size=300,
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=96,
    num_attention_heads=4,
    q_lora_rank=48,
    kv_lora_rank=64,
    qk_nope_head_dim=8,
    qk_rope_head_dim=16,
    v_head_dim=8,
    index_head_dim=32,
    index_topk=24,
    moe_intermediate_size=32,
    max_position_embeddings=128,
)


def random_model(cfg: ModelConfig = TINY, seed: int = 0) -> DeepSeekV32:
    """Every parameter and the router bias random, so that no path is degenerate."""
    model = DeepSeekV32(cfg).init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.1 if parameter.dim() > 1 else 1 + 0.1 * noise)
        for layer in model.moe_layers():
            layer.mlp.gate.e_score_correction_bias.normal_(0, 0.1, generator=generator)
    return model


@pytest.mark.parametrize("attend", [Attend.DENSE, Attend.SPARSE_ONLY])
def test_logits_equal_transformers(tmp_path: Path, attend: Attend) -> None:
    from transformers import DeepseekV32ForCausalLM

    cfg = TINY if attend is Attend.SPARSE_ONLY else replace(TINY, index_topk=128)
    model = random_model(cfg)
    export.write_checkpoint(export.checkpoint_tensors(model), cfg, tmp_path)
    export.load_tensors(model, export.read_pieces(tmp_path, "model.safetensors"))  # BF16 rounding on both sides
    reference = DeepseekV32ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    tokens = torch.randint(0, cfg.vocab_size, (2, 80), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model.logits(model(tokens, attend=attend).hidden_BSH)
        theirs = reference(tokens).logits
    assert (ours - theirs).abs().max() < 1e-4
    assert ours.std() > 0.1


def test_sparse_equals_dense_when_topk_covers_the_text() -> None:
    model = random_model(replace(TINY, index_topk=40))
    tokens = torch.randint(0, TINY.vocab_size, (1, 40), generator=torch.Generator().manual_seed(2))
    dense, sparse = (model(tokens, tokens, attend) for attend in (Attend.DENSE, Attend.SPARSE_ONLY))
    torch.testing.assert_close(dense.hidden_BSH, sparse.hidden_BSH, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(dense.mtp_BSH, sparse.mtp_BSH, atol=1e-4, rtol=1e-4)


def test_topk_mask_takes_k_causal_keys_and_the_lowest_of_equals() -> None:
    score = torch.randint(0, 4, (3, 20, 20), generator=torch.Generator().manual_seed(3)).float()
    mask = topk_mask(score, 5)
    for row in range(20):
        for b in range(3):
            order = sorted(range(row + 1), key=lambda t: (-score[b, row, t], t))[:5]
            assert mask[b, row].nonzero().flatten().tolist() == sorted(order)


def test_gate_chooses_within_the_two_best_groups() -> None:
    cfg = TINY
    gate = Gate(cfg)
    generator = torch.Generator().manual_seed(4)
    gate.weight.data.normal_(generator=generator)
    gate.e_score_correction_bias.normal_(0, 0.3, generator=generator)
    x = torch.randn(1, 50, cfg.hidden_size, generator=generator) * 0.1
    weight, load = gate(x)
    score = (x @ gate.weight.T).sigmoid()[0]
    for token in range(50):
        choice = (score[token] + gate.e_score_correction_bias).view(4, 4)
        groups = choice.topk(2).values.sum(-1).topk(2).indices
        allowed = torch.full((4, 4), -torch.inf)
        allowed[groups] = choice[groups]
        chosen = allowed.flatten().topk(4).indices
        expected = torch.zeros(16)
        expected[chosen] = score[token, chosen] / score[token, chosen].sum() * 2.5
        torch.testing.assert_close(weight[0, token], expected)
    assert load.sum() == 50 * 4


def test_indexer_divergence_reaches_only_the_indexer() -> None:
    model = random_model()
    tokens = torch.randint(0, TINY.vocab_size, (1, 48), generator=torch.Generator().manual_seed(5))
    for attend in (Attend.DISTIL, Attend.SPARSE):
        model.zero_grad()
        divergence = model(tokens, tokens, attend).divergence
        divergence.backward()
        touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert divergence > 0
        assert touched
        assert all(".indexer." in name for name in touched)


def test_fp8_round_trip_and_scales() -> None:
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(6))
    weight[:128, :128] = 0
    fp8, scale = export.quantize_block(weight)
    assert fp8.dtype == torch.float8_e4m3fn
    assert fp8.shape == (200, 300)
    assert scale.shape == (2, 3)
    assert scale[1, 2] == weight[128:, 256:].abs().max() / 448
    back = export.dequantize_block(fp8, scale)
    assert (back - weight).norm() / weight.norm() < 0.04
    assert back[:128, :128].abs().max() == 0


def test_checkpoint_keys_and_dtypes(tmp_path: Path) -> None:
    model = random_model()
    export.write_checkpoint(export.quantize(export.checkpoint_tensors(model)), TINY, tmp_path)
    tensors = export.read_pieces(tmp_path, "model.safetensors")
    f8 = {key for key, value in tensors.items() if value.dtype == torch.float8_e4m3fn}
    assert {key + "_scale_inv" for key in f8} == {key for key in tensors if key.endswith("_scale_inv")}
    # Per layer: 5 attention and 2 indexer matrices; a dense MLP 3; 16 + 1 experts 3 each; layer 2 is the MTP layer.
    assert len(f8) == 3 * 7 + 3 + 2 * 17 * 3
    bf16 = ("model.embed_tokens.weight", "lm_head.weight", "model.layers.2.eh_proj.weight")
    f32 = ("model.layers.1.mlp.gate.e_score_correction_bias", "model.layers.0.self_attn.indexer.k_norm.bias")
    assert all(tensors[key].dtype == torch.bfloat16 for key in bf16)
    assert all(tensors[key].dtype == torch.float32 for key in f32)
    assert "model.layers.2.shared_head.norm.weight" in tensors
    assert not any("layers.2.embed_tokens" in key or "shared_head.head" in key for key in tensors)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["quantization_config"]["weight_block_size"] == [128, 128]
    assert ModelConfig.from_hf(tmp_path / "config.json") == TINY


def test_pieces_round_trip_and_missing_key(tmp_path: Path) -> None:
    model = random_model()
    tensors = export.checkpoint_tensors(model)
    paths = export.write_pieces(tensors, tmp_path, limit=200_000)
    assert len(paths) > 1
    again = export.read_pieces(tmp_path)
    other = export.load_tensors(random_model(seed=9), again)
    assert all(torch.equal(a, b) for a, b in zip(export.checkpoint_tensors(other).values(), tensors.values()))
    del again["model.norm.weight"]
    with pytest.raises(KeyError, match=r"checkpoint lacks 1 tensors, for example model\.norm\.weight"):
        export.load_tensors(other, again)
    with pytest.raises(FileNotFoundError, match=r"run train\.py first"):
        export.read_pieces(tmp_path / "nowhere")


def test_orthogonalize_flattens_the_spectrum() -> None:
    x = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(7))
    singular = torch.linalg.svdvals(orthogonalize(x))
    assert singular.min() > 0.5
    assert singular.max() < 1.5


def test_windows_cover_the_stream_once_per_pass_and_start_with_bos() -> None:
    stream = torch.arange(3, 4000, dtype=torch.int16)
    windows = Windows(stream, torch.empty(0, dtype=torch.int64), length=30, seed=1)
    starts = windows.starts(0, windows.per_pass)
    assert starts.unique().numel() == windows.per_pass
    assert (starts.sort().values.diff() == 32).all()
    assert torch.equal(torch.cat((windows.starts(0, 7), windows.starts(7, 200))), windows.starts(0, 207))
    batch = windows.batch(5, 3)
    assert batch.shape == (3, 32)
    assert (batch[:, 0] == BOS_ID).all()
    assert (batch[:, 1:].diff() == 1).all()


def test_windows_snap_to_blank_lines() -> None:
    stream = torch.arange(3, 4000, dtype=torch.int16)
    breaks = torch.arange(0, 3996, 10)
    windows = Windows(stream, breaks, length=30, seed=1)
    second = windows.batch(0, 60)[:, 1] - 4  # position of the first token that BOS did not replace, less one
    assert 0.3 < (second % 10 == 0).float().mean() < 0.8


def test_dialogue_becomes_chat_turns() -> None:
    text = 'He sat.\n\n"Where," said he, "is it?"\n\n"Gone!" she said, and looked away.\n\n"Lost?"\n\nSilence.'
    assert turn('"Where," said he, "is it?"') == ("Where, is it?", "said he,")
    assert turn('"An unclosed line') is None
    (run,) = conversations(text)
    assert [speech for speech, _ in run] == ["Where, is it?", "Gone!"]

    class Always:
        def random(self) -> float:
            return 0.0

    assert chat_text(run, Always()) == (
        "<｜User｜>Where, is it?<｜Assistant｜><think>she said, and looked away.</think>Gone!<｜end▁of▁sentence｜>"
    )


@pytest.fixture(scope="module")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train(iter(["the cat sat on the mat, and the dog sat on the log.\n\n" * 20]), vocab_size=300).save(
        str(folder / "tokenizer.json")
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config(128)), encoding="utf-8")
    return folder


def test_tokenizer_adds_bos_and_round_trips(tiny_tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    text = "The cat's 12345 naïve\n\nmats — 猫"
    ids = tokenizer(text).input_ids
    assert ids[0] == BOS_ID
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.convert_ids_to_tokens(list(range(len(SPECIAL_TOKENS)))) == list(SPECIAL_TOKENS)
    assert tokenizer.decode(tokenizer("<think>a</think>").input_ids, skip_special_tokens=True) == "<think>a</think>"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜></think>"


def test_training_resumes_where_it_stopped(tmp_path: Path, tiny_tokenizer: Path) -> None:
    from recipes.bundled_model.train import Plan, Trainer

    rng = np.random.default_rng(0)
    for name in ("books-00", "dialogue"):
        write_tokens(tmp_path / f"{name}.u16.xz", rng.integers(3, 300, 6000).astype(np.uint16))
    plan = ROOT / "recipes/bundled_model/plans/tiny.json"
    values = json.loads(plan.read_text())
    values["model"]["vocab_size"] = 300
    for stage, steps in zip(values["stages"], (4, 2, 2)):
        stage["steps"] = steps
    override = {"stages": values["stages"], "model": values["model"]}

    def trainer() -> Trainer:
        return Trainer(Plan.read(plan, override), tmp_path, tiny_tokenizer, torch.device("cpu"), compiled=False)

    torch.manual_seed(0)
    whole = trainer()
    while whole.stage_index < 3:
        whole.run_stage(float("inf"), log_every=1)
    parts, stops = trainer(), 0
    while parts.stage_index < 3:
        if not parts.run_stage(float("-inf"), log_every=1):  # stops after every step
            parts.save(tmp_path / "state.pt")
            parts = trainer()
            parts.load(tmp_path / "state.pt")
            stops += 1
    assert stops == 8
    assert [row["stage"] for row in parts.curve] == ["dense"] * 4 + ["indexer"] * 2 + ["sparse"] * 2
    for a, b in zip(whole.model.state_dict().values(), parts.model.state_dict().values()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert whole.curve[0]["lm"] == pytest.approx(np.log(300), abs=0.3)
    assert any(layer.mlp.gate.e_score_correction_bias.abs().sum() > 0 for layer in whole.model.moe_layers())


def test_every_plan_is_readable() -> None:
    from recipes.bundled_model.train import Plan, Stage

    for name in ("full", "short", "tiny"):
        plan = Plan.read(ROOT / f"recipes/bundled_model/plans/{name}.json", {})
        assert all(stage.attend in Attend.__members__ for stage in plan.stages)
    stage = Stage("s", "DENSE", 8, 1, warmup=0.1, hold=0.5, rate_from=1.0, rate_to=0.2)
    assert [round(stage.rate(f), 6) for f in (0.0, 0.05, 0.3, 0.5, 0.75, 1.0)] == [0.0, 0.5, 1.0, 1.0, 0.6, 0.2]


def test_corpus_is_cleaned_and_cut_into_documents(tmp_path: Path) -> None:
    from recipes.bundled_model.tokenizer import documents

    (tmp_path / "A").mkdir()
    (tmp_path / "A/one.md").write_bytes("# One \r\n\r\n\r\n\r\nText — é\n".encode())
    (tmp_path / "A/two.md").write_text("Two\n")
    titles = tmp_path / "titles.txt"
    titles.write_text("train-00\tA/one.md\ntrain-00\tA/two.md\nheldout\tA/two.md\n")
    assert corpus.build(tmp_path, tmp_path / "out", titles) == {"train-00": 2, "heldout": 1}
    assert list(documents(tmp_path / "out/train-00.txt.xz")) == ["# One\n\nText — é\n", "Two\n"]
    assert {name: len(paths) for name, paths in corpus.shards(corpus.TITLES).items()}["heldout"] == 12


def test_shipped_model_reads_books() -> None:
    """The shipped FP8 weights give a book's opening a loss that only a trained model gives, with either attention."""
    from tokenizers import Tokenizer

    text = (
        "It was a bright cold morning, and the old man stood at the window, looking out upon the sea. He had not "
        "slept, for the wind had risen in the night, and he had thought of the boats that were still out in the bay."
    )
    ids = torch.tensor([Tokenizer.from_file(str(SHIPPED / "tokenizer.json")).encode(text).ids])
    cfg = ModelConfig.from_hf(SHIPPED / "config.json")
    model = export.load_tensors(DeepSeekV32(cfg), export.read_pieces(SHIPPED, "model.safetensors"))
    with torch.no_grad():
        for attend in (Attend.DENSE, Attend.SPARSE_ONLY):
            logits = model.logits(model(ids, attend=attend).hidden_BSH)
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
            assert loss < 3.5
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 32e6


def test_model_card_is_what_the_results_say() -> None:
    cfg = ModelConfig.from_hf(SHIPPED / "config.json")
    size = (SHIPPED / "model.safetensors").stat().st_size
    card = model_card.card(ROOT / "recipes/bundled_model/results", cfg, size)
    assert (SHIPPED / "README.md").read_text(encoding="utf-8") == card, "run recipes.bundled_model.model_card"
