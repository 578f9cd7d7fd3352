"""All features at once on trained weights, in contexts where attention is sparse."""

import msgspec
import pytest

from tests.matrix.test_matrix import BF16_DRIFT, drive
from tilery.engine.config import EngineConfig
from tilery.engine.core import EngineCore
from tilery.engine.messages import AddRequest, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=0)


def engine(folder, **settings):
    base = {"model": str(folder), "progress": False, "enable_prefix_cache": False, "cache_tokens": 8192}
    return EngineCore(msgspec.convert({**base, **settings}, EngineConfig))


def requests(name, prompts, n=1):
    params = msgspec.structs.replace(GREEDY, n=n)
    return [AddRequest(request_id=f"{name}{i}", prompt_token_ids=p, params=params) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cache_dtype", ["model", "fp8"])
def test_everything_at_once(bundled_model, dtype, cache_dtype):
    settings = {"dtype": dtype, "cache_dtype": cache_dtype}
    plain = engine(bundled_model, **settings)
    sample = SamplingParams(seed=3, max_tokens=400, ignore_eos=True)
    wrote = AddRequest(request_id="text", prompt_token_ids=[0], params=sample)
    text = [0, *drive(plain, [wrote])["text", 0][0]]
    topk = plain.runner.model_config.index_topk
    prompts = [text[:310], text[:128] + text[200:390], text[:250]]
    assert len(prompts[0]) > topk
    expected = [drive(plain, requests("p", [prompt]))["p0", 0] for prompt in prompts]

    features = {
        "enable_prefix_cache": True,
        "max_batch_tokens": 97,
        "max_running": 8,
        "cache_tokens": 11 * 64,
        "speculative_tokens": 2,
        "speculative_auto_off": False,
    }
    core = engine(bundled_model, **settings, **features)
    drive(core, requests("warm", prompts[:1]))
    neighbours = requests("gone", [prompt[::-1] for prompt in prompts])
    got = drive(core, [*neighbours, *requests("r", prompts, n=2)], [r.request_id for r in neighbours])
    stats = core.stats()
    assert min(stats.prefix_hit_tokens, stats.preemptions, stats.spec_accepted_tokens) > 0
    for i, (tokens, logprobs) in enumerate(expected):
        for index in range(2):
            chosen, values = got[f"r{i}", index]
            if dtype == "float32":
                assert chosen == tokens
            common = next((j for j, (a, b) in enumerate(zip(chosen, tokens)) if a != b), len(tokens) - 1)
            assert max(abs(a - b) for a, b in zip(values[: common + 1], logprobs)) < BF16_DRIFT
