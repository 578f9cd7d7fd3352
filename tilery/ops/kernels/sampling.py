"""From logits to tokens: penalties, greedy argmax, and an exact draw under temperature, top-k, top-p and min-p.

    w_i   = exp((x_i - max x) / T)                      the weight of token i
    order = x descending, of equal logits the lowest id first
    kept  = {w >= min_p}, of these the first k in order, of these every token before which less than p of the kept
            mass lies (at least the first token)
    token = argmax over kept of w_i / E_i,   E_i = -log(1 - u_i),  u_i = uniform(seed, position, i)

The last line is the exponential race: the maximum falls on i with probability w_i / sum of w, and it is the argmax of
x_i / T plus Gumbel noise. As u depends on seed, position and token alone, a row's token does not depend on its batch.

No vocabulary is sorted. What is kept is a prefix of the order, so the winner of any prefix is found by going down:

    draw the winner among all;  count the tokens and the mass before it;  if it is kept it is the answer
    else draw again among the tokens before it: everything from it on is not kept either

Each round keeps a random share of the mass, and the first is right with the probability of the kept mass, so one or two
rounds are the rule. top-k finds its k-th logit first, by counting, which also gives the mass that top-p is of.

`sample` reads the row from memory for each step of this, one program per row, any length. On GPUs `sampling_pieces`
does the same in registers, in two launches.

Legend: R rows, V vocabulary, N penalties, C pieces of a row, S stripes of a piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor as TorchTensor

from tilery import tile
from tilery.ops.kernels._common import Index, randn
from tilery.ops.kernels.moe import ordered
from tilery.ops.kernels.topk import NEVER, thirds, threshold
from tilery.tile import Dim, InOut, Static, Tensor, TensorRef, Tile, b1, f32, i32, i64, lib
from tilery.tile.schedule import Schedule
from tilery.tile.tolerance import EXACT, Tolerance

R, V, N, C = Dim("R"), Dim("V", min=1), Dim("N"), Dim("C", min=1)

GREEDY = 1e-5
"""Temperatures below this mean argmax, as in the engine."""
FAILED = -1
"""The token of a row whose logits hold NaN or +inf, or nothing but -inf."""
ROUNDS = 48
"""Draws of one row: about ln(mass of all / mass kept) + 1 are needed, at most 13 on average for 129280 equal logits."""
STRIPES, LANES = 8, 1024
"""A piece: 8 stripes of 1024 logits are 32 for each of 256 threads."""
LAST = 2**31 - 1
INF = float("inf")

LOGPROB = Tolerance(2e-5, 1e-5)


# ---- penalties -----------------------------------------------------------------------------------------------------


def _penalties_reference(
    logits: TorchTensor, rows: TorchTensor, tokens: TorchTensor, counts: TorchTensor, repetition: TorchTensor,
    frequency: TorchTensor, presence: TorchTensor,
) -> None:  # fmt: skip
    used = rows >= 0
    at = (rows[used].long(), tokens[used].long())
    count, x = counts[used].float(), logits[at]
    x = torch.where(x > 0, x / repetition[at[0]], x * repetition[at[0]])
    logits[at] = x - (frequency[at[0]] * count + presence[at[0]] * (count > 0))


@tile.kernel(reference=_penalties_reference, tolerance=Tolerance(1e-6, 1e-6))
def apply_penalties(
    logits: InOut[R, V, f32], rows: Tensor[N, i32], tokens: Tensor[N, Index], counts: Tensor[N, i32],
    repetition: Tensor[R, f32], frequency: Tensor[R, f32], presence: Tensor[R, f32],
):  # fmt: skip
    """Penalises seen tokens in place: logits [R, V]; entry n says that row rows[n] has seen tokens[n], counts[n] times
    in its output (0: in the prompt alone). Pairs (row, token) are distinct; entries with row -1 are skipped.

        x = x / repetition if x > 0 else x * repetition;   x -= frequency * count + presence * (count > 0)

    repetition, frequency, presence [R]; 1, 0, 0 change nothing. Source: the OpenAI API reference; CTRL (Keskar 2019).
    """
    for n in tile.parallel(tile.blocks(N, "entry")):
        row, token, count = rows[n], tokens[n].to(i32), counts[n].to(f32)
        used = row >= 0
        x = logits.load((row, token), where=used)
        rate = repetition.load(row, where=used, other=1.0)
        less = frequency.load(row, where=used) * count + tile.where(count > 0, presence.load(row, where=used), 0.0)
        logits.store((row, token), tile.where(x > 0, x / rate, x * rate) - less, where=used)


def penalties(rand: torch.Generator, rows: int, vocab: int, entries: int, device: str = "cpu") -> dict[str, Any]:
    pairs = torch.randperm(rows * vocab, generator=rand, device=rand.device)[:entries].to(device)
    return {
        "logits": randn(rand, rows, vocab, device=device), "rows": (pairs // vocab).int(),
        "tokens": (pairs % vocab).int(), "counts": (pairs % 4).int(),
        "repetition": randn(rand, rows, device=device).abs() + 0.5,
        "frequency": randn(rand, rows, device=device), "presence": randn(rand, rows, device=device),
    }  # fmt: skip


@apply_penalties.case
def some_seen(rand: torch.Generator) -> dict[str, Any]:
    arguments = penalties(rand, 3, 50, 37)
    arguments["rows"][5:9] = -1
    arguments["logits"][1, ::2] = -INF
    return arguments


@apply_penalties.case
def one_row_long_ids(rand: torch.Generator) -> dict[str, Any]:
    arguments = penalties(rand, 1, 7, 7)
    return {**arguments, "tokens": arguments["tokens"].long()}


@apply_penalties.case
def nothing_seen(rand: torch.Generator) -> dict[str, Any]:
    return penalties(rand, 2, 5, 0)


@apply_penalties.bench
def seen_500_each(rand: torch.Generator, device: str) -> dict[str, Any]:
    return penalties(rand, 64, 129280, 32000, device)


# ---- greedy --------------------------------------------------------------------------------------------------------


def stripe_ids(piece: Tile, pieces: Any, stripes: int, lanes: int) -> Tile:
    """Token ids [S, lanes] of a piece: stripe s is the (s * pieces + piece)-th run of the row, so that the frequent
    tokens, which have low ids, spread over all pieces."""
    return (tile.arange(stripes)[:, None] * pieces + piece) * lanes + tile.arange(lanes)[None, :]


def eight_warps(env: Mapping[str, int], target: str) -> Schedule | None:
    return Schedule(warps=8) if target == "triton" else None


def striped(vocab: int, stripes: int, lanes: int) -> TorchTensor:
    """Token ids [C, S * lanes] of the pieces."""
    pieces = -(-vocab // (stripes * lanes))
    return torch.arange(pieces * stripes * lanes).view(stripes, pieces, lanes).transpose(0, 1).flatten(1)


def pick(logits: TorchTensor, ids: TorchTensor) -> TorchTensor:
    """[R, C, S * lanes] logits, -inf beyond the vocabulary."""
    vocab = logits.shape[1]
    x = logits[:, ids.clamp(max=vocab - 1).to(logits.device)]
    return torch.where((ids < vocab).to(logits.device), x, -INF)


def _argmax_pieces_reference(logits: TorchTensor, stripes: int, lanes: int) -> tuple[TorchTensor, ...]:
    ids = striped(logits.shape[1], stripes, lanes).to(logits.device)
    x = pick(logits, ids)
    best = torch.where(x.isnan(), INF, x).amax(2)
    first = torch.where(x.isnan() | (x == best[..., None]), ids, LAST).amin(2)
    return best, first.int()


@tile.kernel(reference=_argmax_pieces_reference, tolerance=EXACT, schedule=eight_warps)
def argmax_pieces(logits: Tensor[R, V, f32], stripes: Static[int] = STRIPES, lanes: Static[int] = LANES):
    """(maximum [R, C] f32, the lowest id that has it [R, C] i32) of each of C = ceil(V / (stripes * lanes)) pieces of a
    row; NaN counts as +inf."""
    pieces = tile.cdiv(V, stripes * lanes)
    best, first = tile.empty([R, pieces], f32), tile.empty([R, pieces], i32)
    for r, c in tile.parallel(R, pieces):
        ids = stripe_ids(c, pieces, stripes, lanes)
        x = logits.load((r, ids), where=ids < V, other=-INF)
        x = tile.where(x == x, x, INF)
        top = tile.max(tile.max(x, axis=0))
        best[r, c] = top
        first[r, c] = tile.min(tile.min(tile.where((x == top) & (ids < V), ids, LAST), axis=0))
    return best, first


def _argmax_join_reference(best: TorchTensor, first: TorchTensor) -> TorchTensor:
    top = best.amax(1, keepdim=True)
    ids = torch.where(best == top, first, LAST).amin(1)
    return torch.where(top[:, 0].isfinite(), ids, FAILED).long()


@tile.kernel(reference=_argmax_join_reference, tolerance=EXACT)
def argmax_join(best: Tensor[R, C, f32], first: Tensor[R, C, i32]):
    """The lowest id of each row's maximum [R] i64 from those of its pieces [R, C]; -1 where that is not finite."""
    out = tile.empty([R], i64)
    for r in tile.parallel(tile.blocks(R, "row")):
        top = tile.max(best[r, :], axis=1)
        ids = tile.min(tile.where(best[r, :] == top[:, None], first[r, :], LAST), axis=1)
        out[r] = tile.where(tile.abs(top) < INF, ids, FAILED).to(i64)
    return out


@tile.graph
def argmax(logits: Tensor[R, V, f32], stripes: Static[int] = STRIPES, lanes: Static[int] = LANES):
    """Greedy tokens: [R, V] -> [R] i64, the lowest id on ties; -1 for a row that holds NaN or +inf, or only -inf."""
    best, first = argmax_pieces(logits, stripes, lanes)
    return argmax_join(best, first)


@argmax_pieces.case
def ragged_pieces(rand: torch.Generator) -> dict[str, Any]:
    return {"logits": (randn(rand, 3, 75) * 2).round(), "stripes": 2, "lanes": 16}


@argmax_pieces.case
def not_numbers(rand: torch.Generator) -> dict[str, Any]:
    x = randn(rand, 4, 9)
    x[0, 3], x[1, 4], x[2] = float("nan"), INF, -INF
    return {"logits": x, "stripes": 4, "lanes": 8}


@argmax_join.case
def joined(rand: torch.Generator) -> dict[str, Any]:
    best = (randn(rand, 5, 3) * 2).round()
    best[1, 2], best[2] = INF, -INF
    return {"best": best, "first": torch.randperm(15, generator=rand).view(5, 3).int()}


@argmax_pieces.bench
def greedy_64(rand: torch.Generator, device: str) -> dict[str, Any]:
    return {"logits": randn(rand, 64, 129280, device=device), "stripes": STRIPES, "lanes": LANES}


# ---- a row's parameters, on tiles ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The parameters of one row as scalars. `scale` is 1 / T (1 for greedy rows); `words`: what keys the noise."""

    greedy: Tile
    scale: Tile
    has_k: Tile
    k: Tile
    has_p: Tile
    p: Tile
    has_min: Tile
    min_p: Tile
    words: tuple[Tile, ...]

    @property
    def cut(self) -> Tile:
        """Whether anything may be cut off."""
        return self.has_k | self.has_p | self.has_min


def read_row(
    r: Tile, vocab: Any, temperature: TensorRef, top_k: TensorRef, top_p: TensorRef, min_p: TensorRef,
    seed: TensorRef, position: TensorRef,
) -> Row:  # fmt: skip
    t, k, p, low = temperature[r], top_k[r], top_p[r], min_p[r]
    greedy = t < GREEDY
    word = seed[r].to(i64)
    words = (word.to(i32), (word >> 32).to(i32), position[r].to(i32))
    scale = 1.0 / tile.where(greedy, 1.0, t)
    return Row(greedy, scale, (k > 0) & (k < vocab), k, p < 1.0, p, low > 0.0, low, words)


def weigh(row: Row, x: Tile, top: Tile) -> Tile:
    return tile.exp((x - top) * row.scale)


def clock(row: Row, ids: Tile) -> Tile:
    """Exponential variables E, > 0. Small ones decide, so 1 - u is never formed where u is small."""
    bits = (lib.random_bits(*row.words, ids) >> 1) & LAST
    u = tile.minimum((bits.to(f32) + 0.5) * 2.0**-31, 1.0 - 2.0**-24)
    small = u * (1.0 + u * (0.5 + u * (1.0 / 3.0 + u * 0.25)))
    return tile.where(u < 0.0625, small, -tile.log(1.0 - u))


def ahead(x: Tile, ids: Tile, x0: Tile, id0: Tile) -> Tile:
    """Which tokens come before (x0, id0) in the order."""
    return (x > x0) | ((x == x0) & (ids < id0))


def is_kept(row: Row, count: Tile, mass: Tile, kept: Tile) -> Tile:
    """Whether the token with `count` tokens of `mass` before it is among the first k and in the first p of `kept`."""
    in_k = ~row.has_k | (count < row.k)
    return (count == 0) | (in_k & (~row.has_p | (mass < row.p * kept)))


def log_probability(row: Row, x: Tile, top: Tile, total: Tile) -> Tile:
    return (x - top) * row.scale - tile.log(total)


# ---- from memory ---------------------------------------------------------------------------------------------------


@tile.function
def race(logits: TensorRef, r: Tile, row: Row, top: Tile, least: Tile, x0: Tile, id0: Tile) -> tuple[Tile, Tile]:
    """(id, logit) of the winner among the tokens before (x0, id0) with x >= least and w >= min_p."""
    best, who, x_who = tile.full([], -1.0, f32), tile.full([], FAILED, i32), tile.full([], 0.0, f32)
    for at in tile.range(tile.blocks(logits.shape[1], "race")):
        x = logits[r, at]
        w = weigh(row, x, top)
        runs = ahead(x, at.index, x0, id0) & (x >= least) & (w >= row.min_p)
        if tile.any(runs):
            score = tile.where(runs, w / clock(row, at.index), -1.0)
            first = tile.max(score)
            if first > best:
                best = first
                who = tile.min(tile.where(score == first, at.index, LAST))
                x_who = tile.max(tile.where(at.index == who, x, -INF))
    return who, x_who


@tile.function
def before(logits: TensorRef, r: Tile, row: Row, top: Tile, x0: Tile, id0: Tile) -> tuple[Tile, Tile]:
    """(how many tokens, how much mass) before (x0, id0)."""
    count, mass = tile.full([], 0, i32), tile.full([], 0.0, f32)
    for at in tile.range(tile.blocks(logits.shape[1], "before")):
        x = logits[r, at]
        first = ahead(x, at.index, x0, id0)
        count = count + tile.sum(first)
        mass = mass + tile.sum(tile.where(first, weigh(row, x, top), 0.0))
    return count, mass


@tile.function
def kept_mass(logits: TensorRef, r: Tile, row: Row, top: Tile, least: Tile, quota: Tile) -> Tile:
    """The mass above `least` and of `quota` tokens equal to it, as far as w >= min_p."""
    mass = tile.full([], 0.0, f32)
    for at in tile.range(tile.blocks(logits.shape[1], "kept")):
        x = logits[r, at]
        w = weigh(row, x, top)
        mass = mass + tile.sum(tile.where((x > least) & (w >= row.min_p), w, 0.0))
    edge = weigh(row, least, top)
    return mass + tile.where(edge >= row.min_p, edge * quota.to(f32), 0.0)


@tile.function
def kth_by_counting(logits: TensorRef, r: Tile, k: Tile, top: Tile) -> tuple[Tile, Tile]:
    """(key of the k-th largest logit, how many equal to it are among the first k): two bounds a pass. On a GPU far
    faster than counting digits, as `threshold` does. With fewer than k logits above -inf: the key of -inf."""
    low, high, above = tile.full([], NEVER, i32), ordered(top) + 1, tile.full([], 0, i32)
    for _ in tile.range(8):
        if low + 1 < high:
            for _ in tile.range(5):
                if low + 1 < high:
                    first, second = thirds(low, high)
                    n_first, n_second = tile.full([], 0, i32), tile.full([], 0, i32)
                    for at in tile.range(tile.blocks(logits.shape[1], "count")):
                        key = ordered(logits[r, at])
                        n_first = n_first + tile.sum(key >= first)
                        n_second = n_second + tile.sum(key >= second)
                    up_first, up_second = n_first >= k, (n_second >= k) & (second < high)
                    above = tile.where(
                        up_second, above, tile.where(~up_first, n_first, tile.where(second < high, n_second, above))
                    )
                    high = tile.where(up_second, high, tile.where(up_first, tile.minimum(second, high), first))
                    low = tile.where(up_second, second, tile.where(up_first, first, low))
    return low, k - above


@tile.function
def settle(
    logits: TensorRef, r: Tile, row: Row, top: Tile, total: Tile, who: Tile, x: Tile, draw: Tile, counting: bool
) -> Tile:
    """The token of row r, going down from the winner of all (who, x), or from above all (LAST, -inf) if that is still
    to `draw`."""
    least, quota, kept = tile.full([], -INF, f32), tile.full([], 0, i32), total
    if row.has_k:
        if counting:
            key, quota = kth_by_counting(logits, r, row.k, top)
        else:
            key, quota, _ = threshold(logits, r, logits.shape[1], row.k)
        least = (key ^ ((key >> 31) & LAST)).bitcast(f32)
    if row.has_p & (row.has_k | row.has_min):
        kept = kept_mass(logits, r, row, top, least, quota)
    sure = tile.full([], False, b1)
    for _ in tile.range(ROUNDS):
        if ~sure:
            if draw:
                who, x = race(logits, r, row, top, least, x, who)
                sure = ~row.has_p & (x > least)
            if ~sure:
                count, mass = before(logits, r, row, top, x, who)
                sure = is_kept(row, count, mass, kept) & (weigh(row, x, top) >= row.min_p)
                draw = ~sure
    return who


def uniform_reference(seed: int, position: int, ids: TorchTensor) -> TorchTensor:
    """The kernels' uniform numbers in f64, by the same integers."""
    word_mask = 0xFFFFFFFF

    def mix(x: Any) -> Any:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & word_mask
        x = ((x ^ (x >> 15)) * 0x846CA68B) & word_mask
        return x ^ (x >> 16)

    word = mix((seed & word_mask) ^ 0x9E3779B9)
    for counter in ((seed >> 32) & word_mask, position & word_mask):
        word = mix(((word * 0x2545F491) & word_mask) ^ counter)
    bits = mix(((word * 0x2545F491) & word_mask) ^ ids) >> 1
    return ((bits.double() + 0.5) * 2.0**-31).clamp(max=1 - 2.0**-24)


def sample_reference(
    logits: TorchTensor, temperature: TorchTensor, top_k: TorchTensor, top_p: TorchTensor, min_p: TorchTensor,
    seed: TorchTensor, position: TorchTensor,
) -> tuple[TorchTensor, TorchTensor]:  # fmt: skip
    tokens, logprobs = [], []
    for r, x in enumerate(logits):
        t, k, p, low = temperature[r].item(), int(top_k[r]), top_p[r].item(), min_p[r].item()
        y = x.double() / (t if t >= GREEDY else 1.0)
        total = torch.logsumexp(y, 0)
        if not total.isfinite():
            tokens.append(FAILED)
            logprobs.append(0.0)
            continue
        order = torch.sort(x, descending=True, stable=True).indices
        w = (y - y.max()).exp()[order]
        kept = w >= low
        if 0 < k < len(x):
            kept &= torch.arange(len(x), device=x.device) < k
        mass = w * kept
        if p < 1.0:
            kept &= mass.cumsum(0) - mass < p * mass.sum()
        kept[0] = True
        race = w / -torch.log1p(-uniform_reference(int(seed[r]), int(position[r]), order))
        best = 0 if t < GREEDY else int(torch.where(kept, race, -1.0).argmax())
        tokens.append(int(order[best]))
        logprobs.append(float(y[order[best]] - total))
    return torch.tensor(tokens, device=logits.device), torch.tensor(logprobs, device=logits.device)


@tile.kernel(reference=sample_reference, tolerance=(EXACT, LOGPROB))
def sample(
    logits: Tensor[R, V, f32], temperature: Tensor[R, f32], top_k: Tensor[R, i32], top_p: Tensor[R, f32],
    min_p: Tensor[R, f32], seed: Tensor[R, Index], position: Tensor[R, Index],
):  # fmt: skip
    """One token per row: logits [R, V] and parameters [R] -> (token [R] i64, its log-probability [R] f32).

    temperature below 1e-5: argmax, lowest id on ties; top_k 0, top_p 1, min_p 0 switch a cut off. The rule, its ties
    and the noise stand at the head of this file; the order of cuts is min-p, top-k, top-p. The log-probability is that
    of the distribution before any cut, at the temperature (at 1 for greedy rows). Token -1 and log-probability 0 stand
    for a row that holds NaN or +inf, or only -inf. Source: vLLM's sampler (order); Holtzman 2019 (top-p); Gumbel 1954.
    """
    tokens, logprobs = tile.empty([R], i64), tile.empty([R], f32)
    for r in tile.parallel(R):
        row = read_row(r, V, temperature, top_k, top_p, min_p, seed, position)
        top, who = tile.full([], -INF, f32), tile.full([], FAILED, i32)
        for at in tile.range(tile.blocks(V, "top")):
            x = logits[r, at]
            highest = tile.max(x)
            if highest > top:
                top = highest
                who = tile.min(tile.where(x == highest, at.index, LAST))
        total = tile.full([], 0.0, f32)
        for at in tile.range(tile.blocks(V, "mass")):
            total = total + tile.sum(weigh(row, logits[r, at], top))
        logprob = tile.full([], 0.0, f32)
        if (total > 0.0) & (total < INF):
            if ~row.greedy:
                start, above = tile.full([], LAST, i32), tile.full([], -INF, f32)
                who = settle(logits, r, row, top, total, start, above, tile.full([], True, b1), counting=False)
            logprob = log_probability(row, logits[r, tile.maximum(who, 0)], top, total)
        else:
            who = tile.full([], FAILED, i32)
        tokens[r] = who.to(i64)
        logprobs[r] = logprob
    return tokens, logprobs


def parameters(
    rand: torch.Generator, kinds: list[tuple[float, int, float, float]], device: str = "cpu"
) -> dict[str, Any]:
    """One row per (temperature, top_k, top_p, min_p)."""
    rows = len(kinds)
    t, k, p, low = zip(*kinds)
    return {
        "temperature": torch.tensor(t, device=device), "top_k": torch.tensor(k, dtype=torch.int32, device=device),
        "top_p": torch.tensor(p, device=device), "min_p": torch.tensor(low, device=device),
        "seed": torch.randint(-(2**62), 2**62, (rows,), generator=rand, device=rand.device).to(device),
        "position": torch.arange(5, 5 + rows, device=device),
    }  # fmt: skip


EVERY_KIND = [
    (1.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0), (0.7, 5, 1.0, 0.0), (1.3, 0, 0.6, 0.0), (1.0, 0, 1.0, 0.2),
    (2.0, 12, 0.5, 0.05), (1.0, 1, 0.9, 0.0), (1.0, 0, 0.0, 0.0), (0.9, 30, 0.8, 0.0), (1.0, 0, 0.9, 0.01),
]  # fmt: skip


@sample.case
def every_kind(rand: torch.Generator) -> dict[str, Any]:
    return {"logits": randn(rand, len(EVERY_KIND), 41) * 2, **parameters(rand, EVERY_KIND)}


@sample.case
def with_ties(rand: torch.Generator) -> dict[str, Any]:
    logits = (randn(rand, len(EVERY_KIND), 35) * 2).round()
    return {"logits": logits, **parameters(rand, EVERY_KIND)}


@sample.case
def all_equal(rand: torch.Generator) -> dict[str, Any]:
    return {"logits": torch.zeros(4, 40), **parameters(rand, [(1.0, 9, 1.0, 0.0), (1.0, 0, 0.3, 0.0), *EVERY_KIND[:2]])}


@sample.case
def masked(rand: torch.Generator) -> dict[str, Any]:
    logits = randn(rand, 5, 50)
    logits[:, ::3], logits[:, 20:], logits[0], logits[1, 4] = -INF, -INF, -INF, float("nan")
    logits[2, 7] = INF
    return {"logits": logits, **parameters(rand, [*EVERY_KIND[:3], (1.0, 30, 1.0, 0.0), (1.0, 30, 0.5, 0.0)])}


@sample.case
def one_token(rand: torch.Generator) -> dict[str, Any]:
    return {"logits": randn(rand, 1, 1), **parameters(rand, [(0.5, 3, 0.5, 0.5)])}


MIXED = [(0.8, 50, 0.9, 0.02), (0.6, 0, 0.95, 0.0), (1.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0)]
"""Typical requests: the rows of the benchmark take turns."""


@sample.bench
def rows_64(rand: torch.Generator, device: str) -> dict[str, Any]:
    return {"logits": randn(rand, 64, 129280, device=device) * 3, **parameters(rand, MIXED * 16, device)}
