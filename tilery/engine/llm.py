"""Offline generation: the engine in this process, a list of prompts in, a list of answers out."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence

import msgspec

from tilery.engine.config import EngineConfig
from tilery.engine.core import EngineCore
from tilery.engine.messages import (
    AddRequest,
    EngineOutput,
    EngineStats,
    FinishReason,
    RequestTiming,
    SamplingParams,
    TokenLogprobs,
)
from tilery.engine.output import OutputProcessor
from tilery.engine.tokenizer import Tokenizer
from tilery.models.config import DEFAULT_MODEL

Prompt = str | Sequence[int]


class CompletionOutput(msgspec.Struct, kw_only=True):
    """One choice. `token_ids` includes a stop or end-of-sequence token, `text` does not."""

    index: int
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    timing: RequestTiming | None = None


class RequestOutput(msgspec.Struct, kw_only=True):
    """One prompt's answer, `n` choices in order."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0


class GenerationError(RuntimeError):
    """The engine refused or failed a request; the message says why."""


class LLM:
    """A model, ready to generate.

    `model` is a checkpoint folder or a bundled model's name; the keywords are `EngineConfig`'s fields. Raises
    `ValueError` (and its kinds `ConfigError`, `CheckpointError`) for a model or settings that do not fit.

        llm = LLM()
        llm.generate("It was a dark night", SamplingParams(max_tokens=40))[0].outputs[0].text
    """

    def __init__(self, model: str = DEFAULT_MODEL, **settings: object) -> None:
        self.core = EngineCore(msgspec.convert({"model": model, **settings}, EngineConfig))
        self.tokenizer = Tokenizer.load(self.core.runner.folder, eos_token_ids=self.core.eos_token_ids)
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answers every prompt (text, or token ids) and returns the answers in the prompts' order.

        `params` is one for all or one per prompt; None samples 16 tokens at temperature 1. A progress bar shows on a
        terminal. Raises `GenerationError` for a prompt the engine refuses (the others of the call are dropped too).
        """
        listed = _listed(prompts)
        many = [params or SamplingParams()] * len(listed) if not isinstance(params, Sequence) else list(params)
        if len(many) != len(listed):
            raise ValueError(f"got {len(listed)} prompts but {len(many)} sampling parameters; give one or as many.")
        answers: dict[str, RequestOutput] = {}
        readers: dict[tuple[str, int], OutputProcessor] = {}
        requests: list[AddRequest] = []
        for prompt, one in zip(listed, many):
            name = f"offline-{next(self._ids)}"
            ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            answers[name] = RequestOutput(
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_token_ids=ids,
                outputs=[CompletionOutput(index=index) for index in range(one.n)],
            )
            for index in range(one.n):
                readers[name, index] = OutputProcessor(self.tokenizer, one, ids)
            requests.append(
                AddRequest(request_id=name, prompt_token_ids=ids, params=one, arrival_time=time.monotonic())
            )
        try:
            for request in requests:
                self.core.add(request)
            with _Progress(len(readers), progress) as bar:
                while self.core.has_work():
                    for output in self.core.step():
                        self._take(output, answers, readers, bar)
        except BaseException:
            self.core.abort(answers)
            while self.core.has_work():
                self.core.step()
            raise
        return list(answers.values())

    def stats(self) -> EngineStats:
        return self.core.stats()

    def _take(
        self,
        output: EngineOutput,
        answers: dict[str, RequestOutput],
        readers: dict[tuple[str, int], OutputProcessor],
        bar: _Progress,
    ) -> None:
        if output.finish_reason is FinishReason.ERROR:
            raise GenerationError(output.error or "the engine failed the request without saying why")
        delta = readers[output.request_id, output.index].push(output)
        if delta is None:
            return
        answer = answers[output.request_id]
        choice = answer.outputs[output.index]
        choice.text += delta.text
        choice.token_ids += delta.token_ids
        if delta.logprobs is not None:
            choice.logprobs = (choice.logprobs or []) + delta.logprobs
        answer.prompt_logprobs = answer.prompt_logprobs or delta.prompt_logprobs
        answer.num_cached_tokens = max(answer.num_cached_tokens, delta.num_cached_tokens)
        bar.tokens(len(delta.token_ids))
        if delta.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
            choice.timing = delta.timing
            bar.finished()
        if delta.needs_abort:
            self.core.abort_child(output.request_id, output.index)


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many? A string or a flat list of integers is one."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


class _Progress:
    """A progress bar on standard error while prompts are answered; nothing where that is not a terminal."""

    def __init__(self, total: int, show: bool) -> None:
        self._bar = None
        self._tokens = 0
        if show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("generating"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[rate]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("", total=total, rate="")
        self._started = time.monotonic()

    def __enter__(self) -> _Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def tokens(self, count: int) -> None:
        self._tokens += count
        if self._bar is not None:
            rate = self._tokens / (time.monotonic() - self._started)
            self._bar.update(self._task, rate=f"{rate:.0f} tokens/s")

    def finished(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)
