"""Small kernels that together use the whole language, each with what plain torch says about random arguments.

A case is `function(size, rand) -> (kernel, arguments, expected)`: `size(low, high)` draws a dimension, `rand` is the
generator of values. Expected are the returned tensors, then the InOut tensors after the call.
"""

import math

import torch
import torch.nn.functional as F

from tilery import tile
from tilery.tile import Dim, Float, InOut, Static, Tensor, b1, bf16, f32, i32, i64

T, K, N, M, B = Dim("T"), Dim("K"), Dim("N"), Dim("M"), Dim("B")
P, L, S, C = Dim("P"), Dim("L"), Dim("S"), Dim("C", min=1)

CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def normal(rand, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=rand).to(dtype)


def integers(rand, low, high, *shape, dtype=torch.int32):
    return torch.randint(low, max(high, low + 1), shape, generator=rand).to(dtype)


# --- elementwise, reductions, blocks ----------------------------------------------------------------------------


@tile.kernel
def chain(x: Tensor[N, Float], y: Tensor[N, Float], a: float, n: int):
    out, sign = tile.empty([N], f32), tile.empty([N], i32)
    for i in tile.parallel(tile.blocks(N, "i")):
        v = x[i].to(f32) * a + tile.tanh(y[i].to(f32))
        v = tile.where(v > 0, tile.exp(-abs(v)), v - 1) / 3
        out[i] = v
        sign[i] = tile.where(v >= 0, 1, -1) * n + i.index
    return out, sign


@case
def elementwise_chain(size, rand):
    n = size(0, 70)
    x, y = normal(rand, n), normal(rand, n, dtype=torch.bfloat16)
    v = x * 0.7 + torch.tanh(y.float())
    v = torch.where(v > 0, torch.exp(-v.abs()), v - 1) / 3
    sign = (torch.where(v >= 0, 1, -1) * 5 + torch.arange(n)).int()
    return chain, {"x": x, "y": y, "a": 0.7, "n": 5}, (v, sign)


@tile.kernel
def reduce_rows(x: Tensor[T, C, f32]):
    outs = [tile.empty([T], f32) for _ in range(4)]
    place, positive = tile.empty([T], i32), tile.empty([T, 2], b1)
    for t in tile.parallel(tile.blocks(T, "row")):
        v = x[t, :]
        for out, f in zip(outs, (tile.sum, tile.max, tile.min, tile.mean)):
            out[t] = f(v, axis=1)
        place[t] = tile.argmax(v, axis=-1)
        positive[t, :] = tile.join(tile.any(v > 0, axis=1), tile.all(v > 0, axis=1))
    return *outs, place, positive


@case
def row_reduction(size, rand):
    x = integers(rand, -4, 5, size(0, 40), size(1, 50)).float()
    best = x.amax(1, keepdim=True) == x
    expected = x.sum(1), x.amax(1), x.amin(1), x.mean(1), best.int().argmax(1).int()
    return reduce_rows, {"x": x}, (*expected, torch.stack([(x > 0).any(1), (x > 0).all(1)], 1))


@tile.kernel
def whole(x: Tensor[T, K, f32]):
    y = tile.empty([3], f32)
    for _ in tile.parallel(1):
        v = x[:, :]
        y[0] = tile.sum(v)
        y[1] = tile.max(v)
        y[2] = tile.prod(tile.minimum(tile.abs(v), 1.0))
    return y


@case
def whole_reduction(size, rand):
    x = normal(rand, size(0, 9), size(0, 9))
    top = x.max() if x.numel() else torch.tensor(-math.inf)
    return whole, {"x": x}, (torch.stack([x.sum(), top, x.abs().clamp(max=1).prod()]),)


@tile.kernel
def transpose(x: Tensor[T, K, bf16]):
    y = tile.empty([K, T], bf16)
    for t, k in tile.parallel(tile.blocks(T, "t"), tile.blocks(K, "k")):
        y[k, t] = x[t, k].T
    return y


@case
def two_dimensional_blocks(size, rand):
    x = normal(rand, size(0, 40), size(0, 40), dtype=torch.bfloat16)
    return transpose, {"x": x}, (x.T.contiguous(),)


@tile.kernel
def column_sums(x: Tensor[T, K, f32], skip: int):
    y = tile.empty([K], f32)
    for k in tile.parallel(tile.blocks(K, "k")):
        total = tile.zeros([k.extent], f32)
        for t in tile.range(tile.blocks(skip, T, "t")):
            total = total + tile.sum(x[t, k], axis=0)
        y[k] = total
    return y


@case
def block_loop_from_a_start(size, rand):
    x = integers(rand, -9, 9, size(0, 50), size(0, 40)).float()[:, : size(0, 40)]  # rows may be strided
    skip = size(0, 5)
    return column_sums, {"x": x, "skip": skip}, (x[skip:].sum(0),)


# --- control flow -----------------------------------------------------------------------------------------------


@tile.kernel
def ragged_sum(x: Tensor[B, L, f32], lens: Tensor[B, i32]):
    y, last = tile.empty([B], f32), tile.empty([B], f32)
    for b in tile.parallel(B):
        total = 0.0
        seen = -1.0
        for j in tile.range(tile.blocks(lens[b], "j")):
            v = x[b, j]
            total = total + tile.sum(v)
            seen = tile.maximum(seen, tile.max(v))
        y[b] = total
        last[b] = tile.where(lens[b] > 0, seen, -2.0)
    return y, last


@case
def data_dependent_stop(size, rand):
    b, limit = size(0, 6), size(1, 60)
    x, lens = integers(rand, -9, 9, b, limit).float(), integers(rand, 0, limit + 1, b)
    y = torch.stack([row[:n].sum() for row, n in zip(x, lens)]) if b else torch.zeros(0)
    tails = [max(-1.0, float(row[:n].max())) if n else -2.0 for row, n in zip(x, lens.tolist())]
    return ragged_sum, {"x": x, "lens": lens}, (y, torch.tensor(tails))


@tile.kernel
def strided_sum(x: Tensor[L, i32], bounds: Tensor[B, 2, i32]):
    y = tile.empty([B, 2], i32)
    for b in tile.parallel(B):
        total, count = 0, 0
        for i in tile.range(bounds[b, 0], bounds[b, 1], 3):
            total = total + x[i]
            count = count + 1
        y[b, 0], y[b, 1] = total, count
    return y


@case
def data_dependent_range(size, rand):
    b, length = size(0, 5), size(1, 30)
    x, bounds = integers(rand, -50, 50, length), integers(rand, 0, length + 1, b, 2)
    parts = [x[int(low) : int(high) : 3] for low, high in bounds]
    expected = torch.tensor([[int(p.sum()), len(p)] for p in parts], dtype=torch.int32).view(b, 2)
    return strided_sum, {"x": x, "bounds": bounds}, (expected,)


@tile.kernel
def fibonacci(n: Tensor[B, i32]):
    y = tile.empty([B, 4], i32)
    for b in tile.parallel(B):
        low, high = tile.full([4], 0, i32), tile.arange(4) + 1
        for _ in tile.range(n[b]):
            low, high = high, low + high
        y[b, :] = low
    return y


@case
def carried_values(size, rand):
    n = integers(rand, 0, 20, size(0, 4))
    rows = []
    for count in n.tolist():
        low, high = torch.zeros(4, dtype=torch.int32), torch.arange(1, 5, dtype=torch.int32)
        for _ in range(count):
            low, high = high, low + high
        rows.append(low)
    return fibonacci, {"n": n}, (torch.stack(rows) if rows else torch.zeros(0, 4, dtype=torch.int32),)


@tile.kernel
def choose(x: Tensor[B, 8, f32], which: Tensor[B, i32], scale: Tensor[f32] | None = None):
    y = tile.empty([B, 8], f32)
    for b in tile.parallel(B):
        kind, v = which[b], x[b, :]
        if kind == 0:
            v, add = v * 2.0, 1.0
        elif kind > 5:
            add = tile.sum(v)
            if kind > 8:
                v = tile.zeros([8], f32)
        else:
            add = 0.0
        if scale is not None:
            v = v * scale[()]
        y[b, :] = v + add
    return y


@case
def branches_on_data(size, rand):
    b = size(0, 8)
    x, which = integers(rand, -9, 9, b, 8).float(), integers(rand, 0, 12, b)
    rows = []
    for v, kind in zip(x, which.tolist()):
        rows.append(v * 2 + 1 if kind == 0 else (v * (kind <= 8) + v.sum() if kind > 5 else v))
    expected = torch.stack(rows) if rows else x
    if size(0, 1):
        scaled = [r if k > 8 else r + 2 * v if k == 0 else r + v for r, v, k in zip(rows, x, which.tolist())]
        arguments = {"x": x, "which": which, "scale": torch.tensor(2.0)}
        return choose, arguments, (torch.stack(scaled) if scaled else x,)
    return choose, {"x": x, "which": which}, (expected,)


@tile.kernel
def window(x: Tensor[T, K, f32], width: Static[int], first: bool = False):
    y = tile.empty([T, K], f32)
    for t in tile.parallel(T):
        total = tile.zeros([K], f32)
        for back in range(width):
            if t >= back:
                total = total + x[t - back, :] * (back + 1.0)
        y[t, :] = total if not first else total + x[0, :]
    return y


@case
def static_unroll(size, rand):
    x, width, first = integers(rand, -9, 9, size(1, 9), size(0, 20)).float(), size(1, 4), bool(size(0, 1))
    expected = sum(F.pad(x, (0, 0, back, 0))[: len(x)] * (back + 1) for back in range(width))
    return window, {"x": x, "width": width, "first": first}, (expected + (x[0] if first else 0),)


# --- gather -----------------------------------------------------------------------------------------------------


@tile.kernel
def paged(pages: Tensor[P, 4, C, bf16], table: Tensor[B, L, i32], lens: Tensor[B, i32]):
    y = tile.empty([B, 4 * L, C], bf16, init=0)
    for b in tile.parallel(B):
        for j in tile.range(tile.blocks(lens[b], "token")):
            page = table[b, j // 4]
            y[b, j, :] = pages[page, j % 4, :]
    return y


@case
def paged_gather(size, rand):
    p, b, width, c = size(1, 9), size(0, 4), size(1, 6), size(1, 20)
    pages, table = normal(rand, p, 4, c, dtype=torch.bfloat16), integers(rand, 0, p, b, width)
    lens = integers(rand, 0, 4 * width + 1, b)
    flat = pages[table.long()].reshape(b, 4 * width, c)
    keep = torch.arange(4 * width)[None, :] < lens[:, None]
    return paged, {"pages": pages, "table": table, "lens": lens}, (torch.where(keep[..., None], flat, 0),)


@tile.kernel
def selected(kv: Tensor[P, 4, C, f32], table: Tensor[B, L, i32], top: Tensor[B, K, i32]):
    y, count = tile.empty([B, C], f32), tile.empty([B], i32)
    for b in tile.parallel(B):
        total, used = tile.zeros([C], f32), 0
        for j in tile.range(tile.blocks(K, "k")):
            token = top[b, j]
            valid = token >= 0
            page = table.load((b, token // 4), where=valid, other=0)
            rows = kv.load((page, token % 4, slice(None)), where=valid[:, None], other=-1.0)
            total = total + tile.sum(rows, axis=0)
            used = used + tile.sum(valid)
        y[b, :] = total
        count[b] = used
    return y, count


@case
def selected_gather(size, rand):
    p, b, width, c, k = size(1, 9), size(0, 4), size(1, 6), size(1, 20), size(0, 40)
    kv, table = integers(rand, -9, 9, p, 4, c).float(), integers(rand, 0, p, b, width)
    top = integers(rand, -3, 4 * width, b, k)
    flat = kv[table.long()].reshape(b, 4 * width, c)
    rows = torch.where((top >= 0)[..., None], flat.gather(1, top.clamp(min=0).long()[..., None].expand(b, k, c)), -1.0)
    return selected, {"kv": kv, "table": table, "top": top}, (rows.sum(1), (top >= 0).sum(1).int())


@tile.kernel
def scatter(y: InOut[P, C, f32], x: Tensor[N, C, f32], place: Tensor[N, i64]):
    for n in tile.parallel(tile.blocks(N, "n")):
        at = place[n]
        y.store((at, slice(None)), x[n, :], where=(at >= 0)[:, None])


@case
def masked_scatter(size, rand):
    p, n, c = size(1, 30), size(0, 30), size(1, 9)
    y, x = normal(rand, p, c), normal(rand, n, c)
    place = torch.randperm(max(p, n), generator=rand)[:n]
    place = torch.where(place < p, place, -1)
    after = y.clone()
    after[place[place >= 0]] = x[place >= 0]
    return scatter, {"y": y, "x": x, "place": place}, (after,)


@tile.kernel
def windows(x: Tensor[T, f32], start: Tensor[B, i32]):
    y, z = tile.empty([B, 8], f32), tile.empty([B, 3], f32)
    for b in tile.parallel(B):
        y[b, :] = x[tile.span(start[b], 8)]
        z[b, :] = x.load((tile.span(start[b], 3, 2),), other=7.0)
    return y, z


@case
def spans_past_the_end(size, rand):
    t, b = size(0, 20), size(0, 4)
    x, start = normal(rand, t), integers(rand, 0, 25, b)
    long = torch.cat([x, torch.zeros(60)])
    long7 = torch.cat([x, torch.full((60,), 7.0)])
    y = torch.stack([long[s : s + 8] for s in start.tolist()]) if b else torch.zeros(0, 8)
    z = torch.stack([long7[s : s + 5 : 2] for s in start.tolist()]) if b else torch.zeros(0, 3)
    return windows, {"x": x, "start": start}, (y, z)


# --- scans, sort, take, histogram, join -------------------------------------------------------------------------


@tile.kernel
def scans(x: Tensor[T, K, f32], m: Tensor[T, K, b1]):
    a, b, c, d = (tile.empty([T, K], f32) for _ in range(4))
    ranks = tile.empty([T, K], i32)
    for t in tile.parallel(tile.blocks(T, "row")):
        v = x[t, :]
        a[t, :], b[t, :] = tile.cumsum(v), tile.cumsum(v, reverse=True)
        c[t, :], d[t, :] = tile.cummax(v), tile.cumprod(tile.minimum(v, 1.0), axis=1)
        ranks[t, :] = tile.cumsum(m[t, :]) - 1
    return a, b, c, d, ranks


@case
def scan(size, rand):
    x = integers(rand, -3, 4, size(0, 20), size(1, 40)).float()
    m = x > 0
    expected = x.cumsum(1), x.flip(1).cumsum(1).flip(1), x.cummax(1).values, x.clamp(max=1).cumprod(1)
    return scans, {"x": x, "m": m}, (*expected, (m.cumsum(1) - 1).int())


@tile.kernel
def counts(x: Tensor[N, i32], bins: Static[int]):
    y = tile.empty([2, bins], i32, init=0)
    for n in tile.parallel(tile.blocks(N, "n")):
        y.atomic_add((0, slice(None)), tile.histogram(x[n], bins))
        y.atomic_add((1, slice(None)), tile.histogram(x[n], bins, where=x[n] != 2))
    return y


@case
def histogram(size, rand):
    bins = size(3, 20)
    x = integers(rand, 0, bins, size(0, 60))
    expected = torch.stack([torch.bincount(v, minlength=bins) for v in (x, x[x != 2])]).int()
    return counts, {"x": x, "bins": bins}, (expected,)


@tile.kernel
def ordered(x: Tensor[T, K, f32], index: Tensor[T, M, i32]):
    up, down, taken = tile.empty([T, K], f32), tile.empty([T, K], f32), tile.empty([T, M], f32)
    for t in tile.parallel(tile.blocks(T, "row")):
        v = x[t, :]
        up[t, :], down[t, :] = tile.sort(v), tile.sort(v, descending=True)
        taken[t, :] = tile.take(v, index[t, :])
    return up, down, taken


@case
def sort_and_take(size, rand):
    t, k = size(0, 20), size(1, 33)
    x, index = normal(rand, t, k), integers(rand, 0, k, t, size(0, 9))
    expected = x.sort(1).values, x.sort(1, descending=True).values, x.gather(1, index.long())
    return ordered, {"x": x, "index": index}, expected


@tile.kernel
def rope(x: Tensor[T, 2 * M, bf16], cos: Tensor[T, M, f32], sin: Tensor[T, M, f32]):
    y = tile.empty([T, 2 * M], bf16)
    for t in tile.parallel(tile.blocks(T, "row")):
        a, b = tile.split(x[t, :].to(f32).reshape(t.extent, M, 2))
        c, s = cos[t, :], sin[t, :]
        y[t, :] = tile.join(a * c - b * s, a * s + b * c).reshape(t.extent, 2 * M).to(bf16)
    return y


@case
def join_and_split(size, rand):
    t, m = size(0, 20), size(1, 17)
    x, angle = normal(rand, t, 2 * m, dtype=torch.bfloat16), normal(rand, t, m)
    turned = torch.view_as_complex(x.float().view(t, m, 2)) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.view_as_real(turned).reshape(t, 2 * m).bfloat16()
    return rope, {"x": x, "cos": angle.cos(), "sin": angle.sin()}, (expected,)
