"""Log-probabilities as the two OpenAI endpoints show them, and vLLM's prompt_logprobs.

Minus infinity has no JSON form: such values are shown as -9999.0, as vLLM does.
"""

from __future__ import annotations

from collections.abc import Sequence

from tilery.engine.messages import TokenLogprobs
from tilery.engine.tokenizer import Tokenizer
from tilery.server.responses import (
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)

FLOOR = -9999.0


def completion_logprobs(
    tokenizer: Tokenizer, positions: Sequence[TokenLogprobs | None], offsets: Sequence[int], token_ids: Sequence[int]
) -> CompletionLogprobs:
    """The arrays of /v1/completions; the chosen token is among the top ones. None: the prompt's first position."""
    tokens = [tokenizer.token_text(token) for token in token_ids]
    return CompletionLogprobs(
        text_offset=list(offsets),
        token_logprobs=[None if position is None else max(position.logprob, FLOOR) for position in positions],
        tokens=tokens,
        top_logprobs=[None if position is None else _top_by_text(tokenizer, position) for position in positions],
    )


def _top_by_text(tokenizer: Tokenizer, position: TokenLogprobs) -> dict[str, float]:
    result: dict[str, float] = {}
    for token, logprob in zip(position.top_ids, position.top_logprobs, strict=True):
        result.setdefault(tokenizer.token_text(token), max(logprob, FLOOR))
    result.setdefault(tokenizer.token_text(position.token_id), max(position.logprob, FLOOR))
    return result


def chat_logprobs(tokenizer: Tokenizer, positions: Sequence[TokenLogprobs]) -> ChatLogprobs:
    content = []
    for position in positions:
        top = [
            TopLogprob(tokenizer.token_text(token), max(logprob, FLOOR), list(tokenizer.token_bytes(token)))
            for token, logprob in zip(position.top_ids, position.top_logprobs, strict=True)
        ]
        text, raw = tokenizer.token_text(position.token_id), tokenizer.token_bytes(position.token_id)
        content.append(ChatLogprob(text, max(position.logprob, FLOOR), list(raw), top))
    return ChatLogprobs(content)


def prompt_logprobs(tokenizer: Tokenizer, positions: Sequence[TokenLogprobs | None]) -> PromptLogprobs:
    """vLLM's form: per position a map from token id to its values, the actual token first."""
    result: PromptLogprobs = []
    for position in positions:
        if position is None:
            result.append(None)
            continue
        ids = (position.token_id, *position.top_ids)
        logprobs = (position.logprob, *position.top_logprobs)
        ranks = (position.rank, *range(1, len(position.top_ids) + 1))
        entries: dict[str, PromptLogprob] = {}
        for token, logprob, rank in zip(ids, logprobs, ranks, strict=True):
            entries.setdefault(str(token), PromptLogprob(max(logprob, FLOOR), rank, tokenizer.token_text(token)))
        result.append(entries)
    return result
