"""Which device the engine computes on, that it says why it cannot, and that nothing strays onto another one."""

import msgspec
import numpy as np
import pytest
import torch

from tests.engine.support import VOCAB, make_core, request, run
from tilery.engine import runner
from tilery.engine.config import Device, EngineConfig
from tilery.engine.messages import SamplingParams
from tilery.engine.runner import Runner, free_memory_bytes, resolve_device
from tilery.engine.sampler import SampleRow, SamplerState, sample
from tilery.models.loader import load_model
from tilery.ops import registry

H100 = registry.Platform("cuda", "sm_90", True, 1)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture
def machine(monkeypatch):
    """Pretends that torch is built for a CUDA version (None: without it), and whether it finds a GPU."""

    def pretend(built, found):
        monkeypatch.setattr(torch.version, "cuda", built)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    return pretend


def test_auto_takes_a_gpu_only_where_torch_can_use_one(machine):
    assert EngineConfig(model="m").device is Device.AUTO
    machine("13.0", True)
    assert resolve_device(Device.AUTO) == resolve_device(Device.CUDA) == torch.device("cuda", 0)
    assert resolve_device(Device.CPU) == torch.device("cpu")
    for built in (None, "13.0"):
        machine(built, False)
        assert resolve_device(Device.AUTO) == resolve_device(Device.CPU) == torch.device("cpu")


@pytest.mark.parametrize(
    ("built", "says"),
    [
        (
            None,
            r"^device cuda: this torch \(\S+\) is built without CUDA; install a build with it, or take device cpu\.$",
        ),
        ("13.0", r"^device cuda: torch \S+ finds no NVIDIA GPU that it can use; see whether nvidia-smi shows one and "),
    ],
)
def test_a_gpu_that_cannot_be_used_is_refused_before_anything_is_loaded(machine, built, says):
    machine(built, False)
    with pytest.raises(ValueError, match=says):
        Runner(EngineConfig(model="no such model", device=Device.CUDA))


def test_no_implementation_for_cpus_is_chosen_on_a_gpu():
    chosen = registry.select(H100).chosen
    targets = {
        (operator.name, one.name): one.target for operator in registry.list_operators(H100)
        for one in operator.implementations
    }  # fmt: skip
    assert {targets[pair] for pair in chosen.items()} <= {"any", "cuda"}
    with pytest.raises(ValueError, match="'batched-gather' of 'mla_decode' cannot run here: needs cpu, this is cuda"):
        registry.select(H100, {"mla_decode": "batched-gather"})


def test_a_gpu_keeps_matrices_and_activations_in_bfloat16(folder):
    model = load_model(folder, registry.select(H100), torch.bfloat16)
    assert model.dtype == model.head.dtype == model.layers[1].attention.o_proj.dtype == torch.bfloat16
    assert model.layers[1].ffn.gate.dtype == model.norm.dtype == torch.float32


@pytest.mark.parametrize("cache", ["model", "fp8"])
def test_every_tensor_is_made_on_a_named_device(folder, cache):
    """The default device is one on which nothing can be computed: a tensor made without a device would fail the run."""
    settings = {"device": "cpu", "operators": {"*": "reference"}, "cache_dtype": cache, "speculative_tokens": 2}
    core = make_core(folder, **settings, enable_prefix_cache=False, max_batch_tokens=64)
    wishes = [
        {"logprobs": 2, "prompt_logprobs": 1},
        {"temperature": 1.0, "seed": 1, "logit_bias": {5: 2.0}, "frequency_penalty": 0.5},
        {"temperature": 1.0, "seed": 2, "top_p": 0.9, "min_tokens": 4, "ignore_eos": False},
    ]
    requests = [
        request(f"r{i}", [2 + (i + t) % (VOCAB - 2) for t in range(30 * i + 5)], **wish)
        for i, wish in enumerate(wishes)
    ]
    expected = run(core, *requests)
    with torch.device("meta"):
        assert torch.zeros(1).is_meta
        got = run(core, *requests)
    assert {key: answer.tokens for key, answer in got.items()} == {
        key: answer.tokens for key, answer in expected.items()
    }


def test_the_cache_of_a_gpu_is_planned_by_the_drivers_word(monkeypatch, folder):
    made = Runner(msgspec.convert({"model": str(folder), "device": "cpu", "progress": False}, EngineConfig))
    assert made.num_blocks == runner.DEFAULT_CACHE_TOKENS // 64
    made.device = torch.device("cuda", 0)
    freed = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (40 << 30, 80 << 30))
    assert free_memory_bytes(made.device) == 40 << 30
    assert freed == [True]
    base = {"model": str(folder), "max_running": 8, "max_model_len": 640}

    def blocks(**changes):
        return made._plan_blocks(msgspec.convert(base | changes, EngineConfig))

    assert blocks() == 8 * 10  # all that eight requests of full length can use
    assert blocks(cache_tokens=65) == 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 20, 80 << 30))
    per_token = 3 * 2 * (128 + 16 + 128)
    assert blocks() == int((1 << 20) * runner.MEMORY_SHARE["cuda"]) // per_token // 64
    with pytest.raises(ValueError, match=r"^a cache of 704 tokens needs 0\.0 GiB \(1632 bytes a token\), but 0\.0 GiB"):
        blocks(cache_tokens=704)


# ---- on a GPU ----------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("settings", [{}, {"cache_dtype": "fp8"}, {"speculative_tokens": 2}, {"max_batch_tokens": 64}])
def test_a_gpu_gives_the_cpus_tokens(folder, settings):
    requests = [request(f"r{i}", [2 + (7 * i + t * t) % (VOCAB - 2) for t in range(20 * i + 3)]) for i in range(6)]
    wanted, got = (run(make_core(folder, device=device, **settings), *requests) for device in ("cpu", "cuda"))
    assert {key: answer.tokens for key, answer in got.items()} == {key: answer.tokens for key, answer in wanted.items()}


@needs_gpu
def test_a_gpu_draws_the_cpus_tokens():
    vocab, count = 5000, 24
    wishes = [
        {"temperature": 0.0},
        {},
        {"top_p": 0.8},
        {"top_k": 5, "min_p": 0.01, "logprobs": 3},
        {"logit_bias": {5: 30.0}, "repetition_penalty": 1.2, "min_tokens": 6},
        {"temperature": 0.0, "frequency_penalty": 1.0},
    ]
    logits = torch.randn(count, vocab, generator=torch.Generator().manual_seed(0)) * 3
    logits[7, 3] = torch.nan
    drawn = []
    for device in ("cpu", "cuda"):
        rows = []
        for i in range(count):
            params = SamplingParams(**wishes[i % len(wishes)])
            state = SamplerState(params, seed=i, prompt_token_ids=[1, 2], eos_token_ids=[1], vocab_size=vocab)
            state.append([4, 5])
            mask = np.full(-(-vocab // 32), 0x0F0F0F0F, dtype=np.int32) if i >= 18 else None
            rows.append(SampleRow(state, mask=mask))
        result = sample(logits.to(device), rows)
        records = {i: (row.rank, row.top_ids) for i, row in enumerate(result.logprobs) if row is not None}
        drawn.append((result.token_ids, records, result.errors))
    assert drawn[0] == drawn[1]
    assert list(drawn[0][2]) == [7]
