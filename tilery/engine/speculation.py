"""Speculative decoding with the model's own multi-token-prediction (MTP) layer: when to draft, and what for.

After each step the MTP layer reads the hidden states of the positions that turned out valid, together with the token
that follows each, and proposes the token after next; the next step verifies it (`sampler.accept_drafts`: exact). The
MTP layer has cache rows of its own, so a request can be drafted for only while those rows are complete: hidden
states of steps that did not draft are kept and fed later (`MtpBacklog`).

Drafting costs time and wins tokens, and which is more depends on the batch and the text. `DraftPolicy` measures
seconds per output token with and without drafts, per batch size, and uses whichever is faster, looking again from
time to time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

BACKLOG_TOKENS = 512
"""A request whose MTP rows lag further behind is not drafted for any more."""


@dataclass(slots=True)
class MtpBacklog:
    """The positions of one request that the MTP layer has not read yet: from `start`, hidden states in order."""

    start: int = 0
    hidden: list[Tensor] = field(default_factory=list)
    lost: bool = False

    @property
    def stop(self) -> int:
        return self.start + sum(part.shape[0] for part in self.hidden)

    def add(self, start: int, hidden: Tensor) -> None:
        """The step computed `hidden` [n, H] for positions `start` ..; a jump (prefix hit, preemption) starts anew."""
        if start != self.stop:
            self.start, self.hidden, self.lost = start, [], False
        if self.lost:
            self.start = start + hidden.shape[0]
            return
        self.hidden.append(hidden)

    def trim(self) -> None:
        """Gives up on a request that lags too far, so that it holds no memory."""
        if self.stop - self.start > BACKLOG_TOKENS:
            self.start, self.hidden, self.lost = self.stop, [], True

    def clear(self) -> None:
        self.start, self.hidden = self.stop, []


@dataclass(slots=True)
class _Pace:
    """Seconds per output token, as a moving average over steps; None until measured."""

    value: float | None = None
    samples: int = 0

    def add(self, seconds: float, tokens: int) -> None:
        sample = seconds / max(tokens, 1)
        weight = max(0.05, 1.0 / (self.samples + 1))
        self.value = sample if self.value is None else (1 - weight) * self.value + weight * sample
        self.samples += 1


@dataclass(slots=True)
class _Bucket:
    drafting: _Pace = field(default_factory=_Pace)
    plain: _Pace = field(default_factory=_Pace)
    use: bool = True
    left: int = 0
    """Steps until the other way is tried again."""


class DraftPolicy:
    """Decides per step whether to verify and propose drafts. With `auto_off` False it always says yes.

    Only steps without prefill count as measurements. `disabled` tells whether the last decision was to go without.
    """

    WARMUP = 24
    """Steps with drafts before the first comparison."""
    TRIAL = 8
    """Steps the other way, to compare."""
    PERIOD = 256
    """Steps between comparisons."""

    def __init__(self, auto_off: bool) -> None:
        self._auto_off = auto_off
        self._buckets: dict[int, _Bucket] = {}
        self.disabled = False

    def use_drafts(self, requests: int) -> bool:
        """For a step that decodes `requests` requests."""
        if not self._auto_off:
            return True
        bucket = self._buckets.setdefault(requests.bit_length(), _Bucket(left=self.WARMUP))
        trial = bucket.left <= 0
        decision = bucket.use is not trial
        self.disabled = not bucket.use
        return decision

    def record(self, requests: int, used: bool, seconds: float, tokens: int) -> None:
        """A step that decoded `requests` requests and put out `tokens` tokens took `seconds`, drafting included."""
        if not self._auto_off:
            return
        bucket = self._buckets.setdefault(requests.bit_length(), _Bucket(left=self.WARMUP))
        (bucket.drafting if used else bucket.plain).add(seconds, tokens)
        bucket.left -= 1
        if bucket.left > -self.TRIAL:
            return
        if bucket.drafting.value is not None and bucket.plain.value is not None:
            bucket.use = bucket.drafting.value < bucket.plain.value
        bucket.left = self.PERIOD
