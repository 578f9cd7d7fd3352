"""Engine outputs to text: detokenise, find stop strings, hold back what may become one, cut.

One `OutputProcessor` follows one child (one choice of one request), in the offline API and in the server alike.

Stop strings are this side's business, for they are made of text, not of tokens:

    output so far   |  handed out         | held back  |
    next token      |                     |            | new text |
                                          ^ a stop string that ends in the new text starts here or later

The held-back part is the longest suffix that begins some stop string, so a match can never start in text that was
handed out. Of several matches that one token completes, the earliest start wins, then the longest. Tokens up to the
completing one are kept (as in vLLM); the owner must abort the child when `needs_abort` says so, and ignore what it
still sends (`push` answers None).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tilery.engine.messages import (
    EngineOutput,
    ErrorKind,
    FinishReason,
    RequestTiming,
    SamplingParams,
    TokenLogprobs,
)
from tilery.engine.tokenizer import Tokenizer


class TextDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What one `EngineOutput` adds to one child's answer."""

    request_id: str
    index: int
    text: str
    """Final text; may be empty while a character or a possible stop string is incomplete."""
    token_ids: list[int]
    """New tokens, a stop or end-of-sequence token included; their text may come with a later delta."""
    logprobs: list[TokenLogprobs] | None = None
    """One per token of `token_ids`."""
    text_offsets: list[int] | None = None
    """With logprobs: for each token, the number of output characters before it."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for end of sequence."""
    needs_abort: bool = False
    """A stop string was found that the engine knows nothing of: send `AbortRequests`."""
    error_kind: ErrorKind | None = None
    error: str | None = None
    timing: RequestTiming | None = None
    """None if a stop string ended it: the engine's timing comes with the answer to the abort."""


class OutputProcessor:
    """Raises nothing; `push` outputs in the order in which the engine sent them."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int] = ()) -> None:
        self._detokenizer = tokenizer.detokenizer(
            skip_special_tokens=params.skip_special_tokens, context=prompt_token_ids
        )
        self._end_ids = {*tokenizer.eos_ids, *params.stop_token_ids}
        self._min_tokens = params.min_tokens
        self._include_stop = params.include_stop_str_in_output
        self._stops = _StopStrings(params.stop) if params.stop else None
        self._by_token = self._stops is not None or params.logprobs is not None
        self._held = ""
        """Text of the detokeniser that may be the beginning of a stop string."""
        self._num_chars = 0
        """Characters of output text so far, held ones included."""
        self.num_tokens = 0
        """Output tokens so far, a stop or end-of-sequence token included."""
        self.finished = False

    def push(self, output: EngineOutput) -> TextDelta | None:
        """None once the child is finished."""
        if self.finished:
            return None
        tokens = output.token_ids
        ending = output.finish_reason is not None
        text_tokens = self._with_text(output)
        offsets: list[int] | None = None
        match: _Match | None = None

        if not self._by_token:
            self.num_tokens += len(tokens)
            text = self._detokenizer.push(text_tokens) if text_tokens else ""
            if ending:
                text += self._detokenizer.flush()
            self._num_chars += len(text)
        else:
            text, offsets, match, kept = self._push_each(tokens, len(text_tokens), ending)
            tokens = tokens[:kept]

        finish_reason, stop_reason = output.finish_reason, output.stop_reason
        if match is not None:
            finish_reason, stop_reason = FinishReason.STOP, match.stop
        self.finished = finish_reason is not None
        has_logprobs = output.logprobs is not None
        return TextDelta(
            request_id=output.request_id,
            index=output.index,
            text=text,
            token_ids=tokens,
            logprobs=output.logprobs[: len(tokens)] if output.logprobs is not None else None,
            text_offsets=offsets if has_logprobs else None,
            prompt_logprobs=output.prompt_logprobs,
            num_cached_tokens=output.num_cached_tokens,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            needs_abort=match is not None and not ending,
            error_kind=output.error_kind,
            error=output.error,
            timing=output.timing,
        )

    def _with_text(self, output: EngineOutput) -> list[int]:
        """The tokens whose text belongs to the answer: without a final stop or end-of-sequence token, unless it was
        asked for."""
        tokens = output.token_ids
        if output.finish_reason is FinishReason.STOP and tokens and not self._include_stop:
            last = tokens[-1]
            if last in self._end_ids or last == output.stop_reason:
                return tokens[:-1]
        return tokens

    def _push_each(
        self, tokens: list[int], num_with_text: int, ending: bool
    ) -> tuple[str, list[int], _Match | None, int]:
        """Token by token: (final text, offset of each token, stop string found, tokens kept)."""
        offsets: list[int] = []
        handed = ""
        match: _Match | None = None
        for position, token in enumerate(tokens):
            offsets.append(self._num_chars)
            self.num_tokens += 1
            new = self._detokenizer.push((token,)) if position < num_with_text else ""
            if ending and position == len(tokens) - 1:
                new += self._detokenizer.flush()
            piece, match = self._hold_back(new)
            handed += piece
            if match is not None:
                return handed, offsets, match, position + 1
        if ending:
            if not tokens:  # an abort or an error without a new token
                piece, match = self._hold_back(self._detokenizer.flush())
                handed += piece
            if match is None:
                handed += self._held
                self._held = ""
        return handed, offsets, match, len(tokens)

    def _hold_back(self, new: str) -> tuple[str, _Match | None]:
        """New text in, text that may be handed out and a stop string that ends in the new text out."""
        self._num_chars += len(new)
        if self._stops is None or not new:
            return new, None
        text = self._held + new
        if self.num_tokens > self._min_tokens:
            match = self._stops.find(text, len(self._held))
            if match is not None:
                kept = text[: match.end if self._include_stop else match.start]
                self._num_chars -= len(text) - len(kept)
                self._held = ""
                return kept, match
        num_held = self._stops.partial(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], None


class _Match(msgspec.Struct, frozen=True):
    start: int
    end: int
    stop: str


class _StopStrings:
    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(sorted(set(stops), key=len, reverse=True))  # longest first: wins ties
        self._prefixes = frozenset(stop[:length] for stop in stops for length in range(1, len(stop)))
        self._last_chars = frozenset(prefix[-1] for prefix in self._prefixes)
        self._longest_prefix = max(len(stop) for stop in stops) - 1

    def find(self, text: str, num_old: int) -> _Match | None:
        """The earliest, then longest, match in `text` that ends after its first `num_old` characters."""
        best: _Match | None = None
        for stop in self._stops:
            start = text.find(stop, max(0, num_old + 1 - len(stop)))
            if start >= 0 and (best is None or start < best.start):
                best = _Match(start, start + len(stop), stop)
        return best

    def partial(self, text: str) -> int:
        """Length of the longest suffix of `text` that begins some stop string without being the whole of it."""
        if text[-1] not in self._last_chars:
            return 0
        for length in range(min(self._longest_prefix, len(text)), 0, -1):
            if text[-length:] in self._prefixes:
                return length
        return 0
