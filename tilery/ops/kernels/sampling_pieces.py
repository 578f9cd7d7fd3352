"""`sample` on GPUs: two launches, everything in registers, the logits read from memory about once.

1. `sample_pieces`: a row is cut into pieces of interleaved stripes, a program each. A piece gives its maximum and mass,
   and either its winner (greedy, or nothing is cut off) or its candidates: all logits from the smallest maximum of 32
   groups on, about 130 of 8192. All logits above the greatest of these bounds are then known, about 1000 of 129280.
2. `sample_choose`: one program per row chooses among the lists. Where they cannot hold all that is kept (a flat
   distribution, k beyond the lists, more ties than room) it goes through memory as `sample` does.

Measured 2026-11-22 on an H100 (80 GB, HBM3), 64 rows of 129280 normal logits (sigma 3) not in the caches, both launches
in a CUDA graph, in microseconds (`sample_pieces` alone in brackets); reading the logits takes 17, as `argmax` shows:

    temperature 0.8, top_k 50, top_p 0.9, min_p 0.02     39 (29)
    temperature 0.6, top_p 0.95                          41 (34)
    temperature 1, min_p 0.05                            38 (32)
    temperature 1                                        35 (33)
    greedy                                               22 (19)
    the rows of `sampling.MIXED` by turns                40 (29)
    sigma 1, top_p 0.9: through memory                  202 (50)
    top_k 1000, top_p 0.9: through memory               687 (29)
    torch.topk 50, softmax, cumsum and argmax           208

Legend: R rows, V vocabulary, C pieces of a row, K candidates of a piece, S stripes of a piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor as TorchTensor

from tilery import tile
from tilery.ops.kernels._common import Index
from tilery.ops.kernels.moe import ordered
from tilery.ops.kernels.sampling import (
    FAILED,
    GREEDY,
    INF,
    LAST,
    LOGPROB,
    ROUNDS,
    C,
    R,
    Row,
    V,
    ahead,
    clock,
    eight_warps,
    every_kind,
    log_probability,
    masked,
    pick,
    read_row,
    rows_64,
    sample,
    sample_reference,
    settle,
    stripe_ids,
    striped,
    uniform_reference,
    weigh,
    with_ties,
)  # fmt: skip
from tilery.ops.kernels.topk import NEVER, thirds
from tilery.tile import Dim, Static, Tensor, TensorRef, Tile, b1, f32, i32, i64
from tilery.tile.schedule import Schedule
from tilery.tile.tolerance import EXACT, Tolerance

K = Dim("K", min=2)

RUNS, LANES, ROOM = 8, 1024, 256
"""A piece: 8 runs of 1024 logits, 32 for each of 256 threads."""
GROUPS = 32
"""The smallest of 32 groups' maxima bounds the 32nd logit of a piece from below; about 130 logits are above it."""
PARTS = 4
"""Four neighbouring lanes belong to a thread. Candidates are stored one a thread: no other layout is needed then."""
MOST_PIECES = 16
LEAST = -3.4028234663852886e38


def _pieces_reference(
    logits: TorchTensor, temperature: TorchTensor, top_k: TorchTensor, top_p: TorchTensor, min_p: TorchTensor,
    seed: TorchTensor, position: TorchTensor, runs: int, lanes: int, room: int,
) -> tuple[TorchTensor, ...]:  # fmt: skip
    ids = striped(logits.shape[1], runs, lanes).to(logits.device)
    every = pick(logits, ids)
    rows, pieces = every.shape[:2]
    stats = torch.zeros(rows, 4, pieces)
    found = torch.zeros(rows, 2, pieces, dtype=torch.int32)
    values = torch.full((rows, pieces, room), -INF)
    names = torch.full((rows, pieces, room), FAILED, dtype=torch.int32)
    for r in range(rows):
        t, k, p, low = temperature[r].item(), int(top_k[r]), top_p[r].item(), min_p[r].item()
        has_k = 0 < k < logits.shape[1]
        for c in range(pieces):
            x, top = every[r, c], every[r, c].max()
            w = ((x.double() - (top if top > -INF else 0.0)) / (t if t >= GREEDY else 1.0)).exp()
            bound, who, cost, count = -INF, FAILED, INF, 0
            draws = not (has_k or p < 1.0 or low > 0.0)
            if t < GREEDY:
                who = int(ids[c][x == top].min()) if top > -INF else LAST
            elif not draws:
                bound = _bound_reference(x, lanes, room)
                turn = torch.arange(runs * lanes, device=x.device).view(runs, lanes // PARTS, PARTS)
                turn = turn.transpose(0, 1).flatten()
                turn = turn[((x >= bound) & (x > -INF))[turn]]
                count = len(turn)
                fit = min(count, room)
                values[r, c, :fit], names[r, c, :fit] = x[turn[:fit]], ids[c][turn[:fit]].int()
                listed, edge = w[x >= bound].sum(), ((bound - top) / t).exp()
                draws = not (has_k or (edge < low if low > 0 else listed >= p * w.sum()))
            if t >= GREEDY and draws:
                costs = -torch.log1p(-uniform_reference(int(seed[r]), int(position[r]), ids[c])) / w
                cost = costs.min().item()
                who = int(ids[c][costs == cost].min()) if cost < INF else LAST
            stats[r, :, c] = torch.tensor([top, w.sum(), cost, bound])
            found[r, :, c] = torch.tensor([who, count])
    return stats, found, values, names


def _bound_reference(x: TorchTensor, lanes: int, room: int) -> float:
    """The bound of a piece's candidates."""

    def key(x: TorchTensor) -> TorchTensor:
        bits = torch.where(x == 0, 0.0, x).view(torch.int32)
        return (bits ^ ((bits >> 31) & LAST)).long()

    groups = min(GROUPS, lanes // 2)
    bound = x.view(-1, groups, lanes // groups).amax((0, 2)).min()
    keys, low, high = key(x), max(int(key(bound)), NEVER + 1), int(key(x.max())) + 1
    if int((keys >= low).sum()) <= room:
        return bound.item()
    while int((keys >= low).sum()) > room // 2 and low + 1 < high:
        third = max(((high >> 1) - (low >> 1)) // 3 * 2, 1)
        for at in (low + third, low + 2 * third):
            if at < high and int((keys >= at).sum()) >= room // 4:
                low = at
            else:
                high = min(high, at)
                break
    return torch.tensor(low ^ ((low >> 31) & LAST), dtype=torch.int32).view(torch.float32).item()


def unordered(key: Tile) -> Tile:
    """The f32 that `ordered` gives this key for."""
    return (key ^ ((key >> 31) & LAST)).bitcast(f32)


@tile.function
def shrink(x: Tile, low: Tile, high: Tile, at_low: Tile, wanted: Tile, enough: Tile) -> tuple[Tile, Tile]:
    """(low, |{x >= low}|): raised from at_low = |{x >= low}| >= wanted, no x >= high, until at most `enough` are left
    or those from `low` on below the next bound are equal. low, high are keys (`ordered`), so that equal steps are
    equally many floats. Two nested loops, as most rounds are not needed."""
    for _ in tile.range(8):
        if (at_low > enough) & (low + 1 < high):
            for _ in tile.range(4):
                first, second = thirds(low, high)
                if (at_low > enough) & (first < high):
                    at_first, at_second = unordered(first), unordered(second)
                    packed = tile.sum((x >= at_first).to(i32) + ((x >= at_second).to(i32) << 16))
                    n_first, n_second = packed & 0xFFFF, (packed >> 16) & 0xFFFF
                    up_first, up_second = n_first >= wanted, (n_second >= wanted) & (second < high)
                    high = tile.where(up_second, high, tile.where(up_first, tile.minimum(second, high), first))
                    low = tile.where(up_second, second, tile.where(up_first, first, low))
                    at_low = tile.where(up_second, n_second, tile.where(up_first, n_first, at_low))
    return low, at_low


@tile.function
def quickest(
    logits: TensorRef, r: Tile, row: Row, c: Tile, pieces: Any, runs: int, lanes: int, base: Tile, noisy: bool
) -> Any:
    """(E / w, id) of the winner of a piece's race; not `noisy`: of the largest logit. Reads the piece again, as a loop
    needs fewer registers."""
    best, first = tile.full([lanes], INF, f32), tile.full([lanes], LAST, i32)
    for run in tile.range(runs):
        start = (run * pieces + c) * lanes
        at = tile.arange(lanes, start)
        x = logits.load((r, tile.span(start, lanes)), other=-INF)
        cost = clock(row, at) * tile.exp((base - x) * row.scale) if noisy else base - x
        first = tile.where(cost < best, at, first)
        best = tile.minimum(cost, best)
    cost = tile.min(best)
    return cost, tile.min(tile.where(best == cost, first, LAST))


@tile.kernel(reference=_pieces_reference, tolerance=(Tolerance(1e-5, 1e-5), EXACT, EXACT, EXACT), schedule=eight_warps)
def sample_pieces(
    logits: Tensor[R, V, f32], temperature: Tensor[R, f32], top_k: Tensor[R, i32], top_p: Tensor[R, f32],
    min_p: Tensor[R, f32], seed: Tensor[R, Index], position: Tensor[R, Index], runs: Static[int] = RUNS,
    lanes: Static[int] = LANES, room: Static[int] = ROOM,
):  # fmt: skip
    """What each of C = ceil(V / (runs * lanes)) pieces of a row knows; runs a multiple of 4, lanes a power of two.

    stats [R, 4, C] f32: maximum, mass relative to it, E / w of its winner, bound; found [R, 2, C] i32: winner or -1,
    number of candidates; values [R, C, room] f32 and ids [R, C, room] i32: the candidates, all logits >= bound; -inf
    and -1 fill. Greedy rows: the winner is the lowest id of the maximum. Rows that nothing is cut off from: the winner
    of the race. (2^31 - 1 if there is only -inf.) Others: the bound is the smallest maximum of 32 groups, raised where
    more than `room` logits are above it, and there is a winner too where the candidates do not seem to suffice. A
    number above `room` says that the list is not full.
    """
    pieces, groups = tile.cdiv(V, runs * lanes), min(GROUPS, lanes // 2)
    stats, found = tile.empty([R, 4, pieces], f32), tile.empty([R, 2, pieces], i32)
    values, ids = tile.empty([R, pieces, room], f32), tile.empty([R, pieces, room], i32)
    for r, c in tile.parallel(R, pieces):
        row = read_row(r, V, temperature, top_k, top_p, min_p, seed, position)
        token = stripe_ids(c, pieces, runs, lanes)
        x = logits.load((r, token), where=token < V, other=-INF)
        most = tile.max(x, axis=0)
        top = tile.max(most)
        base = tile.where(top == -INF, 0.0, top)
        mass = tile.sum(tile.sum(weigh(row, x, base), axis=0))
        bound, cost = tile.full([], -INF, f32), tile.full([], INF, f32)
        who, count = tile.full([], FAILED, i32), tile.full([], 0, i32)
        draws = ~row.cut & ~row.greedy
        if row.greedy:
            _, who = quickest(logits, r, row, c, pieces, runs, lanes, base, noisy=False)
        elif row.cut:
            bound = tile.min(tile.max(most.reshape(groups, lanes // groups), axis=1))
            above = tile.sum(tile.sum(x >= tile.maximum(bound, LEAST), axis=0))
            if above > room:
                low = tile.maximum(ordered(bound), NEVER + 1)
                few, many = tile.full([], room // 4, i32), tile.full([], room // 2, i32)
                low, _ = shrink(x, low, ordered(top) + 1, above, few, many)
                bound = unordered(low)
            least = tile.maximum(bound, LEAST)
            own = tile.sum(tile.sum(x >= least, axis=0).reshape(lanes // PARTS, PARTS), axis=1)
            upto = tile.cumsum(own)
            count = tile.max(upto)
            place = upto - own
            for run in tile.range(runs):
                for part in range(PARTS):
                    at = (run * pieces + c) * lanes + tile.arange(lanes // PARTS) * PARTS + part
                    y = logits.load((r, at), where=at < V, other=-INF)
                    hit = y >= least
                    values.store((r, c, place), y, where=hit & (place < room))
                    ids.store((r, c, place), at, where=hit & (place < room))
                    place = place + hit.to(i32)
            if ~row.has_k:
                listed = tile.sum(tile.sum(tile.where(x >= least, weigh(row, x, base), 0.0), axis=0))
                edge = weigh(row, bound, base)
                draws = ~tile.where(row.has_min, edge < row.min_p, listed >= row.p * mass)
        if draws:
            cost, who = quickest(logits, r, row, c, pieces, runs, lanes, base, noisy=True)
        rest = tile.arange(room) >= count
        values.store((r, c, slice(None)), -INF, where=rest)
        ids.store((r, c, slice(None)), FAILED, where=rest)
        stats[r, 0, c] = top
        stats[r, 1, c] = mass
        stats[r, 2, c] = cost
        stats[r, 3, c] = bound
        found[r, 0, c] = who
        found[r, 1, c] = count
    return stats, found, values, ids


def _small(arguments: dict[str, Any]) -> dict[str, Any]:
    return {**arguments, "runs": 4, "lanes": 8, "room": 8}


@sample_pieces.case
def every_kind_of_piece(rand: torch.Generator) -> dict[str, Any]:
    return _small(every_kind(rand))


@sample_pieces.case
def tied_pieces(rand: torch.Generator) -> dict[str, Any]:
    return _small(with_ties(rand))


@sample_pieces.case
def masked_pieces(rand: torch.Generator) -> dict[str, Any]:
    arguments = masked(rand)
    arguments["logits"][1, 4] = arguments["logits"][2, 7] = 0.0
    return _small(arguments)


@sample_pieces.bench
def pieces_64(rand: torch.Generator, device: str) -> dict[str, Any]:
    return {**rows_64(rand, device), "runs": RUNS, "lanes": LANES, "room": ROOM}


def _choose_reference(
    logits: TorchTensor, temperature: TorchTensor, top_k: TorchTensor, top_p: TorchTensor, min_p: TorchTensor,
    seed: TorchTensor, position: TorchTensor, **lists: TorchTensor,
) -> tuple[TorchTensor, TorchTensor]:  # fmt: skip
    return sample_reference(logits, temperature, top_k, top_p, min_p, seed, position)


@tile.function
def choose(row: Row, x: Tile, ids: Tile, top: Tile, total: Tile, bound: Tile, at_bound: Tile) -> Tile:
    """The token among candidates x [n] (-inf: none), of which the at_bound logits >= bound are all there are in the
    row, and enough."""
    w = weigh(row, x, top)
    low, count = tile.maximum(ordered(bound), NEVER + 1), at_bound
    extra, tied = tile.full([], 0.0, f32), tile.full([], False, b1)
    if row.has_k:
        wanted = tile.minimum(row.k, at_bound)
        low, count = shrink(x, low, ordered(top) + 1, at_bound, wanted, wanted)
        tied = count > wanted
        edge = weigh(row, unordered(low), top)
        extra = tile.where(edge >= row.min_p, edge * (count - wanted).to(f32), 0.0)
    least, kept = unordered(low), total
    among = (x >= least) & (w >= row.min_p)
    if row.has_p & (row.has_k | row.has_min):
        kept = tile.sum(tile.where(among, w, 0.0)) - extra
    score = tile.where(among, w / clock(row, ids), -1.0)
    best = tile.max(score)
    who = tile.min(tile.where(score == best, ids, LAST))
    x_who = tile.max(tile.where(ids == who, x, -INF))
    sure = ~row.has_p & (~tied | (x_who > least))
    for _ in tile.range(ROUNDS // 6):
        if ~sure:
            for _ in tile.range(6):
                if ~sure:
                    first = ahead(x, ids, x_who, who)
                    mass = tile.sum(tile.where(first, w, 0.0))
                    sure = (mass <= 0.0) | ~row.has_p | (mass < row.p * kept)
                    if tied:
                        sure = sure & (tile.sum(first) < row.k)
                    if ~sure:
                        runs = tile.where(first, score, -1.0)
                        best = tile.max(runs)
                        who = tile.min(tile.where(runs == best, ids, LAST))
                        x_who = tile.max(tile.where(ids == who, x, -INF))
                        sure = ~row.has_p & (~tied | (x_who > least))
    return who


def _choose_schedule(env: Mapping[str, int], target: str) -> Schedule | None:
    return (
        Schedule(warps=16, blocks=dict.fromkeys(("race", "before", "kept", "count"), 8192))
        if target == "triton"
        else None
    )


@tile.kernel(reference=_choose_reference, tolerance=(EXACT, LOGPROB), schedule=_choose_schedule)
def sample_choose(
    logits: Tensor[R, V, f32], temperature: Tensor[R, f32], top_k: Tensor[R, i32], top_p: Tensor[R, f32],
    min_p: Tensor[R, f32], seed: Tensor[R, Index], position: Tensor[R, Index], stats: Tensor[R, 4, C, f32],
    found: Tensor[R, 2, C, i32], values: Tensor[R, C, K, f32], ids: Tensor[R, C, K, i32],
):  # fmt: skip
    """`sample` from what `sample_pieces` found: the same results."""
    tokens, logprobs = tile.empty([R], i64), tile.empty([R], f32)
    flat_values, flat_ids = values.view(f32, [R, C * K]), ids.view(i32, [R, C * K])
    for r in tile.parallel(R):
        row = read_row(r, V, temperature, top_k, top_p, min_p, seed, position)
        tops, winner, bounds, counts = stats[r, 0, :], found[r, 0, :], stats[r, 3, :], found[r, 1, :]
        x, names = flat_values[r, :], flat_ids[r, :]
        top = tile.max(tops)
        base = tile.where(top == -INF, 0.0, top)
        total = tile.sum(stats[r, 1, :] * tile.exp((tops - base) * row.scale))
        who, logprob = tile.full([], FAILED, i32), tile.full([], 0.0, f32)
        if (total > 0.0) & (total < INF):
            cost = tile.where(row.greedy, -tops, stats[r, 2, :] * tile.exp((base - tops) * row.scale))
            drawn = tile.min(winner) >= 0
            who = tile.where(drawn, tile.min(tile.where(cost == tile.min(cost), winner, LAST)), FAILED)
            if row.cut & ~row.greedy:
                bound = tile.max(bounds)
                there = x >= tile.maximum(bound, LEAST)
                at_bound = tile.sum(there)
                reach = bound == -INF
                if row.has_k:
                    reach = reach | (at_bound >= row.k)
                elif row.has_min:
                    reach = reach | (weigh(row, bound, top) < row.min_p)
                else:
                    reach = reach | (tile.sum(tile.where(there, weigh(row, x, top), 0.0)) >= row.p * total)
                if reach & (tile.max(counts) <= K):
                    who = choose(row, x, names, top, total, bound, at_bound)
                else:
                    x_who = tile.where(drawn, logits[r, tile.maximum(who, 0)], -INF)
                    who = tile.where(drawn, who, LAST)
                    who = settle(logits, r, row, top, total, who, x_who, ~drawn, counting=True)
            logprob = log_probability(row, logits[r, who], top, total)
        tokens[r] = who.to(i64)
        logprobs[r] = logprob
    return tokens, logprobs


def _listed(arguments: dict[str, Any], runs: int = 4, lanes: int = 8, room: int = 8) -> dict[str, Any]:
    stats, found, values, ids = _pieces_reference(**arguments, runs=runs, lanes=lanes, room=room)
    return {**arguments, "stats": stats, "found": found, "values": values, "ids": ids}


@sample_choose.case
def choose_every_kind(rand: torch.Generator) -> dict[str, Any]:
    return _listed(every_kind(rand))


@sample_choose.case
def choose_with_room(rand: torch.Generator) -> dict[str, Any]:
    return _listed(every_kind(rand), runs=8, room=16)


@sample_choose.case
def choose_ties(rand: torch.Generator) -> dict[str, Any]:
    return _listed(with_ties(rand), runs=8, room=16)


@sample_choose.case
def choose_masked(rand: torch.Generator) -> dict[str, Any]:
    arguments = masked(rand)
    arguments["logits"][1, 4] = arguments["logits"][2, 7] = 0.0
    return _listed(arguments)


@tile.graph
def sample_in_pieces(
    logits: Tensor[R, V, f32], temperature: Tensor[R, f32], top_k: Tensor[R, i32], top_p: Tensor[R, f32],
    min_p: Tensor[R, f32], seed: Tensor[R, Index], position: Tensor[R, Index], runs: Static[int] = RUNS,
    lanes: Static[int] = LANES, room: Static[int] = ROOM,
):  # fmt: skip
    """`sample` in two launches, for up to about 16 pieces of runs * lanes logits."""
    parameters = (logits, temperature, top_k, top_p, min_p, seed, position)
    return sample_choose(*parameters, *sample_pieces(*parameters, runs, lanes, room))


def sample_fast(
    logits: TorchTensor, temperature: TorchTensor, top_k: TorchTensor, top_p: TorchTensor, min_p: TorchTensor,
    seed: TorchTensor, position: TorchTensor,
) -> tuple[TorchTensor, TorchTensor]:  # fmt: skip
    """`sample` in the way for a device and a vocabulary: in pieces on a GPU, from memory on a CPU. As `sample`."""
    parameters = (logits, temperature, top_k, top_p, min_p, seed, position)
    lanes = LANES
    while RUNS * lanes * MOST_PIECES < logits.shape[1]:
        lanes *= 2
    if logits.device.type == "cpu" or lanes > 2 * LANES:
        return sample(*parameters)
    return sample_in_pieces(*parameters, RUNS, lanes, ROOM)
