"""The indexer on Hopper: what its binaries do, its arguments and, with a Hopper GPU, scores and selections."""

import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tilery.ops.cache import write_index
from tilery.ops.hopper import index_logits as logits
from tilery.ops.hopper import index_select as select
from tilery.ops.hopper.variant import Variant, build

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)

SCORERS = [v for v in (*logits.variants(), *select.variants()) if "q_desc" in v.signature]
CLOSE = 1e-3
"""Relative L2 error against float64 of the same FP8 inputs; 1.3e-4 is what the tensor core's sums give."""


def loops(sass: str) -> list[list[str]]:
    """The instructions from each last product of a tile to the branch that ends its loop."""
    lines = [line.split("*/", 1)[1].strip() for line in sass.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line)]
    found = []
    for at, line in enumerate(lines):
        if "QGMMA" in line and "gsb0" in line:
            end = next(i for i in range(at, len(lines)) if re.search(r"\bBRA\b", lines[i]))
            found.append(lines[at : end + 1])
    return found


@pytest.mark.parametrize("variant", SCORERS, ids=lambda variant: variant.name)
def test_binary(variant: Variant) -> None:
    built = build(variant)
    assert built.counts["QGMMA"] == 16  # four products of 32 for each of four warpgroups or tiles
    assert built.shared <= 227 * 1024
    steps = loops(built.sass)
    assert len(steps) == 4
    for step in steps:
        assert not [line for line in step if re.search(r"\b(LDL|STL)\b", line)], "the inner loop spills"
    if "rescue" not in variant.name:
        heads, queries = variant.constexprs["HEADS"], variant.constexprs["QW"]
        for step in steps:
            # one addition and one multiply-add a product, and no maximum, which would run at half the rate
            arithmetic = [line for line in step if re.match(r"(FADD|FMUL|FFMA|FMNMX)\b", line)]
            assert len(arithmetic) <= heads * queries + 8
            assert not [line for line in arithmetic if line.startswith("FMNMX")]


def prefill(tokens: int, length: int, heads: int = 64, device: str = "cpu", ranges: str = "causal") -> dict[str, Any]:
    rand = torch.Generator().manual_seed(tokens + length)
    q, keys = torch.randn(tokens, heads, 128, generator=rand), torch.randn(length, 128, generator=rand)
    weights, scales = torch.randn(tokens, heads, generator=rand), torch.rand(length, generator=rand) + 0.5
    starts = torch.zeros(tokens, dtype=torch.int32)
    ends = torch.arange(length - tokens + 1, length + 1, dtype=torch.int32)
    if ranges == "random":
        both = torch.randint(0, length + 1, (2, tokens), generator=rand, dtype=torch.int32)
        starts, ends = both.amin(0), both.amax(0)
        starts[::7] = ends[::7]
    case = {
        "q": q.to(torch.float8_e4m3fn), "weights": weights / 100, "keys": keys.to(torch.float8_e4m3fn),
        "key_scales": scales, "starts": starts, "ends": ends,
    }  # fmt: skip
    return {name: x.to(device) for name, x in case.items()}


def exact(q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    products = torch.einsum("snd,ld->snl", q.double(), keys.double()).relu()
    return torch.einsum("sn,snl->sl", weights.double(), products) * scales.double()


def error(got: torch.Tensor, wanted: torch.Tensor, inside: torch.Tensor) -> float:
    return float((got.double() - wanted)[inside].norm() / wanted[inside].norm())


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("q", torch.zeros(8, 48, 128).to(torch.float8_e4m3fn), "16, 32 or 64 heads"),
        ("q", torch.zeros(8, 64, 128), "q must be torch.float8_e4m3fn"),
        ("weights", torch.zeros(8, 32), "weights must be"),
        ("keys", torch.zeros(40, 64).to(torch.float8_e4m3fn), "keys must be"),
        ("key_scales", torch.zeros(39), "key_scales must be"),
        ("starts", torch.zeros(8, dtype=torch.int64), "starts must be"),
        ("ends", torch.zeros(16, dtype=torch.int32)[::2], "contiguous"),
        ("out", torch.zeros(8, 39), "out must be"),
    ],
)
def test_prefill_arguments(name: str, wrong: torch.Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        logits.index_logits(**(prefill(8, 40) | {name: wrong}))


def test_selection_arguments() -> None:
    with pytest.raises(ValueError, match="k must be 1 to 2048"):
        select.index_select(**prefill(8, 40), k=2049)
    with pytest.raises(ValueError, match="out must be"):
        select.index_select(**prefill(8, 40), k=64, out=torch.zeros(8, 63, dtype=torch.int32))
    no_keys = prefill(8, 40) | {"keys": torch.zeros(0, 128)}
    assert select.index_select(**no_keys, k=5).tolist() == [[-1] * 5] * 8


@pytest.mark.parametrize("length", [1, 130, 4161])
def test_any_number_of_keys_can_be_described(length: int) -> None:
    case = prefill(3, length)
    operands = (case["q"], case["weights"], case["keys"])
    for scales in (case["key_scales"], torch.ones(length + 1)[1:]):  # the second does not start on 16 bytes
        flat = logits.descriptors(*operands, scales, 2)[3]
        assert flat.shape == [1, length]
        assert flat.strides[0] * 4 % 16 == 0
        assert torch.equal(flat.base, scales)


def test_configurations() -> None:
    for config in (logits.prefill_config(), *(logits.paged_config(step) for step in (1, 2, 3, 4))):
        assert config.stages % config.along_keys == 0
    with pytest.raises(ValueError, match="not a configuration"):
        logits.Config(1, 4, 1, 6)


@pytest.mark.parametrize("length", [16385, 65536, 65537, 1 << 20])
def test_samples(length: int) -> None:
    sample = select._sample(length)
    assert sample * 2048 >= 32 * length
    spread = select._spread.__wrapped__(length, sample, torch.device("cpu"))
    assert spread.diff().min() > 0
    assert int(spread[-1]) < length


def test_paged_arguments() -> None:
    case = prefill(10, 64)
    cache, table = torch.zeros(3, 64 * 132, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.int32)
    lengths = torch.tensor([70, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="1 to 4 rows for each of 2 requests"):
        logits.index_logits_paged(case["q"], case["weights"], cache, table, lengths)
    q, weights = case["q"][:4], case["weights"][:4]
    with pytest.raises(ValueError, match="block_table must be int32"):
        logits.index_logits_paged(q, weights, cache, table.long(), lengths)
    with pytest.raises(ValueError, match="cache must be"):
        logits.index_logits_paged(q, weights, cache[:, :-4].contiguous(), table, lengths)


@on_hopper
@pytest.mark.parametrize(
    ("tokens", "length", "heads", "ranges"),
    [(1, 1, 64, "causal"), (3, 4, 16, "causal"), (515, 3000, 64, "causal"), (300, 4161, 64, "random"),
     (37, 200, 16, "random"), (9, 130, 32, "causal")],
)  # fmt: skip
def test_prefill_scores(tokens: int, length: int, heads: int, ranges: str) -> None:
    case = prefill(tokens, length, heads, "cuda", ranges)
    out = torch.full((tokens, length), float("nan"), device="cuda")
    got = logits.index_logits(**case, out=out)
    position = torch.arange(length, device="cuda")
    inside = (position >= case["starts"][:, None]) & (position < case["ends"][:, None])
    wanted = exact(case["q"], case["weights"], case["keys"], case["key_scales"])
    assert (got[~inside] == float("-inf")).all()
    assert error(got, wanted, inside) < CLOSE


@on_hopper
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_paged_scores(step: int) -> None:
    rand = torch.Generator().manual_seed(step)
    lengths = torch.tensor([64, 300, 5, 129, 1000], dtype=torch.int32)
    pages, used = 64, (lengths.amax().item() + 63) // 64
    table = torch.stack([torch.randperm(pages, generator=rand)[:used] for _ in lengths]).int()
    cache = torch.zeros(pages, 64 * 132, dtype=torch.uint8)
    write_index(cache, torch.arange(pages * 64), torch.randn(pages * 64, 128, generator=rand))
    case = prefill(len(lengths) * step, 5000)
    q, weights = case["q"].cuda(), case["weights"].cuda()
    out = torch.full((len(q), used * 64), float("nan"), device="cuda")
    got = logits.index_logits_paged(q, weights, cache.cuda(), table.cuda(), lengths.cuda(), out)
    keys = cache[:, : 64 * 128].reshape(-1, 64, 128).view(torch.float8_e4m3fn)
    scales = cache[:, 64 * 128 :].contiguous().view(torch.float32)
    for b, length in enumerate(lengths.tolist()):
        rows, own = slice(b * step, (b + 1) * step), table[b].long()
        key, scale = keys.view(torch.uint8)[own].view(torch.float8_e4m3fn).reshape(-1, 128), scales[own].reshape(-1)
        wanted = exact(q[rows], weights[rows], key.cuda(), scale.cuda())
        last = length - step + torch.arange(step, device="cuda")
        inside = torch.arange(used * 64, device="cuda") <= last[:, None]
        assert (got[rows][~inside] == float("-inf")).all()
        assert error(got[rows], wanted, inside) < CLOSE


def best(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The stated winners in order of position, -1 first."""
    values, positions = torch.sort(scores, dim=1, descending=True, stable=True)
    found = torch.where(values[:, :k] == float("-inf"), -1, positions[:, :k])
    return torch.nn.functional.pad(found, (0, k - found.shape[1]), value=-1).sort(1).values.int()


@on_hopper
@pytest.mark.parametrize("kind", ["causal", "random", "few", "ties", "together", "hidden", "zero"])
@pytest.mark.parametrize(("tokens", "length", "k"), [(200, 5000, 2048), (1100, 20000, 2048), (1030, 17000, 256)])
def test_selection(kind: str, tokens: int, length: int, k: int) -> None:
    case = prefill(tokens, length, 64, "cuda", "random" if kind == "random" else "causal")
    if kind == "few":
        case["ends"][7:] = case["starts"][7:] + 5
    elif kind == "ties":
        case["key_scales"] = (case["key_scales"] > 1).float()
    elif kind == "together":
        case["key_scales"][length // 3 :][:4096] *= 50
    elif kind == "hidden":  # what is sampled is not like the rest
        case["key_scales"][select._spread.__wrapped__(length, select._sample(length), torch.device("cuda"))] *= 100
    elif kind == "zero":
        case["key_scales"].zero_()
    got = select.index_select(**case, k=k)
    scores = logits.index_logits(**case)
    wanted = best(scores, k)
    ordered = got.sort(1).values
    assert (ordered.diff(dim=1)[ordered[:, 1:] >= 0] > 0).all(), "a position twice"
    wrong = (ordered != wanted).any(1)
    # scoring in full may round otherwise: then the sets may differ where scores do by no more than that
    for row in wrong.nonzero()[:, 0].tolist():
        there = [scores[row][x[row][x[row] >= 0].long()].sort().values for x in (ordered, wanted)]
        torch.testing.assert_close(there[0], there[1], rtol=1e-5, atol=1e-5)


@on_hopper
def test_captured_graph_follows_the_ranges() -> None:
    case = prefill(1024, 18000, 64, "cuda")
    select.index_select(**case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = select.index_select(**case)
    other = prefill(1024, 18000, 64, "cuda", "random")
    for name in ("starts", "ends"):
        case[name].copy_(other[name])
    graph.replay()
    torch.testing.assert_close(got.sort(1).values, best(logits.index_logits(**case), 2048))
