"""From logits to tokens: one draw per row that depends on nothing but that row.

A *row* is one position of one child request; a step of 64 requests with 3 drafts each has up to 256 of them. The order
of operations is vLLM's:

    log-probabilities are taken from the raw logits
    -> logit_bias -> min_tokens and the grammar's mask -> repetition, then frequency, then presence penalty
    -> temperature -> min_p -> top_k -> top_p -> draw

Greedy rows (temperature below 1e-5) take the argmax after the penalties; the lowest id wins ties.

The draw is inverse transform sampling. Row (seed, step) owns one number u = `uniform(seed, step)`; with the kept
tokens' weights w in id order, the token is the first i with w_0 + ... + w_i > u * sum(w), in float64. No generator is
advanced, so a token does not depend on which other rows share the batch, on a preemption between two steps, or on
whether its row came from plain decoding or from the verification of drafts. Ties at the edge of top_k and top_p keep
the lowest ids.

Legend: S rows, V vocabulary, W = ceil(V / 32) words of a token bitmask.

Measured 2026-11-22 on 2 shared cores of an AMD EPYC, torch 2.13, 2 threads, fp32 logits of 8 rows, best of 300 calls
(V = 129280: 1 thread, best of 20), in microseconds:

    V                                          8192   129280
    greedy                                       41      253
    temperature                                 292     3376
    temperature, top_k 50, top_p 0.9            684     6785
    temperature, top_p 0.9                      816    16356
    temperature, min_p 0.05                     394     6466
    temperature, penalties over 500 tokens      552     7551
    temperature, grammar mask                   459     7600
    greedy, logprobs 5                          523    13391
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tilery.engine.messages import SamplingParams, TokenLogprobs
from tilery.models.step import upload

FAILED = -1
"""Stands where a row has no token; `SampleResult.errors` says why."""

CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Logits worked on at a time, which bounds the scratch memory whatever S * V is: on a CPU it stays in the cache; on a
GPU, where the host waits once per chunk, 129 rows of 129280 take about 1 GiB."""

BLOCK = 128
"""Weights are summed in blocks, then within the block that the draw falls into; a running sum over V takes 3 times as
long."""

TOP_P_CANDIDATES = 1024
"""top_p without top_k sorts this many tokens first, and the whole row only if their mass falls short."""

_U64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


# ---- the random numbers ------------------------------------------------------------------------------------------


def _mix(z: int) -> int:
    """The output function of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _U64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _U64
    return z ^ (z >> 31)


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that is a pure function of its arguments: splitmix64 started at a hash of `seed`.

    It has 52 bits, one fewer than float64 could hold: then `u * total < total` holds for every total after rounding.
    """
    stream = _mix((seed + _GOLDEN) & _U64)
    return (_mix((stream + (step + 1) * _GOLDEN) & _U64) >> 12) * 2.0**-52


def child_seed(seed: int, index: int) -> int:
    """The seed of choice `index` of a request with n > 1; choice 0 has the request's own."""
    return seed if index == 0 else _mix((_mix(seed & _U64) + index * _GOLDEN) & _U64)


# ---- speculative decoding ----------------------------------------------------------------------------------------


def accept_drafts(sampled: Sequence[int], drafts: Sequence[int]) -> list[int]:
    """The tokens that a verified row group puts out: the drafts the target agrees with, then the target's own token.

    `sampled[i]` is the target's token for the row that assumes drafts[:i]; there are len(drafts) + 1 of them, or fewer
    where the rows behind an impossible draft were left out. At least one token comes back. A `FAILED` row ends the
    list, so that a failure behind a rejected draft does no harm.

    Why this keeps the distribution exactly. The target's token at step t is a function F(context, u_t), where u_t comes
    from (seed, t) alone, and F(context, u) with u uniform has the target's distribution. A draft takes no part in F; it
    only decides whether the context of row i + 1 is the true one, which holds iff drafts[:i + 1] equal the sampled
    tokens. So the output is token for token what plain decoding with the same seed gives (up to the model's rounding).
    In the terms of rejection sampling with a proposal that has all its mass on draft d (Leviathan et al. 2023, with q a
    point mass): d is accepted with probability P(F = d) = p(d), and on rejection the token has the distribution of p
    given that it is not d, which is their residual max(0, p - q) renormalised.
    """
    out: list[int] = []
    for i, token in enumerate(sampled):
        out.append(token)
        if i >= len(drafts) or token != drafts[i]:
            break
    return out


# ---- what the engine keeps and hands over ------------------------------------------------------------------------


class SamplerState:
    """What sampling keeps for one child over its life: parameters, seed and, if penalties need them, token counts.

    `append` each token put out; preemption changes nothing here. Raises `ValueError` for a logit_bias on a token
    that the vocabulary does not have.
    """

    __slots__ = ("_counts", "_ids", "_num_seen", "_slot", "_stops", "bias", "num_output", "params", "seed", "simple")

    def __init__(
        self,
        params: SamplingParams,
        *,
        seed: int,
        prompt_token_ids: Sequence[int],
        eos_token_ids: Sequence[int],
        vocab_size: int,
    ) -> None:
        self.params = params
        self.seed = seed
        self.num_output = 0
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        stops = {token for token in stops if 0 <= token < vocab_size}
        # Below min_tokens nothing may end the request. With ignore_eos an EOS ends nothing, so it stays allowed.
        self._stops = np.array(sorted(stops), dtype=np.int64)
        for token in params.logit_bias or ():
            if not 0 <= token < vocab_size:
                raise ValueError(f"logit_bias names token {token}, but token ids go from 0 to {vocab_size - 1}.")
        self.bias = params.logit_bias or None
        # Tokens seen so far, in order of appearance, and how often each stands in the output (0: prompt only).
        self._slot: dict[int, int] | None = None
        self._ids = np.empty(0, dtype=np.int64)
        self._counts = np.empty(0, dtype=np.float32)
        self._num_seen = 0
        if params.repetition_penalty != 1.0 or params.frequency_penalty or params.presence_penalty:
            self._slot = {}
            for token in prompt_token_ids if params.repetition_penalty != 1.0 else ():
                self._count(token, 0.0)
        self.simple = self.bias is None and self._slot is None
        """Neither bias nor penalties: past min_tokens and without a grammar, the logits need no editing."""

    def append(self, token_ids: Sequence[int]) -> None:
        """Take over tokens that the child has put out."""
        self.num_output += len(token_ids)
        if self._slot is not None:
            for token in token_ids:
                self._count(token, 1.0)

    def seen(self, drafts: Sequence[int] = ()) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        """Distinct tokens that penalties act on, with their counts in the output and `drafts`; None: no penalties."""
        if self._slot is None:
            return None
        ids, counts = self._ids[: self._num_seen], self._counts[: self._num_seen].copy()
        new: dict[int, float] = {}
        for token in drafts:
            slot = self._slot.get(token)
            if slot is None:
                new[token] = new.get(token, 0.0) + 1.0
            else:
                counts[slot] += 1.0
        if new:
            ids = np.concatenate([ids, np.fromiter(new, dtype=np.int64)])
            counts = np.concatenate([counts, np.fromiter(new.values(), dtype=np.float32)])
        return ids, counts

    def blocked(self, step: int) -> NDArray[np.int64] | None:
        """Token ids that min_tokens forbids at output position `step`."""
        return self._stops if step < self.params.min_tokens and self._stops.size else None

    def check(self) -> None:
        """Raise AssertionError if the counts contradict each other."""
        if self._slot is not None:
            assert [*self._slot.values()] == list(range(self._num_seen)), "slots are not dense"
            assert [*self._slot] == self._ids[: self._num_seen].tolist(), "ids and slots differ"
            assert self._counts[: self._num_seen].sum() == self.num_output, "counts do not add up to the output length"

    def _count(self, token: int, amount: float) -> None:
        assert self._slot is not None
        slot = self._slot.setdefault(token, self._num_seen)
        if slot == self._num_seen:
            if slot == self._ids.size:
                room = np.zeros(max(64, slot), dtype=np.int64)
                self._ids = np.concatenate([self._ids, room])
                self._counts = np.concatenate([self._counts, room.astype(np.float32)])
            self._ids[slot], self._counts[slot] = token, 0.0
            self._num_seen += 1
        self._counts[slot] += amount


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One position to draw a token for: the child's output so far, then `drafts`, which are assumed to be accepted."""

    state: SamplerState
    drafts: Sequence[int] = ()
    mask: NDArray[np.int32] | None = None
    """[W] words, bit i % 32 of word i // 32 set if token i is allowed; None: all are."""

    @property
    def step(self) -> int:
        """Index of the output token to be drawn."""
        return self.state.num_output + len(self.drafts)


@dataclass(frozen=True, slots=True)
class SampleResult:
    token_ids: list[int]
    """One per row; `FAILED` where `errors` has the row."""
    logprobs: list[TokenLogprobs | None]
    """Set for the rows whose parameters ask for it."""
    errors: dict[int, str]
    """Row number -> why it has no token. The other rows are not touched by it."""


# ---- the step ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def sample(logits_SV: Tensor, rows: Sequence[SampleRow]) -> SampleResult:
    """Draw one token per row. `logits_SV` is [S, V] of any float dtype, left as it is; work is done in fp32, where the
    logits are: from a GPU only token ids come back, and whole rows where log-probabilities are asked for.

    A row fails alone, with a text in `errors`: its logits hold NaN or +inf, or its mask allows no token. Where a
    grammar allows nothing but tokens that min_tokens forbids, the grammar wins. Raises `ValueError` if S != len(rows).
    """
    if logits_SV.dim() != 2 or logits_SV.shape[0] != len(rows):
        raise ValueError(f"logits must be [{len(rows)}, V], one line per row; got {list(logits_SV.shape)}.")
    logits_SV = logits_SV.detach()
    tokens: list[int] = []
    logprobs: list[TokenLogprobs | None] = [None] * len(rows)
    errors: dict[int, str] = {}
    chunk = max(1, CHUNK_ELEMENTS[logits_SV.device.type] // logits_SV.shape[1])
    for start in range(0, len(rows), chunk):
        part, raw = rows[start : start + chunk], logits_SV[start : start + chunk]
        tokens += _sample_chunk(raw, part)
        drawn = tokens[start:]
        for i, token in enumerate(drawn):
            if token == FAILED:
                errors[start + i] = _explain(raw[i], part[i], start + i)
        asked = [i for i, row in enumerate(part) if row.state.params.logprobs is not None and drawn[i] != FAILED]
        if asked:
            counts = [part[i].state.params.logprobs or 0 for i in asked]
            for i, record in zip(asked, _logprobs(raw[asked], [drawn[i] for i in asked], counts)):
                logprobs[start + i] = record
    return SampleResult(tokens, logprobs, errors)


def prompt_logprobs(logits_TV: Tensor, token_ids: Sequence[int], n: int) -> list[TokenLogprobs]:
    """Log-probabilities of known tokens: line t of the raw `logits_TV` predicts `token_ids[t]`; n alternatives each."""
    if logits_TV.dim() != 2 or logits_TV.shape[0] != len(token_ids):
        raise ValueError(f"logits must be [{len(token_ids)}, V], one line per token; got {list(logits_TV.shape)}.")
    chunk = max(1, CHUNK_ELEMENTS[logits_TV.device.type] // logits_TV.shape[1])
    out: list[TokenLogprobs] = []
    with torch.inference_mode():
        for start in range(0, len(token_ids), chunk):
            part = slice(start, start + chunk)
            out += _logprobs(logits_TV[part].detach(), token_ids[part], [n] * len(token_ids[part]))
    return out


def _sample_chunk(raw_SV: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    if all(row.mask is None and row.state.simple and row.step >= row.state.params.min_tokens for row in rows):
        x_SV = raw_SV.float()
    else:
        x_SV = raw_SV.to(torch.float32, copy=True)
        _edit(x_SV, rows)
    drawn = [i for i, row in enumerate(rows) if not row.state.params.greedy]
    if not drawn:
        return _argmax(x_SV)
    if len(drawn) == len(rows):
        return _draw(x_SV, rows)
    greedy = [i for i, row in enumerate(rows) if row.state.params.greedy]
    tokens = [FAILED] * len(rows)
    greedy_at, drawn_at = (upload(torch.tensor(part, device="cpu"), x_SV.device) for part in (greedy, drawn))
    for part, chosen in ((greedy, _argmax(x_SV[greedy_at])), (drawn, _draw(x_SV[drawn_at], [rows[i] for i in drawn]))):
        for i, token in zip(part, chosen):
            tokens[i] = token
    return tokens


def _edit(x_SV: Tensor, rows: Sequence[SampleRow]) -> None:
    """Apply bias, masks and penalties in place; rows touch few tokens, so each is one indexed operation."""
    vocab = x_SV.shape[1]
    bias = _Entries()
    banned = _Entries()
    penalised = _Entries()
    for i, row in enumerate(rows):
        state = row.state
        if state.bias is not None:
            bias.add(i, list(state.bias), list(state.bias.values()))
        blocked = state.blocked(row.step)
        if row.mask is not None:
            allowed = _unpack(row.mask, vocab)
            if blocked is not None:
                both = allowed.copy()
                both[blocked] = False
                allowed = both if both.any() else allowed
            x_SV[i].masked_fill_(upload(torch.from_numpy(~allowed), x_SV.device), -torch.inf)
        elif blocked is not None:
            banned.add(i, blocked)
        seen = state.seen(row.drafts)
        if seen is not None and seen[0].size:
            ids, counts = seen
            p = state.params
            minus = p.frequency_penalty * counts + p.presence_penalty * (counts > 0)
            penalised.add(i, ids, minus, np.full(ids.size, p.repetition_penalty, dtype=np.float32))
    # -inf plus a bias stays -inf, so masks may be set before the bias is added.
    for entries in (bias, banned, penalised):
        if not entries.rows:
            continue
        at, values = entries.tensors(x_SV.device)
        if entries is bias:
            x_SV[at] += values[0]
        elif entries is banned:
            x_SV[at] = -torch.inf
        else:
            minus_N, repetition_N = values
            x_N = x_SV[at]
            x_SV[at] = torch.where(x_N > 0, x_N / repetition_N, x_N * repetition_N) - minus_N


class _Entries:
    """Scattered logits of a batch: (row, token id) pairs with some values each."""

    def __init__(self) -> None:
        self.rows: list[NDArray[np.int64]] = []
        self._ids: list[Sequence[int] | NDArray[np.int64]] = []
        self._values: list[tuple[Sequence[float] | NDArray[np.float32], ...]] = []

    def add(
        self, row: int, ids: Sequence[int] | NDArray[np.int64], *values: Sequence[float] | NDArray[np.float32]
    ) -> None:
        self.rows.append(np.full(len(ids), row))
        self._ids.append(ids)
        self._values.append(values)

    def tensors(self, device: torch.device) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
        at = (upload(torch.from_numpy(np.concatenate(part)), device) for part in (self.rows, self._ids))
        values = [upload(torch.from_numpy(np.concatenate(v).astype(np.float32)), device) for v in zip(*self._values)]
        return (next(at), next(at)), values


def _unpack(mask_W: NDArray[np.int32], vocab: int) -> NDArray[np.bool_]:
    """[W] words -> [V] booleans; tokens beyond the mask's end are not allowed."""
    bits = np.unpackbits(mask_W.view(np.uint8), bitorder="little", count=vocab if vocab <= mask_W.size * 32 else None)
    allowed = bits.view(np.bool_)
    return allowed if allowed.size == vocab else np.pad(allowed, (0, vocab - allowed.size))


def _argmax(x_SV: Tensor) -> list[int]:
    """The lowest id of each row's maximum; `FAILED` if that is not finite (NaN counts as the largest value)."""
    if x_SV.device.type == "cpu":  # numpy: torch 2.13's argmax over a line is 30 times slower on CPU
        x = x_SV.numpy()
        return [i if math.isfinite(x_V[i]) else FAILED for x_V, i in zip(x, x.argmax(axis=-1).tolist())]
    ids_S = x_SV.argmax(dim=-1)
    return torch.where(x_SV.gather(1, ids_S[:, None])[:, 0].isfinite(), ids_S, FAILED).tolist()


# ---- the draw ----------------------------------------------------------------------------------------------------


def _draw(x_SV: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    params = [row.state.params for row in rows]
    device = x_SV.device
    temperature_S = torch.tensor([p.temperature for p in params], dtype=torch.float32, device="cpu")
    u_S = torch.tensor([uniform(row.state.seed, row.step) for row in rows], dtype=torch.float64, device="cpu")
    p_SV = torch.softmax(x_SV / upload(temperature_S, device)[:, None], dim=-1)
    # One NaN or +inf, or nothing but -inf, makes the whole line NaN.
    failed_S = p_SV[:, 0].isnan()
    if device.type != "cpu" or failed_S.any():  # a GPU's host would have to wait for the answer
        p_SV.masked_fill_(failed_S[:, None], 1.0)
    vocab = x_SV.shape[1]
    limited = [i for i, p in enumerate(params) if p.top_p < 1.0 or p.min_p > 0.0 or 0 < p.top_k < vocab]
    if limited and device.type == "cpu":
        lines = p_SV.numpy()
        for i in limited:
            _truncate_row(lines[i], params[i].top_k, params[i].top_p, params[i].min_p)
    elif limited:
        chosen = [params[i] for i in limited]
        settings = [(p.top_k if p.top_k > 0 else vocab, p.top_p, p.min_p) for p in chosen]
        at = upload(torch.tensor(limited, device="cpu"), device)
        p_SV[at] = _truncate_batch(p_SV[at], upload(torch.tensor(settings, dtype=torch.float64, device="cpu"), device))
    return torch.where(failed_S, FAILED, _invert(p_SV, upload(u_S, device))).tolist()


def _invert(weights_SV: Tensor, u_S: Tensor) -> Tensor:
    """[S, V] weights, at least one above zero in each line, and [S] numbers in [0, 1) -> [S] token ids."""
    rows, vocab = weights_SV.shape
    if vocab % BLOCK:
        weights_SV = F.pad(weights_SV, (0, -vocab % BLOCK))
    blocks_SKB = weights_SV.view(rows, -1, BLOCK)
    ends_SK = blocks_SKB.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target_S1 = u_S[:, None] * ends_SK[:, -1:]
    block_S1 = torch.searchsorted(ends_SK, target_S1, right=True)
    start_S1 = ends_SK.gather(1, (block_S1 - 1).clamp_(min=0)) * (block_S1 > 0)
    inner_SB = blocks_SKB[torch.arange(rows, device=u_S.device), block_S1[:, 0]].cumsum(dim=-1, dtype=torch.float64)
    # The block's sum was rounded in another order than the running sum within it: stay below the latter's end.
    below_S1 = torch.nextafter(inner_SB[:, -1:], torch.zeros_like(target_S1))
    offset_S1 = torch.searchsorted(inner_SB, torch.minimum(target_S1 - start_S1, below_S1), right=True)
    return (block_S1 * BLOCK + offset_S1)[:, 0]


def _truncate_row(p_V: NDArray[np.float32], top_k: int, top_p: float, min_p: float) -> None:
    """Set to zero, in place, what min_p, then top_k, then top_p cut off one row of probabilities.

    min_p keeps p >= min_p * max(p). top_k keeps the k largest. top_p keeps the shortest prefix, from the largest down,
    that holds at least top_p of the mass left by the two. Equal values are ranked by id. The values alone give the cut
    and how many tokens equal to it stay; the ids are found by comparing with the cut, so only candidates are sorted.
    """
    vocab = p_V.size
    if min_p > 0.0:
        p_V *= p_V >= np.float32(min_p) * p_V.max()
    has_k = 0 < top_k < vocab
    if not has_k and top_p >= 1.0:
        return
    size = top_k if has_k else min(TOP_P_CANDIDATES, vocab)
    kept = np.partition(p_V, vocab - size)[vocab - size :]
    if top_p < 1.0:
        mass = top_p * (kept if has_k else p_V).sum(dtype=np.float64)
        kept = np.sort(kept)[::-1]
        sums = np.cumsum(kept, dtype=np.float64)
        if sums[-1] < mass and not has_k:
            kept = np.sort(p_V)[::-1]
            sums = np.cumsum(kept, dtype=np.float64)
        kept = kept[: int(np.searchsorted(sums, mass)) + 1]
    cut = kept.min()
    if cut == 0.0:
        return
    quota = np.count_nonzero(kept == cut)
    equal = p_V == cut
    if np.count_nonzero(equal) > quota:
        p_V[np.flatnonzero(equal)[quota:]] = 0.0
    p_V *= p_V >= cut


def _truncate_batch(p_SV: Tensor, settings_S3: Tensor) -> Tensor:
    """`_truncate_row` for a batch on an accelerator, where one sort of everything beats many small steps.

    settings_S3: top_k (V if off), top_p, min_p in float64.
    """
    top_k_S1, top_p_S1, min_p_S1 = settings_S3[:, :, None].unbind(1)
    p_SV = p_SV * (p_SV >= min_p_S1.float() * p_SV.amax(dim=-1, keepdim=True))
    sorted_SV, ids_SV = p_SV.sort(dim=-1, descending=True, stable=True)
    sorted_SV = sorted_SV * (torch.arange(p_SV.shape[1], device=p_SV.device) < top_k_S1)
    sums_SV = sorted_SV.cumsum(dim=-1, dtype=torch.float64)
    before_SV = torch.cat([torch.zeros_like(sums_SV[:, :1]), sums_SV[:, :-1]], dim=-1)
    sorted_SV = sorted_SV * ((before_SV < top_p_S1 * sums_SV[:, -1:]) | (top_p_S1 >= 1.0))
    return torch.zeros_like(p_SV).scatter_(-1, ids_SV, sorted_SV)


# ---- log-probabilities and errors --------------------------------------------------------------------------------


def _logprobs(raw_TV: Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """[T, V] raw logits -> one record per line, alternatives from likely to unlikely, equal ones by id."""
    x_TV = raw_TV.float()
    norm_T = torch.logsumexp(x_TV, dim=-1).cpu().numpy()
    out = []
    for x_V, norm, token, n in zip(x_TV.cpu().numpy(), norm_T, token_ids, counts):
        ids = _largest(x_V, n)
        rank = int(np.count_nonzero(x_V > x_V[token])) + 1
        out.append(TokenLogprobs(token, float(x_V[token] - norm), rank, ids.tolist(), (x_V[ids] - norm).tolist()))
    return out


def _largest(x_V: NDArray[np.float32], n: int) -> NDArray[np.int64]:
    """Ids of the n largest values, largest first, equal values by id."""
    n = min(n, x_V.size)
    if n == 0:
        return np.empty(0, dtype=np.int64)
    cut = np.partition(x_V, x_V.size - n)[x_V.size - n]
    above = np.flatnonzero(x_V > cut)
    ids = np.concatenate([above, np.flatnonzero(x_V == cut)[: n - above.size]])
    return ids[np.argsort(-x_V[ids], kind="stable")]


def _explain(raw_V: Tensor, row: SampleRow, number: int) -> str:
    where = f"Row {number} (output token {row.step})"
    if raw_V.isnan().any():
        return f"{where}: the model's logits hold NaN; the weights or the arithmetic of this deployment are broken."
    if (raw_V == torch.inf).any():
        return f"{where}: the model's logits hold +inf; they overflowed, try a wider dtype."
    if row.mask is not None and not _unpack(row.mask, raw_V.shape[0]).any():
        return f"{where}: the grammar allows no token of the vocabulary here."
    return f"{where}: no token is left to choose from; every allowed one has a logit of -inf."
