"""What crosses a process boundary: sampling parameters, requests, outputs, statistics.

Every hand-off is a frozen msgspec struct, encoded as MessagePack (no pickle on any socket). This module imports
neither torch nor anything else of the package, so that the API process stays small.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class StructuredKind(StrEnum):
    """What constrains the text: the five kinds that vLLM's `structured_outputs` knows."""

    JSON_SCHEMA = "json_schema"  # spec: a JSON schema as text
    JSON_OBJECT = "json_object"  # spec: ignored; any JSON object
    REGEX = "regex"  # spec: a regular expression matched against the whole text
    CHOICE = "choice"  # spec: a JSON array of strings as text
    GRAMMAR = "grammar"  # spec: a Lark grammar as llguidance reads it


class FinishReason(StrEnum):
    STOP = "stop"  # a stop token, stop string or end-of-sequence token
    LENGTH = "length"  # max_tokens or the context limit
    ABORT = "abort"  # the client went away or asked for it
    ERROR = "error"  # refused or failed; `EngineOutput.error` says why


class ErrorKind(StrEnum):
    """Why the engine refused or failed a request; the server maps it to an HTTP status."""

    INVALID = "invalid"  # 400: the request can never be served as written
    OVERLOADED = "overloaded"  # 503 with Retry-After: the queue is full
    INTERNAL = "internal"  # 500: a bug; the engine goes on without this request


class StructuredOutput(msgspec.Struct, frozen=True, kw_only=True):
    kind: StructuredKind
    spec: str = ""
    compact: bool = True
    """JSON without free whitespace (weak models otherwise spend their budget on blanks)."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose the next token. Names, defaults and meaning follow the OpenAI API, then vLLM.

    Raises `ValueError` on construction with the field, its value and the allowed range.
    """

    n: int = 1
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: no limit."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output; above 1 discourages repetition."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    """None: up to the context limit."""
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    """Number of alternatives per output token; 0: only the chosen token's; None: off."""
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured: StructuredOutput | None = None

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}.")

        need(self.n >= 1, "n", "at least 1")
        need(0.0 <= self.temperature <= 100.0, "temperature", "between 0 and 100")
        need(0.0 < self.top_p <= 1.0, "top_p", "in (0, 1]")
        need(self.top_k >= -1, "top_k", "-1 (off), 0 (off) or a positive number")
        need(0.0 <= self.min_p <= 1.0, "min_p", "in [0, 1]")
        need(0.0 < self.repetition_penalty <= 100.0, "repetition_penalty", "above 0 and at most 100")
        need(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "in [-2, 2]")
        need(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "in [-2, 2]")
        need(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1")
        need(self.min_tokens >= 0, "min_tokens", "at least 0")
        need(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"at most max_tokens ({self.max_tokens})",
        )
        need(self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs", "between 0 and 20")
        need(self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 20, "prompt_logprobs", "between 0 and 20")
        need(all(self.stop), "stop", "a list of non-empty strings")
        need(
            all(-100.0 <= value <= 100.0 for value in (self.logit_bias or {}).values()),
            "logit_bias",
            "a map of token ids to numbers in [-100, 100]",
        )
        need(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5


# ---- API process -> engine process -------------------------------------------------------------------------------


class AddRequest(msgspec.Struct, frozen=True, kw_only=True, tag="add"):
    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    """Lower runs earlier, as in vLLM; waiting requests age upwards."""
    cache_salt: str | None = None
    """Requests share prefix-cache blocks only with requests of the same salt."""
    arrival_time: float = 0.0
    """`time.monotonic()` at the API."""


class AbortRequests(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    request_ids: list[str]
    """Unknown ids are ignored (they may have finished). Each unfinished child answers once with FinishReason.ABORT."""


class AbortChoice(msgspec.Struct, frozen=True, kw_only=True, tag="abort_choice"):
    """Ends one choice of a request; its siblings go on. It answers like an aborted request."""

    request_id: str
    index: int


class Call(msgspec.Struct, frozen=True, kw_only=True, tag="call"):
    """An administrative call, answered by a `Reply` of the same id: "reset_prefix_cache", "stats", "ping"."""

    call_id: int
    name: str


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Stop at once; running requests are answered with FinishReason.ABORT."""


Command = AddRequest | AbortRequests | AbortChoice | Call | Shutdown


# ---- engine process -> API process -------------------------------------------------------------------------------


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """One position: the token that stands there, its log-probability and rank, and the most likely alternatives.

    Values come from the model's raw logits (before temperature, penalties and masks), as in vLLM.
    """

    token_id: int
    logprob: float
    rank: int
    """1 is the most likely token."""
    top_ids: list[int]
    top_logprobs: list[float]


class RequestTiming(msgspec.Struct, frozen=True, array_like=True):
    """`time.monotonic()` at each stage of one child; all clocks are those of this host."""

    arrived: float
    scheduled: float
    first_token: float
    finished: float
    preemptions: int


class EngineOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step produced for one child (choice `index`) of one request."""

    request_id: str
    index: int = 0
    token_ids: list[int] = []
    """New tokens, a stop or end-of-sequence token included."""
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """Once, with the first token; None for the first position."""
    num_cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache; said with the first token."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token id that ended it, if one of `stop_token_ids` did; stop strings are found by `output.py`."""
    error_kind: ErrorKind | None = None
    error: str | None = None
    timing: RequestTiming | None = None
    """With the finish reason."""


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges are the present state; counters grow from the engine's start."""

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    """Blocks held by requests; cached but free blocks do not count."""
    kv_blocks_total: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    refused: int = 0
    spec_drafts: int = 0
    spec_draft_tokens: int = 0
    spec_accepted_tokens: int = 0
    spec_accepted_per_position: list[int] = []
    spec_disabled: bool = False
    """Speculative decoding switched itself off because it was losing."""
    dense_steps: int = 0
    """Steps in which every context was at most index_topk, so that the indexer did not score."""
    last_step_tokens: int = 0
    last_step_seconds: float = 0.0


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the API needs to know of the engine before it takes requests."""

    model: str
    dtype: str
    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    cache_dtype: str
    eos_token_ids: list[int]
    speculative_tokens: int
    version: str


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    info: EngineInfo


class Outputs(msgspec.Struct, frozen=True, kw_only=True, tag="outputs"):
    outputs: list[EngineOutput]
    stats: EngineStats


class Reply(msgspec.Struct, frozen=True, kw_only=True, tag="reply"):
    call_id: int
    ok: bool
    value: str = ""
    """JSON text or an error message."""


class Dead(msgspec.Struct, frozen=True, kw_only=True, tag="dead"):
    """The engine's last word: it cannot go on. Losing the process without this word means the same."""

    error: str


Event = Ready | Outputs | Reply | Dead
