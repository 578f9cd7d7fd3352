"""POST /v1/completions: text or token ids in, their continuation out."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET

from tilery.engine.messages import SamplingParams, TokenLogprobs
from tilery.engine.output import TextDelta
from tilery.server import logprobs as render
from tilery.server.errors import invalid
from tilery.server.exchange import Exchange
from tilery.server.generation import Choice, Generation
from tilery.server.protocol import CompletionRequest, GenerationRequest
from tilery.server.responses import Completion, CompletionChoice, CompletionLogprobs, Usage
from tilery.server.sampling import COMPLETION_MAX_TOKENS, sampling_params, structured_output
from tilery.server.service import Service
from tilery.server.sse import DONE, MARK, TextTemplate, event

DECODER = msgspec.json.Decoder(CompletionRequest)


async def completions(service: Service, exchange: Exchange) -> None:
    request = await exchange.decode(DECODER, service.config.max_body_bytes)
    model = service.check_model(request.model)
    service.check_open()
    check_stream_options(request)
    if request.suffix:
        raise invalid("suffix is not supported.", "suffix")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise invalid("best_of is not supported: it must be left out or equal n.", "best_of")
    prompts = await _tokenise(service, request)
    structured = structured_output(request, service.config.max_spec_bytes)
    prompt_logprobs = request.prompt_logprobs
    if request.echo and request.logprobs is not None and prompt_logprobs is None:
        prompt_logprobs = request.logprobs
    work: list[tuple[list[int], SamplingParams]] = []
    for prompt in prompts:
        max_tokens = service.limits.output_tokens(
            len(prompt.token_ids), request.max_tokens, "max_tokens", COMPLETION_MAX_TOKENS
        )
        params = sampling_params(request, service.limits, max_tokens, structured, request.logprobs, prompt_logprobs)
        work.append((prompt.token_ids, params))

    exchange.cancel_on_disconnect()
    id = f"cmpl-{uuid.uuid4().hex}"
    with Generation(service, id, work, request.priority or 0, request.cache_salt) as generation:
        answer = _Answer(service, request, model, generation, prompts)
        if request.stream:
            await answer.stream(exchange)
        else:
            await answer.whole(exchange)


def check_stream_options(request: GenerationRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options can only be set if stream is true.", "stream_options")


@dataclass
class _Prompt:
    text: str | None
    """None: given as token ids."""
    token_ids: list[int]


async def _tokenise(service: Service, request: CompletionRequest) -> list[_Prompt]:
    given = request.prompt
    texts: list[str]
    if isinstance(given, str):
        texts = [given]
    elif not given:
        raise invalid("prompt is empty.", "prompt")
    elif all(isinstance(item, str) for item in given):
        texts = given  # type: ignore[assignment]
    elif all(isinstance(item, int) for item in given):
        return [_from_ids(service, given)]  # type: ignore[arg-type]
    elif all(isinstance(item, list) for item in given):
        _check_count(service, len(given))
        return [_from_ids(service, item) for item in given]  # type: ignore[arg-type]
    else:
        raise invalid("prompt must not mix texts, token ids and lists of token ids.", "prompt")
    _check_count(service, len(texts))
    special = request.add_special_tokens is None or request.add_special_tokens
    lists = await service.encode(texts, special)
    return [_Prompt(text, token_ids) for text, token_ids in zip(texts, lists, strict=True)]


def _check_count(service: Service, count: int) -> None:
    if count > service.config.max_prompts:
        raise invalid(f"prompt holds {count} prompts; at most {service.config.max_prompts} are allowed.", "prompt")


def _from_ids(service: Service, token_ids: list[int]) -> _Prompt:
    service.limits.check_token_ids(token_ids, "prompt")
    return _Prompt(None, token_ids)


@dataclass
class _Parts:
    """What one choice has produced so far; only the whole answer keeps it."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    last: TextDelta | None = None


class _Answer:
    def __init__(
        self, service: Service, request: CompletionRequest, model: str, generation: Generation, prompts: list[_Prompt]
    ) -> None:
        self.tokenizer = service.tokenizer
        self.request = request
        self.generation = generation
        self.prompts = prompts
        self.n = request.n or 1
        self.with_ids = bool(request.return_token_ids)
        self.prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}  # by choice
        self.frame = Completion(
            id=generation.id, created=int(time.time()), model=model, system_fingerprint=service.fingerprint, choices=[]
        )

    async def whole(self, exchange: Exchange) -> None:
        parts = [_Parts() for _ in self.generation.choices]
        async for events in self.generation:
            for choice, delta in events:
                self._keep_prompt_logprobs(choice, delta)
                part = parts[choice.index]
                part.text.append(delta.text)
                part.token_ids += delta.token_ids
                part.logprobs += delta.logprobs or []
                part.offsets += delta.text_offsets or []
                part.last = delta
        choices = [self._whole_choice(choice, parts[choice.index]) for choice in self.generation.choices]
        await exchange.reply_json(msgspec.structs.replace(self.frame, choices=choices, usage=self.generation.usage()))

    async def stream(self, exchange: Exchange) -> None:
        """The status line waits for the first output, so that a refusal still gets its own status code."""
        request, generation = self.request, self.generation
        options = request.stream_options
        usage = bool(options and options.include_usage)
        continuous = bool(usage and options and options.continuous_usage_stats)
        plain = not (continuous or self.with_ids or request.logprobs is not None or request.prompt_logprobs is not None)
        templates = [
            TextTemplate(self._chunk(CompletionChoice(index=choice.index, text=MARK), None if usage else UNSET))
            for choice in generation.choices
        ]
        begun = [False] * len(generation.choices)
        async for events in generation:
            pieces: list[bytes] = []
            for choice, delta in events:
                first = not begun[choice.index]
                begun[choice.index] = True
                if plain and delta.finish_reason is None and not (first and request.echo):
                    if delta.text:
                        pieces.append(templates[choice.index].fill(delta.text))
                    continue
                self._keep_prompt_logprobs(choice, delta)
                so_far = generation.usage() if continuous else None if usage else UNSET
                pieces.append(event(self._chunk(self._piece(choice, delta, first), so_far)))
            if not exchange.started:
                await exchange.start_events()
            if pieces:
                await exchange.write(b"".join(pieces))
        end = event(msgspec.structs.replace(self.frame, usage=generation.usage())) if usage else b""
        await exchange.finish(end + DONE)

    def _chunk(self, choice: CompletionChoice, usage: Usage | msgspec.UnsetType | None) -> Completion:
        return msgspec.structs.replace(self.frame, choices=[choice], usage=usage)

    def _piece(self, choice: Choice, delta: TextDelta, first: bool) -> CompletionChoice:
        prompt = self._prompt_of(choice) if first and self.request.echo else None
        text = delta.text if prompt is None else self._prompt_text(prompt) + delta.text
        result = CompletionChoice(
            index=choice.index,
            text=text,
            logprobs=self._logprobs(choice, delta.logprobs or [], delta.text_offsets or [], delta.token_ids, prompt),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if self.with_ids else UNSET,
            prompt_token_ids=choice.prompt_token_ids if self.with_ids and first else UNSET,
        )
        return self._with_prompt_logprobs(result) if first else result

    def _whole_choice(self, choice: Choice, part: _Parts) -> CompletionChoice:
        assert part.last is not None
        prompt = self._prompt_of(choice) if self.request.echo else None
        text = "".join(part.text)
        return self._with_prompt_logprobs(
            CompletionChoice(
                index=choice.index,
                text=text if prompt is None else self._prompt_text(prompt) + text,
                logprobs=self._logprobs(choice, part.logprobs, part.offsets, part.token_ids, prompt),
                finish_reason=part.last.finish_reason,
                stop_reason=part.last.stop_reason,
                token_ids=part.token_ids if self.with_ids else UNSET,
                prompt_token_ids=choice.prompt_token_ids if self.with_ids else UNSET,
            )
        )

    def _logprobs(
        self,
        choice: Choice,
        positions: Sequence[TokenLogprobs],
        offsets: Sequence[int],
        token_ids: Sequence[int],
        prompt: _Prompt | None,
    ) -> CompletionLogprobs | None:
        """With `echo` the prompt's positions come first, and the text starts with the prompt."""
        if self.request.logprobs is None:
            return None
        base = len(self._prompt_text(self._prompt_of(choice))) if self.request.echo else 0
        offsets = [base + offset for offset in offsets]
        if prompt is None:
            return render.completion_logprobs(self.tokenizer, positions, offsets, token_ids)
        before: list[TokenLogprobs | None] = self.prompt_logprobs.get(choice.index) or [None] * len(prompt.token_ids)
        starts, length = [], 0
        for token in prompt.token_ids:
            starts.append(min(length, base))
            if token not in self.tokenizer.special_ids:  # the prompt's text does not show them
                length += len(self.tokenizer.token_text(token))
        return render.completion_logprobs(
            self.tokenizer, [*before, *positions], [*starts, *offsets], [*prompt.token_ids, *token_ids]
        )

    def _keep_prompt_logprobs(self, choice: Choice, delta: TextDelta) -> None:
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs[choice.index] = delta.prompt_logprobs

    def _with_prompt_logprobs(self, piece: CompletionChoice) -> CompletionChoice:
        positions = self.prompt_logprobs.get(piece.index)
        if self.request.prompt_logprobs is None or positions is None:
            return piece
        return msgspec.structs.replace(piece, prompt_logprobs=render.prompt_logprobs(self.tokenizer, positions))

    def _prompt_of(self, choice: Choice) -> _Prompt:
        return self.prompts[choice.index // self.n]

    def _prompt_text(self, prompt: _Prompt) -> str:
        if prompt.text is None:
            prompt.text = self.tokenizer.decode(prompt.token_ids)
        return prompt.text
