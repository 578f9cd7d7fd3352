"""The k largest of each row, exactly, k up to a few thousand of any length; of equal scores the lowest position wins.

Scores become int32 keys of the same order (flip all bits but the sign of negative numbers), so that a threshold is a
number to be found bit by bit:

    T = the k-th largest key,   above = |{key > T}|,   the first k - above of {key = T} complete the selection

Two ways to find T, one to write the result:

* `top_k` reads the row from memory three times; each pass counts digits of 11, 11 and 10 bits among the keys that agree
  with the digits found so far. One program per row and any length. Used on CPUs, and on GPUs for short rows.
* `top_k_tile` holds a piece of the row in registers and narrows a bracket lo <= T < hi with two thresholds at a time,
  whose counts come out of one reduction (packed into 16 bits each): about 20 rounds at most, 8 to 12 for real scores,
  as it stops when the bracket holds no choice any more. Rows beyond one tile are cut into pieces that each keep their
  own k best, which a second launch selects from (`top_k_pieces`). Used on GPUs.

A running count gives every winner its place; the order is that of the positions, which keeps the cache reads that
follow nearly sequential. Ties need no second pass: a winner's place is above(i) + min(ties(i), k - above), both counts
exclusive.

Legend: R rows, L candidates, k winners, C pieces of a row.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor as TorchTensor

from tilery import tile
from tilery.ops import topk
from tilery.ops.kernels._common import randn
from tilery.tile import Dim, Static, Tensor, TensorRef, Tile, b1, f32, i32
from tilery.tile.tolerance import EXACT

R, L = Dim("R"), Dim("L")

NEVER = -(2**31) + (1 << 23) - 1
"""The key of -inf: keys up to here are never chosen."""

PIECE = 8192
"""What one program holds: 32 keys for each of 256 threads. Pieces of twice the size take twice as long on an H100, the
scan and the rounds being latency."""

DIGITS = ((21, 11), (10, 11), (0, 10))
"""(shift, bits) of the three passes of `top_k`, the sign in the first digit."""


# ---- helpers on tiles ------------------------------------------------------------------------------------------------


def ordered(x: Tile) -> Tile:
    """f32 -> i32 that compares alike (no NaN); -0 and 0 are equal."""
    bits = tile.where(x == 0.0, 0.0, x).bitcast(i32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def pick(counts: Tile, wanted: Tile) -> tuple[Tile, Tile]:
    """(the digit that holds the `wanted`-th largest element, how many of that digit's are still wanted)."""
    above = tile.cumsum(counts, reverse=True) - counts
    hit = (above < wanted) & (wanted <= above + counts)
    digit = tile.sum(tile.where(hit, tile.arange(counts.shape[0]), 0))
    return digit, wanted - tile.sum(tile.where(hit, above, 0))


@tile.function
def threshold(scores: TensorRef, r: Tile, length: Any, k: int) -> tuple[Tile, Tile, Tile]:
    """(T, how many keys equal to T belong to the selection, its size) of row r."""
    chosen = wanted = prefix = tile.full([], 0, i32)
    for number in (0, 1, 2):
        shift, bits = DIGITS[number]
        counts = tile.zeros([1 << bits], i32)
        for at in tile.range(tile.blocks(length, f"pass{number}")):
            key = ordered(scores[r, at])
            valid = key > NEVER
            if number:
                valid = valid & ((key >> (shift + bits)) == prefix)
            own = ((key >> shift) + 1024) if number == 0 else ((key >> shift) & ((1 << bits) - 1))
            counts = counts + tile.histogram(own, 1 << bits, where=valid)
        if number == 0:
            chosen = tile.minimum(tile.sum(counts), k)
            wanted = chosen
        digit, wanted = pick(counts, wanted)
        prefix = digit - 1024 if number == 0 else (prefix << bits) | digit
    return prefix, wanted, chosen


def places(key: Tile, low: Tile, high: Tile, quota: Tile, above: Any, ties: Any) -> tuple[Tile, Tile, Tile]:
    """(place among the winners, bool winner, this block's counts packed) for keys in order of position: winners are
    keys >= high, and of those in [low, high) the first `quota`; `above`, `ties`: counts of earlier blocks."""
    tie = (key >= low) & (key < high)
    packed = (key >= high).to(i32) + (tie.to(i32) << 16)
    before = tile.cumsum(packed) - packed
    tied = ties + ((before >> 16) & 0xFFFF)
    place = above + (before & 0xFFFF) + tile.minimum(tied, quota)
    return place, (key >= high) | (tie & (tied < quota)), tile.sum(packed)


# ---- any length, from memory -----------------------------------------------------------------------------------------


def _top_k_reference(scores: TorchTensor, k: int, lens: TorchTensor | None) -> TorchTensor:
    rows, length = scores.shape
    masked = scores
    if lens is not None:
        masked = scores.masked_fill(torch.arange(length, device=scores.device) >= lens[:, None], float("-inf"))
    out = torch.full((rows, k), -1, dtype=torch.int32, device=scores.device)
    for r in range(rows):
        best = topk.top_k_positions(masked[r : r + 1], k)[0] if length else masked.new_empty(0).long()
        best = best[best >= 0].sort().values
        out[r, : len(best)] = best.int()
    return out


def _length(lens: TensorRef | None, r: Tile) -> Any:
    return tile.minimum(tile.maximum(lens[r], 0), L) if lens else L


@tile.kernel(reference=_top_k_reference, tolerance=EXACT)
def top_k(scores: Tensor[R, L, f32], k: Static[int], lens: Tensor[R, i32] | None = None):
    """Positions of the k largest of each row's first lens[r] (without lens: all L) scores: [R, L] -> [R, k] i32.

    Of equal scores the lowest position wins; -inf is never chosen; -1 fills the end of a row with fewer winners.
    Winners stand in order of position. NaN is not allowed. Source of the rule: `ops.topk`.
    """
    out = tile.empty([R, k], i32)
    for r in tile.parallel(R):
        length = _length(lens, r)
        low, quota, chosen = threshold(scores, r, length, k)
        above = ties = tile.full([], 0, i32)
        for at in tile.range(tile.blocks(length, "write")):
            key = ordered(scores[r, at])
            place, winner, packed = places(key, tile.maximum(low, NEVER + 1), low + 1, quota, above, ties)
            out.store((r, place), at.index, where=winner & (key > NEVER))
            above, ties = above + (packed & 0xFFFF), ties + ((packed >> 16) & 0xFFFF)
        out.store((r, slice(None)), -1, where=tile.arange(k) >= chosen)
    return out


def _scores(rand: torch.Generator, kind: str, rows: int, length: int, device: str = "cpu") -> TorchTensor:
    x = randn(rand, rows, length, device=device)
    if kind == "ties":
        x = (x * 2).round()
    elif kind == "relu":
        x = torch.relu(x - 1.0)
    elif kind == "holes":
        x[:, 3::2] = float("-inf")
    elif kind == "extremes":
        x[:, ::3] *= 1e38
        x[:, 1::3] *= -1e-42
        x[0, 0] = float("inf")
        x[0, 1] = -0.0
        x[0, 2] = 0.0
    return x


@top_k.case
def normal(rand: torch.Generator) -> dict[str, Any]:
    return {"scores": _scores(rand, "normal", 2, 60), "k": 17, "lens": None}


@top_k.case
def ties(rand: torch.Generator) -> dict[str, Any]:
    return {"scores": _scores(rand, "ties", 3, 70), "k": 20, "lens": None}


@top_k.case
def zeros_of_relu(rand: torch.Generator) -> dict[str, Any]:
    return {"scores": _scores(rand, "relu", 2, 65), "k": 30, "lens": torch.tensor([65, 40], dtype=torch.int32)}


@top_k.case
def fewer_than_k(rand: torch.Generator) -> dict[str, Any]:
    lens = torch.tensor([0, 4, 33], dtype=torch.int32)
    return {"scores": _scores(rand, "holes", 3, 33), "k": 24, "lens": lens}


@top_k.case
def extremes(rand: torch.Generator) -> dict[str, Any]:
    return {"scores": _scores(rand, "extremes", 2, 48), "k": 19, "lens": None}


@top_k.bench
def rows_64_of_32768(rand: torch.Generator, device: str) -> dict[str, Any]:
    return {"scores": _scores(rand, "normal", 64, 32768, device), "k": 2048, "lens": None}


def _mask_reference(scores: TorchTensor, k: int, lens: TorchTensor | None) -> TorchTensor:
    chosen = _top_k_reference(scores, k, lens)
    mask = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
    mask.scatter_(1, torch.where(chosen < 0, scores.shape[1], chosen).long(), True)
    return mask[:, :-1]


@tile.kernel(reference=_mask_reference, tolerance=EXACT)
def top_k_mask(scores: Tensor[R, L, f32], k: Static[int], lens: Tensor[R, i32] | None = None):
    """The selection of `top_k` as bool [R, L]."""
    out = tile.empty([R, L], b1)
    for r in tile.parallel(R):
        length = _length(lens, r)
        low, quota, _chosen = threshold(scores, r, length, k)
        ties = tile.full([], 0, i32)
        for at in tile.range(tile.blocks(L, "write")):
            key = tile.where(at.index < length, ordered(scores[r, at]), NEVER)
            _place, winner, packed = places(key, tile.maximum(low, NEVER + 1), low + 1, quota, 0, ties)
            out[r, at] = winner & (key > NEVER)
            ties = ties + ((packed >> 16) & 0xFFFF)
    return out


@top_k_mask.case
def mask_of_ties(rand: torch.Generator) -> dict[str, Any]:
    return {"scores": _scores(rand, "ties", 3, 70), "k": 20, "lens": torch.tensor([70, 5, 41], dtype=torch.int32)}


@top_k_mask.case
def mask_of_everything(rand: torch.Generator) -> dict[str, Any]:
    return {"scores": _scores(rand, "normal", 2, 9), "k": 16, "lens": None}


@top_k_mask.bench
def mask_512_of_8192(rand: torch.Generator, device: str) -> dict[str, Any]:
    return {"scores": _scores(rand, "normal", 512, 8192, device), "k": 2048, "lens": None}


# ---- a piece in registers --------------------------------------------------------------------------------------------


def thirds(low: Tile, high: Tile) -> tuple[Tile, Tile]:
    """Two keys that cut [low, high) into three parts, the first above low. Halves keep the difference inside i32."""
    third = tile.maximum(((high >> 1) - (low >> 1)) // 3 * 2, 1)
    return low + third, low + third + third


@tile.function
def narrow(key: Tile, low: Tile, high: Tile, at_low: Tile, wanted: Tile) -> tuple[Tile, Tile, Tile]:
    """(low, high, |{key >= high}|) such that the `wanted` largest are the keys >= high and, of those in [low, high),
    the first ones in whatever order: either all of them, or all are equal. Starts from at_low = |{key >= low}| >=
    wanted and no key >= high."""
    at_high = tile.full([], 0, i32)
    for _ in tile.range(32):
        first, second = thirds(low, high)
        if (at_low != wanted) & (first < high):
            packed = tile.sum((key >= first).to(i32) + ((key >= second).to(i32) << 16))
            n_first, n_second = packed & 0xFFFF, (packed >> 16) & 0xFFFF
            up_first, up_second = n_first >= wanted, n_second >= wanted
            high = tile.where(up_second, high, tile.where(up_first, second, first))
            at_high = tile.where(up_second, at_high, tile.where(up_first, n_second, n_first))
            low = tile.where(up_second, second, tile.where(up_first, first, low))
            at_low = tile.where(up_second, n_second, tile.where(up_first, n_first, at_low))
    return low, high, at_high


def _tile_reference(
    scores: TorchTensor, k: int, width: int, lens: TorchTensor | None, names: TorchTensor | None
) -> tuple[TorchTensor, TorchTensor]:
    rows, length = scores.shape
    pieces = -(-length // width)
    out = torch.full((rows, pieces, k), -1, dtype=torch.int32, device=scores.device)
    values = torch.full((rows, pieces, k), float("-inf"), device=scores.device)
    for c in range(pieces):
        part = scores[:, c * width : (c + 1) * width]
        best = _top_k_reference(part, k, None if lens is None else (lens - c * width).clamp(0, width))
        there, index = best >= 0, best.clamp(min=0).long()
        found = index + c * width if names is None else names[:, c * width : (c + 1) * width].gather(1, index).long()
        out[:, c] = torch.where(there, found, -1).int()
        values[:, c] = torch.where(there, part.gather(1, index), float("-inf"))
    return out, values


@tile.kernel(reference=_tile_reference, tolerance=EXACT)
def top_k_tile(
    scores: Tensor[R, L, f32], k: Static[int], width: Static[int], lens: Tensor[R, i32] | None = None,
    names: Tensor[R, L, i32] | None = None,
):  # fmt: skip
    """`top_k` of each piece of `width` candidates (at most 16384), held in registers: (what was chosen [R, C, k] i32,
    their scores [R, C, k] f32) with C = ceil(L / width); -1 and -inf fill. With `names` [R, L] the winners' names stand
    in place of their positions.
    """
    pieces = tile.cdiv(L, width)
    out, values = tile.empty([R, pieces, k], i32), tile.empty([R, pieces, k], f32)
    for r, c in tile.parallel(R, pieces):
        piece = tile.span(c * width, width)
        score = scores.load((r, piece), other=float("-inf"))
        if lens:
            score = tile.where(tile.arange(width, c * width) < lens[r], score, float("-inf"))
        key = ordered(score)
        valid = tile.sum(key > NEVER)
        wanted = tile.minimum(valid, k)
        low, high, at_high = narrow(key, tile.full([], NEVER + 1, i32), tile.max(key) + 1, valid, wanted)
        place, winner, _ = places(key, low, high, wanted - at_high, 0, 0)
        name = names[r, piece] if names else tile.arange(width, c * width)
        out.store((r, c, place), name, where=winner)
        values.store((r, c, place), score, where=winner)
        rest = tile.arange(k) >= wanted
        out.store((r, c, slice(None)), -1, where=rest)
        values.store((r, c, slice(None)), float("-inf"), where=rest)
    return out, values


@top_k_tile.case
def one_piece(rand: torch.Generator) -> dict[str, Any]:
    return {"scores": _scores(rand, "normal", 2, 100), "k": 17, "width": 128, "lens": None, "names": None}


@top_k_tile.case
def tied_pieces(rand: torch.Generator) -> dict[str, Any]:
    lens = torch.tensor([90, 32], dtype=torch.int32)
    return {"scores": _scores(rand, "ties", 2, 90), "k": 9, "width": 32, "lens": lens, "names": None}


@top_k_tile.case
def named(rand: torch.Generator) -> dict[str, Any]:
    names = torch.randperm(1000, generator=rand)[:120].view(2, 60).int()
    return {"scores": _scores(rand, "holes", 2, 60), "k": 40, "width": 64, "lens": None, "names": names}


@top_k_tile.case
def tile_extremes(rand: torch.Generator) -> dict[str, Any]:
    return {"scores": _scores(rand, "extremes", 2, 48), "k": 19, "width": 64, "lens": None, "names": None}


@top_k_tile.bench
def tile_64_of_32768(rand: torch.Generator, device: str) -> dict[str, Any]:
    return {"scores": _scores(rand, "normal", 64, 32768, device), "k": 2048, "width": 8192, "lens": None, "names": None}


def _mask_tile_reference(scores: TorchTensor, k: int, width: int, lens: TorchTensor | None) -> TorchTensor:
    return _mask_reference(scores, k, lens)


@tile.kernel(reference=_mask_tile_reference, tolerance=EXACT)
def top_k_mask_tile(scores: Tensor[R, L, f32], k: Static[int], width: Static[int], lens: Tensor[R, i32] | None = None):
    """`top_k_mask` with the row in registers, for L <= width (a power of two, at most 16384): bool [R, L]."""
    out = tile.empty([R, L], b1)
    for r in tile.parallel(R):
        score = scores.load((r, tile.span(0, width)), other=float("-inf"))
        if lens:
            score = tile.where(tile.arange(width) < lens[r], score, float("-inf"))
        key = ordered(score)
        valid = tile.sum(key > NEVER)
        wanted = tile.minimum(valid, k)
        low, high, at_high = narrow(key, tile.full([], NEVER + 1, i32), tile.max(key) + 1, valid, wanted)
        _place, winner, _packed = places(key, low, high, wanted - at_high, 0, 0)
        out[r, tile.span(0, width)] = winner
    return out


@top_k_mask_tile.case
def mask_tile_of_ties(rand: torch.Generator) -> dict[str, Any]:
    lens = torch.tensor([50, 5, 41], dtype=torch.int32)
    return {"scores": _scores(rand, "ties", 3, 50), "k": 20, "width": 64, "lens": lens}


@top_k_mask_tile.bench
def mask_tile_512_of_8192(rand: torch.Generator, device: str) -> dict[str, Any]:
    return {"scores": _scores(rand, "normal", 512, 8192, device), "k": 2048, "width": 8192, "lens": None}


@tile.graph
def top_k_pieces(
    scores: Tensor[R, L, f32], k: Static[int], widths: Static[tuple[int, ...]], lens: Tensor[R, i32] | None = None
):
    """`top_k` in one launch per entry of `widths`: pieces of that width, each keeping its k best, then pieces of those.

    The last width must hold what is left. Returns [R, k] i32; the tie rule holds, as pieces keep the order of
    positions.
    """
    names = None
    for width in widths:
        chosen, values = top_k_tile(scores, k, width, lens, names)
        shape = [scores.shape[0], (scores.shape[1] + (width - 1)) // width * k]
        names, scores, lens = tile.view(chosen, i32, shape), tile.view(values, f32, shape), None
    return tile.view(names, i32, [scores.shape[0], k])


def piece_widths(device: str, length: int, k: int) -> tuple[int, ...]:
    """The `widths` of `top_k_pieces` for rows of `length` on "cpu" or "cuda"; none: `top_k` is the better way.

    k = 2048: 32768 are four pieces of 8192, then one; 131072 are 16 pieces, then four, then one. A k so large that
    pieces would not shrink the row, and any CPU, read the row from memory.
    """
    widths: tuple[int, ...] = ()
    while device != "cpu" and length > PIECE:
        left = -(-length // PIECE) * k
        if left >= length:
            return ()
        widths, length = (*widths, PIECE), left
    return (*widths, 1 << max(length - 1, 1023).bit_length()) if device != "cpu" else ()


def top_k_fast(scores: TorchTensor, k: int, lens: TorchTensor | None = None) -> TorchTensor:
    """The way for a device and a length: the hand-scheduled kernel on Hopper, in registers on another GPU, in pieces if
    need be; from memory on a CPU.

    As `top_k`: [R, L] f32 -> [R, k] i32.
    """
    if _is_hopper(scores.device):
        from tilery.ops.hopper import topk as hopper

        if hopper.plan(*scores.shape, k):
            return hopper.top_k(scores if scores.stride(1) == 1 else scores.contiguous(), k, lens)
    widths = piece_widths(scores.device.type, scores.shape[1], k) if scores.shape[1] else ()
    return top_k_pieces(scores, k, widths, lens) if widths else top_k(scores, k, lens)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    """Whether kernels for sm_90a run there; they need the triton package."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    return importlib.util.find_spec("triton") is not None
