"""The rest of the zoo: matrix products, atomics, packed rows, quantisation, casts, workspace."""

import torch

from tests.tile.zoo import C, K, L, M, N, P, S, T, case, integers, normal
from tilery import tile
from tilery.tile import InOut, Static, Tensor, bf16, e4m3, f32, i8, i32, lib, u8

# --- matrix products --------------------------------------------------------------------------------------------


@tile.kernel
def matmul(a: Tensor[M, K, (f32, bf16, e4m3, i8)], b: Tensor[N, K, (f32, bf16, e4m3, i8)], out: Static[object]):
    y = tile.empty([M, N], out)
    for m, n in tile.parallel(tile.blocks(M, "m"), tile.blocks(N, "n")):
        acc = tile.zeros([m.extent, n.extent], out)
        for k in tile.range(tile.blocks(K, "k")):
            acc = tile.dot(a[m, k], b[n, k].T, acc)
        y[m, n] = acc
    return y


def _dot(dtype, size, rand):
    m, n, k = size(0, 40), size(0, 40), size(0, 50)
    whole = dtype is torch.int8
    a, b = (integers(rand, -100, 100, r, k, dtype=dtype) if whole else normal(rand, r, k).to(dtype) for r in (m, n))
    exact = (a.double() @ b.double().T).to(torch.int32 if whole else torch.float32)
    return matmul, {"a": a, "b": b, "out": i32 if whole else f32}, (exact,)


@case
def dot_f32(size, rand):
    return _dot(torch.float32, size, rand)


@case
def dot_bf16(size, rand):
    return _dot(torch.bfloat16, size, rand)


@case
def dot_e4m3(size, rand):
    return _dot(torch.float8_e4m3fn, size, rand)


@case
def dot_i8(size, rand):
    return _dot(torch.int8, size, rand)


# --- atomics ----------------------------------------------------------------------------------------------------


@tile.kernel
def atomics(x: Tensor[N, i32], bin: Tensor[N, i32]):
    add, top, low, bits = (tile.empty([5], i32, init=0) for _ in range(4))
    total = tile.empty([1], f32, init=0)
    for n in tile.parallel(tile.blocks(N, "n")):
        v, at = x[n], bin[n]
        add.atomic_add((at,), v, where=at >= 0)
        top.atomic_max((at,), v, where=at >= 0)
        low.atomic_min((at,), v, where=at >= 0)
        bits.atomic_or((at,), v, where=at >= 0)
        total.atomic_add((0,), tile.sum(v).to(f32))
    return add, top, low, bits, total


@case
def atomic(size, rand):
    n = size(0, 50)
    x, place = integers(rand, -9, 100, n), integers(rand, -2, 5, n)
    keep, zero = place >= 0, torch.zeros(5, dtype=torch.int32)
    at, v = place[keep].long(), x[keep]
    bits = zero.clone()
    for i, item in zip(at, v):
        bits[i] |= item
    expected = (
        zero.index_add(0, at, v), zero.scatter_reduce(0, at, v, "amax"), zero.scatter_reduce(0, at, v, "amin"), bits,
        x.sum().float()[None],
    )  # fmt: skip
    return atomics, {"x": x, "bin": place}, expected


@tile.kernel
def tickets(counter: InOut[1, i32], last: InOut[3, i32]):
    y = tile.empty([3], i32)
    for p in tile.parallel(3):
        y[p] = counter.atomic_add((0,), p + 1)
        last[p] = last.atomic_xchg((p,), -1) * 10
    return y


@case
def atomics_give_the_old_value(size, rand):
    counter, last = torch.tensor([5]).int(), torch.tensor([1, 2, 3]).int()
    after = torch.tensor([11]).int(), torch.tensor([10, 20, 30]).int()
    return tickets, {"counter": counter, "last": last}, (torch.tensor([5, 6, 8]).int(), *after)


# --- packed rows and quantisation -------------------------------------------------------------------------------


@tile.kernel
def pack_656(
    cache: InOut[S, 656, u8], latent: Tensor[T, 512, bf16], rope_part: Tensor[T, 64, bf16], slot: Tensor[T, i32]
):
    """512 e4m3, 4 scales in f32, 64 bf16 per row."""
    values = cache.view(e4m3, [S, 512], strides=[656, 1])
    scales = cache.view(f32, [S, 4], strides=[656 // 4, 1], offset=512 // 4)
    tail = cache.view(bf16, [S, 64], strides=[656 // 2, 1], offset=528 // 2)
    for t in tile.parallel(tile.blocks(T, "row")):
        q, scale = lib.quantize_fp8(latent[t, :].reshape(t.extent, 4, 128))
        at = slot[t]
        values[at, :], scales[at, :], tail[at, :] = q.reshape(t.extent, 512), scale, rope_part[t, :]


@case
def packed_rows_of_656_bytes(size, rand):
    s, t = size(1, 9), size(0, 9)
    t = min(s, t)
    latent, tail = normal(rand, t, 512, dtype=torch.bfloat16), normal(rand, t, 64, dtype=torch.bfloat16)
    slot = torch.randperm(s, generator=rand)[:t].int()
    cache = integers(rand, 0, 256, s, 656, dtype=torch.uint8)
    g = latent.float().view(t, 4, 128)
    scale = g.abs().amax(-1).clamp(min=1e-4) / 448
    q = (g / scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn).view(t, 512)
    rows = torch.cat([q.view(torch.uint8), scale.view(torch.uint8), tail.view(torch.uint8)], 1)
    after = cache.clone()
    after[slot.long()] = rows
    arguments = {"cache": cache, "latent": latent, "rope_part": tail, "slot": slot}
    return pack_656, arguments, (after,)


@tile.kernel
def index_pages(cache: Tensor[P, 64 * 132, u8], table: Tensor[L, i32], q: Tensor[4, 128, e4m3], n: int):
    """Scores of 4 heads over pages of 64 keys: 64 x 128 e4m3, then 64 scales in f32."""
    keys = cache.view(e4m3, [P, 64, 128], strides=[64 * 132, 128, 1])
    scales = cache.view(f32, [P, 64], strides=[64 * 132 // 4, 1], offset=64 * 128 // 4)
    y = tile.empty([4, 64 * L], f32, init=0)
    for j in tile.parallel(tile.blocks(n, "key")):
        page = table[j // 64]
        y[:, j] = tile.dot(q[:, :], keys[page, j % 64, :].T) * scales[page, j % 64][None, :]
    return y


@case
def indexer_pages(size, rand):
    p, width = size(1, 4), size(1, 3)
    keys, scales = normal(rand, p, 64, 128).to(torch.float8_e4m3fn), normal(rand, p, 64)
    cache = torch.cat([keys.view(torch.uint8).view(p, -1), scales.view(torch.uint8).view(p, -1)], 1)
    table, q, n = integers(rand, 0, p, width), normal(rand, 4, 128).to(torch.float8_e4m3fn), size(0, 64 * width)
    scores = torch.einsum("hd,pkd->hpk", q.float(), keys.float()[table.long()]) * scales[table.long()]
    expected = scores.reshape(4, 64 * width)
    expected[:, n:] = 0
    return index_pages, {"cache": cache, "table": table, "q": q, "n": n}, (expected,)


@tile.kernel
def int8_channels(x: Tensor[C, 8, f32]):
    """Per channel (column) and per token (row), and back."""
    by_token, token_scale = tile.empty([C, 8], i8), tile.empty([C], f32)
    by_channel, channel_scale = tile.empty([C, 8], i8), tile.empty([8], f32)
    back = tile.empty([C, 8], f32)
    for _ in tile.parallel(1):
        by_token[:, :], token_scale[:] = lib.quantize_int8(x[:, :])
        q, scale = lib.quantize_int8(x[:, :], axis=0)
        by_channel[:, :], channel_scale[:] = q, scale
        back[:, :] = lib.dequantize(q, scale, axis=0)
    return by_token, token_scale, by_channel, channel_scale, back


@case
def int8_by_token_and_channel(size, rand):
    x = normal(rand, size(1, 20), 8)
    found = []
    for axis in (1, 0):
        scale = x.abs().amax(axis, keepdim=True).clamp(min=1e-8) / 127
        found.append(((x / scale).round().clamp(-127, 127).to(torch.int8), scale))
    (a, s), (b, t) = found
    return int8_channels, {"x": x}, (a, s[:, 0], b, t[0], b.float() * t)


@tile.kernel
def casts(x: Tensor[N, f32], n: Tensor[N, i32]):
    sat, whole, narrow, half = tile.empty([N], e4m3), tile.empty([N], i32), tile.empty([N], i8), tile.empty([N], bf16)
    quotient, rest, shifted = (tile.empty([N], i32) for _ in range(3))
    for i in tile.parallel(tile.blocks(N, "i")):
        v, k = x[i], n[i]
        sat[i], whole[i], half[i] = v.to(e4m3), v.to(i32), tile.round(v).to(bf16)
        narrow[i] = k.to(i8)
        quotient[i], rest[i] = k // 7, k % -7
        shifted[i] = (k << 3 ^ k) >> 2 & 0xFFF | (~k & 1)
    return sat, whole, narrow, half, quotient, rest, shifted


@case
def casts_and_integers(size, rand):
    count = size(0, 40)
    x, n = normal(rand, count) * 400, integers(rand, -200, 200, count)
    return casts, {"x": x, "n": n}, (
        x.clamp(-448, 448).to(torch.float8_e4m3fn), x.int(), n.to(torch.int8), x.round().bfloat16(),
        torch.div(n, 7, rounding_mode="trunc"), torch.fmod(n, -7), ((n << 3) ^ n) >> 2 & 0xFFF | (~n & 1),
    )  # fmt: skip


@tile.kernel
def workspace(x: Tensor[T, K, f32]):
    scratch = tile.empty([T, 2, K], f32)
    y = tile.empty([T, K], f32)
    for t in tile.parallel(T):
        scratch[t, 0, :] = x[t, :] * 2.0
        scratch[t, 1, :] = x[t, :] + 1.0
        tile.tap("doubled", scratch[t, 0, :])
        y[t, :] = scratch[t, 0, :] * scratch[t, 1, :]
    return y


@case
def workspace_memory(size, rand):
    x = normal(rand, size(0, 5), size(0, 9))
    return workspace, {"x": x}, (x * 2 * (x + 1),)
