"""Sparse MLA on Hopper: machine code without a GPU, numbers with one."""

import pytest
import torch

pytest.importorskip("triton")

from tilery.ops import cache as ops_cache
from tilery.ops.hopper import sparse_mla, sparse_prefill
from tilery.ops.hopper.variant import build

SCALE = 192**-0.5
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an sm_90 GPU"
)
VARIANTS = [*sparse_mla.variants(), *sparse_prefill.variants()]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_machine_code_keeps_everything_in_registers(variant):
    built = build(variant)
    assert built.spills == 0
    if "combine" in variant.name:
        return
    # 36 for the scores; 8 for each half of the output
    assert built.counts["HGMMA"] == 36 + 8 + 8
    assert built.shared <= 232448
    assert built.counts["LDGSTS"] > 0


def test_splits_fill_the_machine_but_not_more():
    assert sparse_mla.choose(128, 128, 2048).splits == 1
    assert sparse_mla.choose(256, 128, 2048).splits == 1
    few = sparse_mla.choose(4, 128, 2048).splits
    assert 100 <= 4 * 2 * few <= 132
    assert sparse_mla.choose(1, 16, 64).splits == 1
    assert sparse_mla.choose(3, 16, 0).splits == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 16, 512, dtype=torch.bfloat16)}, "q must be"),
        ({"q": torch.zeros(2, 16, 576)}, "q must be"),
        ({"cache": torch.zeros(4, 640, dtype=torch.uint8)}, "cache must be"),
        ({"indices": torch.zeros(2, 8, dtype=torch.int64)}, "indices must be"),
        ({"indices": torch.zeros(3, 8, dtype=torch.int32)}, "indices must be"),
        ({"sink": torch.zeros(8)}, "sink must be"),
        ({"sink": torch.zeros(32)[::2]}, "sink must be"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, "lengths must be"),
        ({"out": torch.zeros(2, 16, 576, dtype=torch.bfloat16)}, "out must be"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    given = {
        "q": torch.zeros(2, 16, 576, dtype=torch.bfloat16),
        "cache": torch.zeros(4, 656, dtype=torch.uint8),
        "indices": torch.zeros(2, 8, dtype=torch.int32),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        sparse_mla.sparse_mla_decode(given.pop("q"), given.pop("cache"), given.pop("indices"), scale=1.0, **given)


def _rows(kind: str, count: int) -> torch.Tensor:
    rows = torch.randn(count, 576, device="cuda")
    if kind == "bf16":
        return rows.bfloat16()
    cache = torch.zeros(count, 656, dtype=torch.uint8, device="cuda")
    ops_cache.write_mla(cache, torch.arange(count, device="cuda"), rows[:, :512], rows[:, 512:])
    return cache


def _exact(q, cache, indices, sink, lengths):
    """(out, lse) in float64, of the rows as they are stored."""
    stored = cache if cache.dtype != torch.uint8 else ops_cache.read_mla(
        cache, torch.arange(len(cache), device=cache.device), 512, torch.float32
    )  # fmt: skip
    outs, lses = [], []
    for t in range(len(q)):
        own = indices[t] if lengths is None else indices[t, : int(lengths[t])]
        own = own[own >= 0].long()
        scores = q[t].double() @ stored[own].double().T * SCALE
        lse = scores.logsumexp(1) if len(own) else torch.full((q.shape[1],), float("-inf"), device=q.device).double()
        out = scores.softmax(1) @ stored[own, :512].double()
        outs.append(out if sink is None else out * torch.sigmoid(lse - sink.double())[:, None])
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)


CASES = {
    "128_heads": {"tokens": 5, "heads": 128, "width": 2048, "sink": True},
    "64_heads": {"tokens": 3, "heads": 64, "width": 192, "sink": True},
    "32_heads": {"tokens": 2, "heads": 32, "width": 320},
    "16_heads_one_token": {"tokens": 1, "heads": 16, "width": 2048, "sink": True},
    "holes": {"tokens": 4, "heads": 128, "width": 512, "holes": 0.9, "sink": True},
    "ragged": {"tokens": 8, "heads": 64, "width": 256, "lengths": [0, 1, 63, 64, 65, 128, 200, 256], "sink": True},
    "odd_width": {"tokens": 3, "heads": 16, "width": 77, "holes": 0.2},
}


@needs_hopper
@pytest.mark.parametrize("kind", ["fp8", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_close_to_exact(kind, name):
    torch.manual_seed(0)
    case = CASES[name]
    tokens, heads, width = case["tokens"], case["heads"], case["width"]
    cache = _rows(kind, 5000)
    q = torch.randn(tokens, heads, 576, device="cuda").bfloat16()
    indices = torch.randint(0, len(cache), (tokens, width), device="cuda", dtype=torch.int32)
    indices[torch.rand(tokens, width, device="cuda") < case.get("holes", 0.0)] = -1
    if "holes" in case:
        indices[0] = -1
    sink = torch.randn(heads, device="cuda") if case.get("sink") else None
    lengths = torch.tensor(case["lengths"], dtype=torch.int32, device="cuda") if "lengths" in case else None
    expected, expected_lse = _exact(q, cache, indices, sink, lengths)
    configs = [sparse_mla.Config(1), sparse_mla.Config(3), None] if kind == "fp8" else [None]
    for config in configs:
        out = torch.full((tokens, heads, 512), float("nan"), dtype=torch.bfloat16, device="cuda")
        call = sparse_mla.sparse_mla_decode if kind == "fp8" else sparse_prefill.sparse_mla_prefill
        got, lse = call(q, cache, indices, scale=SCALE, sink=sink, lengths=lengths, out=out, config=config)
        assert got.isfinite().all()
        assert (got.double() - expected).norm() <= 3e-3 * expected.norm()
        empty = expected_lse == float("-inf")
        assert (lse[empty] == float("-inf")).all()
        torch.testing.assert_close(lse[~empty].double(), expected_lse[~empty], rtol=0, atol=2e-3)
        assert not got[empty].any()


@needs_hopper
def test_same_in_a_graph():
    cache = _rows("fp8", 4096)
    q = torch.randn(2, 2, 128, 576, device="cuda").bfloat16()
    indices = torch.randint(0, 4096, (2, 2, 2048), device="cuda", dtype=torch.int32)
    expected, _ = sparse_mla.sparse_mla_decode(q, cache, indices, scale=SCALE)
    out = torch.zeros_like(expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sparse_mla.sparse_mla_decode(q, cache, indices, scale=SCALE, out=out)
    graph.replay()
    assert torch.equal(out, expected)
