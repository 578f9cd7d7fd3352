"""One choice of a client's request, as the scheduler, the cache and the runner see it.

A request is its tokens (prompt, then output: append-only) and one number, `num_computed`: how many of them have valid
rows in the KV cache. Serving it means letting `num_computed` catch up with `num_tokens`; the last position to be
computed yields the next token. Prefill, decode, prefix hits, preemption and drafts are all special cases:

    prompt_token_ids        output_token_ids      draft_token_ids
    |-----------------------|---------------------|--------------|
    0          ^ num_computed          num_tokens ^              ^ num_tokens_with_drafts
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from tilery.engine.messages import FinishReason, RequestTiming, SamplingParams


class RequestState(Enum):
    WAITING = "waiting"  # holds no blocks: new, or preempted
    RUNNING = "running"  # holds blocks, gets tokens in every step
    FINISHED = "finished"  # holds no blocks, will never run again


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """Child `index` of the client's request `request_id`. Compared and hashed by identity.

    The scheduler and the KV cache write the fields of the two lower groups; everybody else only reads those.
    """

    request_id: str
    index: int = 0
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    """Lower runs earlier."""
    cache_salt: str | None = None
    arrival_time: float = 0.0
    """`time.monotonic()` seconds, as all times here."""
    seed: int = 0
    """The sampling seed in force, also when the client gave none."""
    first_token_time: float = 0.0
    finished_time: float = 0.0

    # Written by the scheduler.
    state: RequestState = RequestState.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    draft_token_ids: list[int] = field(default_factory=list)
    """Speculative tokens to verify in the next step."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache supplied when the request was scheduled first."""
    token_limit: int = 0
    """Prompt and output together end here: max_tokens, the context limit or the cache size, whichever is least."""
    order: tuple[float, float, int] = (0.0, 0.0, 0)
    """Total order of service, least first; fixed when the request is added."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    scheduled_time: float = 0.0
    preemptions: int = 0

    # Written by the KV cache (the scheduler moves num_computed on).
    num_computed: int = 0
    """Leading tokens whose cache rows are valid."""
    block_table: list[int] = field(default_factory=list)
    """Block ids: position p lies in row p % block_size of block_table[p // block_size]."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Content hashes of the leading full blocks, as far as they were needed; survives preemption."""
    num_committed: int = 0
    """Leading blocks of the table that were already offered to the prefix index."""

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens_with_drafts(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids) + len(self.draft_token_ids)

    @property
    def is_prefilling(self) -> bool:
        """More than the newest token is still to be computed."""
        return self.num_computed < len(self.prompt_token_ids) + len(self.output_token_ids) - 1

    @property
    def is_finished(self) -> bool:
        return self.state is RequestState.FINISHED

    @property
    def at_limit(self) -> bool:
        """No further token may be generated: whoever drives the scheduler must finish the request."""
        return self.num_tokens >= self.token_limit

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Every prompt position has to be computed, so the prefix cache may not supply any."""
        return self.params.prompt_logprobs is not None

    def token_at(self, position: int) -> int:
        return self.token_ids(position, position + 1)[0]

    def token_ids(self, start: int, stop: int) -> list[int]:
        """The tokens at positions [start, stop) of prompt, output and drafts. Raises `IndexError` outside these."""
        if not 0 <= start <= stop <= self.num_tokens_with_drafts:
            raise IndexError(f"Positions [{start}, {stop}) are not within [0, {self.num_tokens_with_drafts}).")
        tokens = self.prompt_token_ids[start:stop]
        for part, offset in (
            (self.output_token_ids, len(self.prompt_token_ids)),
            (self.draft_token_ids, self.num_tokens),
        ):
            if stop > offset:
                tokens += part[max(start - offset, 0) : stop - offset]
        return tokens

    def timing(self) -> RequestTiming:
        return RequestTiming(
            arrived=self.arrival_time,
            scheduled=self.scheduled_time,
            first_token=self.first_token_time,
            finished=self.finished_time,
            preemptions=self.preemptions,
        )
