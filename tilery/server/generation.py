"""One answer in the making: engine outputs in, pieces of text out, for all choices of all prompts of a request.

Engine requests are named ID for one prompt, ID-0, ID-1, ... for several; choice numbers run over prompts, then over n.
"""

from __future__ import annotations

import time
from types import TracebackType

from tilery.engine.client import EngineDeadError
from tilery.engine.messages import AddRequest, FinishReason, SamplingParams
from tilery.engine.output import OutputProcessor, TextDelta
from tilery.server.errors import ApiError, from_engine
from tilery.server.responses import PromptTokensDetails, Usage
from tilery.server.service import Service


class Choice:
    """One of the answers: its number, what it produced so far and when."""

    __slots__ = ("cached_tokens", "first_time", "index", "last_time", "params", "processor", "prompt_token_ids")

    def __init__(
        self, index: int, prompt_token_ids: list[int], params: SamplingParams, processor: OutputProcessor
    ) -> None:
        self.index = index
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.processor = processor
        self.cached_tokens = 0
        self.first_time = 0.0
        self.last_time = 0.0


Event = tuple[Choice, TextDelta]


class Generation:
    """Use it as a context manager (leaving it aborts what is unfinished) and iterate: lists of (choice, delta).

    Iterating raises `ApiError`: what the engine refused, or that it died.
    """

    def __init__(
        self,
        service: Service,
        id: str,
        prompts: list[tuple[list[int], SamplingParams]],
        priority: int,
        cache_salt: str | None,
    ) -> None:
        service.check_open()
        self.id = id
        self.service = service
        self.arrived = time.monotonic()
        self.request_ids = [id] if len(prompts) == 1 else [f"{id}-{number}" for number in range(len(prompts))]
        self.choices: list[Choice] = []
        self._by_request: dict[str, list[Choice]] = {}
        requests = []
        metrics = service.metrics
        for request_id, (token_ids, params) in zip(self.request_ids, prompts, strict=True):
            children = [
                Choice(
                    len(self.choices) + child, token_ids, params, OutputProcessor(service.tokenizer, params, token_ids)
                )
                for child in range(params.n)
            ]
            self.choices += children
            self._by_request[request_id] = children
            requests.append(
                AddRequest(
                    request_id=request_id,
                    prompt_token_ids=token_ids,
                    params=params,
                    priority=priority,
                    cache_salt=cache_salt,
                    arrival_time=self.arrived,
                )
            )
            metrics.prompt_lengths.observe(len(token_ids))
            metrics.choices.observe(params.n)
            metrics.max_tokens.observe(params.max_tokens or 0)
        self._unfinished = len(self.choices)
        try:
            self._stream = service.client.generate(*requests)
        except EngineDeadError:
            service.check_open()  # says it as a 503
            raise
        service.add(self)

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        self.service.remove(self)
        self.service.metrics.finished["abort"] += self._unfinished

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> list[Event]:
        while True:
            if not self._unfinished:
                raise StopAsyncIteration
            try:
                outputs = await self._stream.__anext__()
            except EngineDeadError as error:
                self.service.metrics.finished["error"] += self._unfinished
                self._unfinished = 0
                raise ApiError(503, f"The engine died: {error}") from None
            now = time.monotonic()
            events: list[Event] = []
            for output in outputs:
                choice = self._by_request[output.request_id][output.index]
                if output.finish_reason is FinishReason.ERROR:
                    self.service.metrics.finished["error"] += self._unfinished
                    self._unfinished = 0
                    raise from_engine(output, self.service.config.retry_after_seconds)
                delta = choice.processor.push(output)
                if delta is None:
                    continue
                if delta.num_cached_tokens:
                    choice.cached_tokens = delta.num_cached_tokens
                if choice.last_time != now:
                    self._clock(choice, now)
                if delta.finish_reason is not None:
                    self._finish(choice, delta, output.request_id, now)
                events.append((choice, delta))
            if events:
                return events

    def usage(self) -> Usage:
        prompts = {id(choice.prompt_token_ids): choice for choice in self.choices}.values()
        prompt = sum(len(choice.prompt_token_ids) for choice in prompts)
        completion = sum(choice.processor.num_tokens for choice in self.choices)
        cached = sum(choice.cached_tokens for choice in prompts)
        return Usage(prompt, completion, prompt + completion, PromptTokensDetails(cached))

    def _clock(self, choice: Choice, now: float) -> None:
        """One gap per turn: tokens that arrived together (speculation, or a reader that lagged) have none between."""
        if choice.last_time:
            self.service.metrics.itl.observe(now - choice.last_time)
        else:
            choice.first_time = now
            self.service.metrics.ttft.observe(now - self.arrived)
        choice.last_time = now

    def _finish(self, choice: Choice, delta: TextDelta, request_id: str, now: float) -> None:
        assert delta.finish_reason is not None
        self._unfinished -= 1
        metrics = self.service.metrics
        tokens = choice.processor.num_tokens
        metrics.finished[delta.finish_reason.value] += 1
        metrics.e2e.observe(now - self.arrived)
        metrics.output_lengths.observe(tokens)
        if tokens > 1:
            metrics.tpot.observe((now - choice.first_time) / (tokens - 1))
        siblings = self._by_request[request_id]
        if delta.needs_abort:  # the engine does not know of the stop string that ended it
            if all(sibling.processor.finished for sibling in siblings):
                self._stream.drop(request_id)
            else:
                self.service.client.abort_choice(request_id, choice.index - siblings[0].index)
