"""The engine's heart: `add`, `abort`, `step`. Synchronous, single-threaded, no sockets.

A step is three lines: schedule, run, take in the results. Everything a client will see of a step is in the list of
`EngineOutput`s it returns.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import torch
from torch import Tensor

import tilery
from tilery.engine import sampler
from tilery.engine.config import EngineConfig
from tilery.engine.kv_cache import KVCache
from tilery.engine.messages import (
    AddRequest,
    EngineInfo,
    EngineOutput,
    EngineStats,
    ErrorKind,
    FinishReason,
    TokenLogprobs,
)
from tilery.engine.request import Request
from tilery.engine.runner import DraftInput, Runner
from tilery.engine.sampler import FAILED, SampleRow, SamplerState
from tilery.engine.scheduler import RequestRefused, Schedule, ScheduledItem, Scheduler
from tilery.engine.speculation import DraftPolicy, MtpBacklog

if TYPE_CHECKING:
    from tilery.engine.grammar import Grammar, GrammarCompiler, GrammarState

PROMPT_LOGPROB_ROWS = 256
"""Prompt log-probabilities are computed over so many positions at a time, to bound memory."""
COMPILE_POLL_SECONDS = 0.005
"""How long a step with nothing else to do waits for a grammar to compile."""


@dataclass(slots=True)
class _Child:
    """What the core keeps beside a scheduled request."""

    request: Request
    sampler: SamplerState
    grammar: GrammarState | None
    mtp: MtpBacklog = field(default_factory=MtpBacklog)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    told_prompt: bool = False


@dataclass(slots=True)
class _Pending:
    """A request not handed to the scheduler yet: its grammar compiles, or siblings wait for the first choice's
    prompt."""

    message: AddRequest
    seed: int
    grammar: Future[Grammar] | None
    next_index: int = 0
    first: Request | None = None
    aborted: set[int] = field(default_factory=set)
    """Choices that were ended before their turn came; they have been answered."""

    @property
    def unanswered(self) -> list[int]:
        """Choices that the scheduler has not seen and the client has had no answer for."""
        return [index for index in range(self.next_index, self.message.params.n) if index not in self.aborted]


@dataclass(slots=True)
class _Result:
    """What comes of one scheduled item, filled in as the step goes on."""

    item: ScheduledItem
    child: _Child
    hidden: Tensor
    """[length, H]."""
    tokens: list[int] = field(default_factory=list)
    """New tokens, in order; none while the prompt is being read."""
    logprobs: list[TokenLogprobs] | None = None
    finish: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None
    num_valid: int = 0
    """Positions of the item whose cache rows are valid: all but those of rejected drafts."""


class EngineCore:
    """One model, one cache, many requests. Raises what `Runner` raises when it is made."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.runner = Runner(config)
        model = self.runner.model_config
        capacity = self.runner.num_blocks * config.block_size
        self.max_model_len = config.max_model_len or min(model.max_position_embeddings, capacity)
        if self.max_model_len > model.max_position_embeddings:
            raise ValueError(
                f"max_model_len ({self.max_model_len}) is more than the model was made for "
                f"(max_position_embeddings is {model.max_position_embeddings})."
            )
        if self.max_model_len > capacity:
            raise ValueError(
                f"max_model_len ({self.max_model_len}) is more than the cache holds ({capacity} tokens); raise "
                "cache_tokens or lower max_model_len."
            )
        self.cache = KVCache(self.runner.num_blocks, config.block_size, config.cache_salt, config.enable_prefix_cache)
        self.scheduler = Scheduler(config, self.cache, self.max_model_len)
        self.eos_token_ids = list(model.eos_token_ids)
        self.info = EngineInfo(
            model=self.runner.folder.name,
            dtype=config.dtype.value,
            vocab_size=model.vocab_size,
            max_model_len=self.max_model_len,
            block_size=config.block_size,
            num_blocks=self.runner.num_blocks,
            cache_dtype=self.runner.cache_kind.value,
            eos_token_ids=self.eos_token_ids,
            speculative_tokens=config.speculative_tokens,
            version=tilery.__version__,
        )
        self.policy = DraftPolicy(config.speculative_auto_off)
        self._children: dict[Request, _Child] = {}
        self._pending: dict[str, _Pending] = {}
        self._served: Counter[str] = Counter()
        """Children by request id: an id is free again when the last of them and the pending ones are gone."""
        self._outputs: list[EngineOutput] = []
        self._compiler: GrammarCompiler | None = None
        self._added = itertools.count(1)
        self._steps = self._dense_steps = self._prompt_tokens = self._generation_tokens = self._refused = 0
        self._drafts = self._draft_tokens = self._accepted = 0
        self._accepted_at = [0] * config.speculative_tokens
        self._last = (0, 0.0)

    # ---- what the outside may do ---------------------------------------------------------------------------------

    def add(self, message: AddRequest) -> None:
        """Takes a request; a refusal comes out of the next `step` as FinishReason.ERROR for each of its choices."""
        params = message.params
        seed = params.seed if params.seed is not None else self._fresh_seed()
        outside = [t for t in message.prompt_token_ids if not 0 <= t < self.info.vocab_size]
        if outside:
            self._refuse(
                message,
                ErrorKind.INVALID,
                f"The prompt holds token {outside[0]}, but token ids go from 0 to {self.info.vocab_size - 1}.",
            )
            return
        if message.request_id in self._pending or self._served[message.request_id]:
            self._refuse(message, ErrorKind.INVALID, f"Request id {message.request_id} is already in use.")
            return
        grammar = None
        if params.structured is not None:
            try:
                grammar = self._grammar_compiler().submit(params.structured)
            except ValueError as error:
                self._refuse(message, ErrorKind.INVALID, str(error))
                return
        self._pending[message.request_id] = _Pending(message, seed, grammar)
        self._admit_pending(message.request_id)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Ends requests; each unfinished choice answers once, in the next step's outputs. Unknown ids are ignored."""
        for request_id in request_ids:
            for request in self.scheduler.abort(request_id):
                self._finished(request, [])
            pending = self._pending.pop(request_id, None)
            for index in pending.unanswered if pending is not None else ():
                self._outputs.append(EngineOutput(request_id=request_id, index=index, finish_reason=FinishReason.ABORT))

    def abort_child(self, request_id: str, index: int) -> None:
        """Ends one choice of a request; its siblings go on."""
        for request in self.scheduler.abort(request_id, index):
            self._finished(request, [])
        pending = self._pending.get(request_id)
        if pending is not None and index in pending.unanswered:
            pending.aborted.add(index)
            self._outputs.append(EngineOutput(request_id=request_id, index=index, finish_reason=FinishReason.ABORT))

    def has_work(self) -> bool:
        return bool(self._outputs or self._pending or self.scheduler.has_unfinished)

    def step(self) -> list[EngineOutput]:
        """Computes one batch of tokens, if there is any, and returns what it brought."""
        for request_id in list(self._pending):
            self._admit_pending(request_id)
        started = time.monotonic()
        schedule = self.scheduler.schedule(started)
        if schedule.items:
            self._compute(schedule, started)
        elif self._pending and not self._outputs:
            time.sleep(COMPILE_POLL_SECONDS)
        outputs, self._outputs = self._outputs, []
        return outputs

    def stats(self) -> EngineStats:
        scheduler = self.scheduler.stats
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting) + len(self._pending),
            kv_blocks_used=self.cache.num_used,
            kv_blocks_total=self.cache.num_blocks,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_query_tokens=scheduler.prefix_query_tokens,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            preemptions=scheduler.preemptions,
            refused=self._refused,
            spec_drafts=self._drafts,
            spec_draft_tokens=self._draft_tokens,
            spec_accepted_tokens=self._accepted,
            spec_accepted_per_position=list(self._accepted_at),
            spec_disabled=self.policy.disabled,
            dense_steps=self._dense_steps,
            last_step_tokens=self._last[0],
            last_step_seconds=self._last[1],
        )

    def reset_prefix_cache(self) -> bool:
        """Forgets cached prefixes; False while a request holds blocks."""
        return self.cache.reset_prefix_cache()

    def check(self) -> None:
        """Verifies the books; for tests. Raises `AssertionError`."""
        self.scheduler.check()
        assert set(self._children) == {*self.scheduler.running, *self.scheduler.waiting}, "children and queues differ"

    # ---- admission -----------------------------------------------------------------------------------------------

    def _fresh_seed(self) -> int:
        if self.config.seed:
            return sampler.child_seed(self.config.seed, next(self._added))
        return int.from_bytes(os.urandom(8), "little") >> 1

    def _grammar_compiler(self) -> GrammarCompiler:
        if self._compiler is None:
            from tilery.engine.grammar import GrammarCompiler

            path = self.runner.folder / "tokenizer.json"
            if not path.is_file():
                raise ValueError("Structured output needs the model's tokenizer.json, which its folder lacks.")
            self._compiler = GrammarCompiler(path.read_text(encoding="utf-8"), self.info.vocab_size, self.eos_token_ids)
        return self._compiler

    def _refuse(self, message: AddRequest, kind: ErrorKind, text: str, choices: Sequence[int] | None = None) -> None:
        """Answers for these choices of a request, or for all."""
        self._refused += 1
        for index in range(message.params.n) if choices is None else choices:
            self._outputs.append(
                EngineOutput(
                    request_id=message.request_id,
                    index=index,
                    finish_reason=FinishReason.ERROR,
                    error_kind=kind,
                    error=text,
                )
            )

    def _admit_pending(self, request_id: str) -> None:
        """Hands children to the scheduler: the first when its grammar is ready, the others once they can share the
        first one's prompt blocks."""
        pending = self._pending[request_id]
        message = pending.message
        if pending.grammar is not None and not pending.grammar.done():
            return
        try:
            grammar = pending.grammar.result() if pending.grammar is not None else None
            while unanswered := pending.unanswered:
                pending.next_index = unanswered[0]
                if pending.first is not None and not self._may_follow(pending.first):
                    return
                self._add_child(message, pending, grammar)
                pending.next_index += 1
        except RequestRefused as refusal:
            self._refuse(message, refusal.kind, refusal.message, pending.unanswered)
        except ValueError as error:
            self._refuse(message, ErrorKind.INVALID, str(error), pending.unanswered)
        except Exception as error:  # of the grammar compiler: it must not take other requests along
            self._refuse(message, ErrorKind.INTERNAL, f"{type(error).__name__}: {error}", pending.unanswered)
        del self._pending[request_id]

    def _may_follow(self, first: Request) -> bool:
        """Whether a sibling of `first` may enter: it can share the prompt, and the queue, which took the request in
        with its first choice, has room."""
        if len(self.scheduler.waiting) >= self.config.max_waiting:
            return False
        done = first.is_finished or first.num_computed >= first.num_prompt_tokens
        return done or not self.config.enable_prefix_cache

    def _add_child(self, message: AddRequest, pending: _Pending, grammar: Grammar | None) -> None:
        index = pending.next_index
        seed = sampler.child_seed(pending.seed, index)
        request = Request(
            request_id=message.request_id,
            index=index,
            prompt_token_ids=message.prompt_token_ids,
            params=message.params,
            priority=message.priority,
            cache_salt=message.cache_salt,
            arrival_time=message.arrival_time or time.monotonic(),
            seed=seed,
        )
        state = SamplerState(
            message.params,
            seed=seed,
            prompt_token_ids=message.prompt_token_ids,
            eos_token_ids=self.eos_token_ids,
            vocab_size=self.info.vocab_size,
        )
        self.scheduler.add(request)
        self._served[request.request_id] += 1
        pending.first = pending.first or request
        self._children[request] = _Child(request, state, grammar.start() if grammar is not None else None)

    # ---- a step's results ----------------------------------------------------------------------------------------

    def _compute(self, schedule: Schedule, started: float) -> None:
        hidden = self.runner.forward(schedule.items)
        results = [
            _Result(item, self._children[item.request], part, num_valid=item.length - item.num_drafts)
            for item, part in zip(schedule.items, hidden)
        ]
        self._sample(results)
        for result in results:
            self._read_prompt(result)
            self._end(result)
            self._follow_grammar(result)
        decoding = sum(result.item.yields_token for result in results)
        pure = all(item.yields_token and item.length == 1 + item.num_drafts for item in schedule.items)
        drafted = any(item.num_drafts for item in schedule.items)
        drafts: dict[Request, list[int]] = {}
        if self.runner.speculates:
            for result in results:
                result.child.mtp.add(result.item.start, result.hidden[: result.num_valid])
            if self.policy.use_drafts(decoding) if pure else not self.policy.disabled:
                drafts = self._draft(results)
        now = time.monotonic()
        for result in results:
            self._count(result)
            self._advance(result, drafts.get(result.item.request, []), now)
        if pure and drafted == bool(drafts) and self.runner.speculates:
            self.policy.record(decoding, drafted, now - started, sum(len(result.tokens) for result in results))
        self._steps += 1
        model = self.runner.model_config
        self._dense_steps += not model.sparse or all(i.start + i.length <= model.index_topk for i in schedule.items)
        self._last = (schedule.num_tokens, now - started)

    def _sample(self, results: list[_Result]) -> None:
        """Draws the new tokens of every item that yields some: accepted drafts and one more."""
        rows: list[SampleRow] = []
        hidden, spans = [], []
        for result in results:
            if not result.item.yields_token:
                continue
            item, child = result.item, result.child
            drafts = item.request.draft_token_ids[: item.num_drafts]
            if child.grammar is None:
                made = [SampleRow(child.sampler, drafts[:i]) for i in range(len(drafts) + 1)]
            else:
                try:
                    masks = child.grammar.masks_for_drafts(drafts)
                except ValueError as error:  # GrammarError: the text ran into the limits on work per token
                    result.finish, result.error = FinishReason.ERROR, str(error)
                    continue
                made = [SampleRow(child.sampler, drafts[:i], mask) for i, mask in enumerate(masks)]
            first = item.length - item.num_drafts - 1
            hidden.append(result.hidden[first : first + len(made)])
            spans.append((result, drafts, slice(len(rows), len(rows) + len(made))))
            rows += made
        if not rows:
            return
        sampled = sampler.sample(self.runner.logits(hidden), rows)
        for result, drafts, span in spans:
            tokens = sampler.accept_drafts(sampled.token_ids[span], drafts)
            if tokens[-1] == FAILED:
                tokens.pop()
                result.finish = FinishReason.ERROR
                result.error = sampled.errors[span.start + len(tokens)]
            result.tokens = tokens
            result.num_valid += max(len(tokens) - 1, 0)
            if result.item.request.params.logprobs is not None:
                result.logprobs = [row for row in sampled.logprobs[span][: len(tokens)] if row is not None]

    def _read_prompt(self, result: _Result) -> None:
        """Log-probabilities of the prompt tokens that this chunk's positions predict."""
        request, item, known = result.item.request, result.item, result.child.prompt_logprobs
        n = request.params.prompt_logprobs
        first, stop = len(known) - 1, min(item.start + item.length, request.num_prompt_tokens - 1)
        if n is None or first < item.start:
            return
        for start in range(first, stop, PROMPT_LOGPROB_ROWS):
            end = min(start + PROMPT_LOGPROB_ROWS, stop)
            logits = self.runner.logits([result.hidden[start - item.start : end - item.start]])
            known += sampler.prompt_logprobs(logits, request.prompt_token_ids[start + 1 : end + 1], n)

    def _end(self, result: _Result) -> None:
        """Finds out whether the new tokens end the request, and drops those behind the end."""
        request = result.item.request
        params = request.params
        for position, token in enumerate(result.tokens):
            stops = token in params.stop_token_ids
            if stops or (token in self.eos_token_ids and not params.ignore_eos):
                result.finish = FinishReason.STOP
                result.stop_reason = token if stops else None
            elif request.num_tokens + position + 1 >= request.token_limit:
                result.finish = FinishReason.LENGTH
            else:
                continue
            result.error = None
            result.tokens = result.tokens[: position + 1]
            result.logprobs = result.logprobs and result.logprobs[: position + 1]
            return

    def _follow_grammar(self, result: _Result) -> None:
        """Moves the grammar on to the new tokens; a text it cannot follow fails this request alone."""
        grammar = result.child.grammar
        if grammar is None or not result.tokens or result.finish is not None:
            return
        try:
            grammar.consume(result.tokens)
        except ValueError as error:  # GrammarError
            result.finish, result.error = FinishReason.ERROR, str(error)

    def _draft(self, results: list[_Result]) -> dict[Request, list[int]]:
        """Lets the MTP layer read what is new and propose tokens for the requests that go on."""
        inputs: list[DraftInput] = []
        readers: list[_Result] = []
        for result in results:
            backlog, request = result.child.mtp, result.item.request
            if result.finish is not None or backlog.lost:
                continue
            tokens = request.token_ids(backlog.start, request.num_tokens) + result.tokens
            hidden = backlog.hidden[0] if len(backlog.hidden) == 1 else torch.cat(backlog.hidden)
            next_ids = tokens[1 : 1 + hidden.shape[0]]
            inputs.append(DraftInput(hidden, next_ids, backlog.start, request.block_table))
            readers.append(result)
            backlog.clear()
        if not inputs:
            return {}
        drafts: dict[Request, list[int]] = {}
        for depth in range(1, self.config.speculative_tokens + 1):
            tokens, hidden_states = self.runner.draft(inputs)
            inputs, kept = [], []
            for result, token, hidden in zip(readers, tokens, hidden_states):
                request = result.item.request
                if not result.tokens:
                    continue  # still reading its prompt
                drafts.setdefault(request, []).append(token)
                # One token further: the layer's own output stands for the hidden state, its row is provisional.
                position = request.num_tokens + len(result.tokens) - 1 + depth - 1
                if self.cache.allocate(request, position + 1) and position + 1 < self.max_model_len:
                    inputs.append(DraftInput(hidden, [token], position, request.block_table))
                    kept.append(result)
            readers = kept
            if not inputs:
                break
        return drafts

    def _count(self, result: _Result) -> None:
        item = result.item
        if item.num_drafts:
            accepted = result.num_valid - (item.length - item.num_drafts)
            self._drafts += 1
            self._draft_tokens += item.num_drafts
            self._accepted += accepted
            for position in range(accepted):
                self._accepted_at[position] += 1
        self._generation_tokens += len(result.tokens)
        if result.tokens and not item.request.output_token_ids:
            self._prompt_tokens += item.request.num_prompt_tokens

    def _advance(self, result: _Result, drafts: list[int], now: float) -> None:
        """Books the result with the scheduler and tells the client."""
        item, child, tokens = result.item, result.child, result.tokens
        request = item.request
        if tokens and not request.output_token_ids:
            request.first_token_time = now
        self.scheduler.advance(item, result.num_valid, tokens, drafts)
        child.mtp.trim()
        child.sampler.append(tokens)
        if result.finish is not None:
            if result.finish is FinishReason.ERROR:
                self.cache.discard(request)  # its rows may hold what made it fail: let nobody share them
            self.scheduler.finish(request, result.finish, result.stop_reason)
            self._finished(request, tokens, result.logprobs, result.error)
        elif tokens:
            self._outputs.append(self._output(child, tokens, result.logprobs))

    def _output(
        self, child: _Child, tokens: Sequence[int], logprobs: list[TokenLogprobs] | None = None
    ) -> EngineOutput:
        request = child.request
        first = not child.told_prompt
        child.told_prompt = True
        wanted = first and request.params.prompt_logprobs is not None
        whole = len(child.prompt_logprobs) == request.num_prompt_tokens  # not if it ends before its first token
        return EngineOutput(
            request_id=request.request_id,
            index=request.index,
            token_ids=list(tokens),
            logprobs=logprobs,
            prompt_logprobs=child.prompt_logprobs if wanted and whole else None,
            num_cached_tokens=request.num_cached_tokens if first else 0,
        )

    def _finished(
        self,
        request: Request,
        tokens: Sequence[int],
        logprobs: list[TokenLogprobs] | None = None,
        error: str | None = None,
    ) -> None:
        """The last output of a request that the scheduler has let go."""
        child = self._children.pop(request)
        self._served[request.request_id] -= 1
        if not self._served[request.request_id]:
            del self._served[request.request_id]
        request.finished_time = time.monotonic()
        self._outputs.append(
            msgspec.structs.replace(
                self._output(child, tokens, logprobs),
                finish_reason=request.finish_reason,
                stop_reason=request.stop_reason,
                error_kind=ErrorKind.INTERNAL if error else None,
                error=error,
                timing=request.timing(),
            )
        )
