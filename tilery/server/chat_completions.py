"""POST /v1/chat/completions: a conversation in, the assistant's next message out.

Order of a stream, per choice: role with empty content; deltas of reasoning, content and tool calls; the last one
carries the finish reason. Then, if asked for, one event with no choices and the usage; then [DONE].
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from msgspec import UNSET, UnsetType

from tilery.engine.messages import FinishReason, TokenLogprobs
from tilery.engine.output import TextDelta
from tilery.server import logprobs as render
from tilery.server.chat import params_for_parsing
from tilery.server.completions import check_stream_options
from tilery.server.errors import invalid
from tilery.server.exchange import Exchange
from tilery.server.generation import Choice, Generation
from tilery.server.message_parts import Forced, ModelFormat, Parts, PartsParser, Verbatim
from tilery.server.protocol import ChatRequest
from tilery.server.responses import (
    AssistantMessage,
    CalledTool,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    Delta,
    PromptLogprobs,
    Usage,
)
from tilery.server.sampling import sampling_params, structured_output
from tilery.server.service import Service
from tilery.server.sse import DONE, MARK, TextTemplate, event
from tilery.server.tool_choice import NamedCallParser, RequiredCallsParser, constraint, forced_tool, join_calls

DECODER = msgspec.json.Decoder(ChatRequest)
NO_THINKING = {"thinking": False, "enable_thinking": False}
"""With a constrained output the model cannot think first: the constraint holds from the first token."""


async def chat_completions(service: Service, exchange: Exchange) -> None:
    request = await exchange.decode(DECODER, service.config.max_body_bytes)
    model = service.check_model(request.model)
    service.check_open()
    check_stream_options(request)
    forced = forced_tool(request)
    structured = structured_output(request, service.config.max_spec_bytes)
    if forced is not None:
        if structured is not None:
            raise invalid("A forced tool call cannot be combined with another constraint on the output.", "tool_choice")
        structured = constraint(request, forced, service.config.max_spec_bytes)
    tools = None if request.tool_choice == "none" else request.tools
    prompt = service.render_chat(
        request.messages,
        tools,
        request.add_generation_prompt,
        request.continue_final_message,
        {**(request.chat_template_kwargs or {}), **(NO_THINKING if structured else {})},
    )
    [token_ids] = await service.encode([prompt.text], bool(request.add_special_tokens))
    name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    asked: int | None = getattr(request, name)
    max_tokens = service.limits.output_tokens(len(token_ids), asked, name)
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs needs logprobs to be true.", "top_logprobs")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    params = sampling_params(request, service.limits, max_tokens, structured, logprobs, request.prompt_logprobs)

    def parser() -> PartsParser:
        if forced is not None:
            return Forced(RequiredCallsParser() if request.tool_choice == "required" else NamedCallParser(forced))
        if structured is not None:
            return Verbatim()
        return ModelFormat(service.chat.parser(prompt, tools=bool(tools)))

    if structured is None:
        params = params_for_parsing(params)
    exchange.cancel_on_disconnect()
    id = f"chatcmpl-{uuid.uuid4().hex}"
    with Generation(service, id, [(token_ids, params)], request.priority or 0, request.cache_salt) as generation:
        parsers = [parser() for _ in generation.choices]
        answer = _Answer(service, request, model, generation, parsers)
        if request.stream:
            await answer.stream(exchange)
        else:
            await answer.whole(exchange)


@dataclass
class _Kept:
    """What one choice has produced so far; only the whole answer keeps it."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[CalledTool] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    last: TextDelta | None = None


class _Answer:
    def __init__(
        self,
        service: Service,
        request: ChatRequest,
        model: str,
        generation: Generation,
        parsers: Sequence[PartsParser],
    ) -> None:
        self.tokenizer = service.tokenizer
        self.request = request
        self.generation = generation
        self.parsers = parsers
        self.called = [False] * len(parsers)
        self.with_ids = bool(request.return_token_ids)
        self.with_reasoning = request.include_reasoning is not False
        self.prompt_logprobs: PromptLogprobs | UnsetType = UNSET
        self.frame = ChatChunk(
            id=generation.id, created=int(time.time()), model=model, system_fingerprint=service.fingerprint, choices=[]
        )

    def parse(self, choice: Choice, delta: TextDelta) -> Parts:
        parts = self.parsers[choice.index].push(delta.text, delta.finish_reason is not None)
        if parts.calls:
            self.called[choice.index] = True
        if not self.with_reasoning:
            parts.reasoning = ""
        return parts

    def finish_reason(self, choice: Choice, delta: TextDelta) -> str | None:
        if delta.finish_reason is FinishReason.STOP and self.called[choice.index]:
            return "tool_calls"
        return delta.finish_reason

    # ---- one JSON body -------------------------------------------------------------------------------------------

    async def whole(self, exchange: Exchange) -> None:
        kept = [_Kept() for _ in self.generation.choices]
        async for events in self.generation:
            for choice, delta in events:
                if delta.prompt_logprobs is not None:
                    self.prompt_logprobs = render.prompt_logprobs(self.tokenizer, delta.prompt_logprobs)
                part, parts = kept[choice.index], self.parse(choice, delta)
                part.content.append(parts.content)
                part.reasoning.append(parts.reasoning)
                part.calls += parts.calls
                part.token_ids += delta.token_ids
                part.logprobs += delta.logprobs or []
                part.last = delta
        frame = self.frame
        await exchange.reply_json(
            ChatCompletion(
                id=frame.id,
                created=frame.created,
                model=frame.model,
                system_fingerprint=frame.system_fingerprint,
                choices=[self._whole_choice(choice, kept[choice.index]) for choice in self.generation.choices],
                usage=self.generation.usage(),
                prompt_logprobs=self.prompt_logprobs,
                prompt_token_ids=self.generation.choices[0].prompt_token_ids if self.with_ids else UNSET,
            )
        )

    def _whole_choice(self, choice: Choice, kept: _Kept) -> ChatChoice:
        assert kept.last is not None
        calls = join_calls(kept.calls)
        content = "".join(kept.content)
        reasoning = "".join(kept.reasoning) or None
        return ChatChoice(
            index=choice.index,
            message=AssistantMessage(
                content=None if calls and not content.strip() else content,
                reasoning=reasoning,
                reasoning_content=reasoning,
                tool_calls=calls or UNSET,
            ),
            logprobs=render.chat_logprobs(self.tokenizer, kept.logprobs) if self.request.logprobs else None,
            finish_reason=self.finish_reason(choice, kept.last),
            stop_reason=kept.last.stop_reason,
            token_ids=kept.token_ids if self.with_ids else UNSET,
        )

    # ---- a stream of events --------------------------------------------------------------------------------------

    async def stream(self, exchange: Exchange) -> None:
        """The status line waits for the first output, so that a refusal still gets its own status code."""
        request, generation = self.request, self.generation
        options = request.stream_options
        usage = bool(options and options.include_usage)
        continuous = bool(usage and options and options.continuous_usage_stats)
        no_usage: UnsetType | None = None if usage else UNSET
        plain = not (continuous or self.with_ids or request.logprobs)
        templates = [_Templates(self, choice.index, no_usage) for choice in generation.choices]
        async for events in generation:
            pieces: list[bytes] = []
            if not exchange.started:
                await exchange.start_events()
                pieces += [self._first(choice, no_usage) for choice in generation.choices]
            for choice, delta in events:
                parts = self.parse(choice, delta)
                if plain and delta.finish_reason is None and not parts.calls:
                    template = templates[choice.index]
                    if parts.reasoning:
                        pieces.append(template.reasoning.fill(parts.reasoning))
                    if parts.content:
                        pieces.append(template.content.fill(parts.content))
                    continue
                so_far = generation.usage() if continuous else no_usage
                pieces.append(event(self.chunk(self._piece(choice, delta, parts), so_far)))
            if pieces:
                await exchange.write(b"".join(pieces))
        end = event(msgspec.structs.replace(self.frame, usage=generation.usage())) if usage else b""
        await exchange.finish(end + DONE)

    def chunk(self, choice: ChatChunkChoice, usage: Usage | UnsetType | None) -> ChatChunk:
        return msgspec.structs.replace(self.frame, choices=[choice], usage=usage)

    def _first(self, choice: Choice, usage: UnsetType | None) -> bytes:
        chunk = self.chunk(ChatChunkChoice(index=choice.index, delta=Delta(role="assistant", content="")), usage)
        return event(
            msgspec.structs.replace(chunk, prompt_token_ids=choice.prompt_token_ids) if self.with_ids else chunk
        )

    def _piece(self, choice: Choice, delta: TextDelta, parts: Parts) -> ChatChunkChoice:
        return ChatChunkChoice(
            index=choice.index,
            delta=Delta(
                content=parts.content or UNSET,
                reasoning=parts.reasoning or UNSET,
                reasoning_content=parts.reasoning or UNSET,
                tool_calls=parts.calls or UNSET,
            ),
            logprobs=render.chat_logprobs(self.tokenizer, delta.logprobs) if delta.logprobs else None,
            finish_reason=self.finish_reason(choice, delta),
            stop_reason=delta.stop_reason if delta.finish_reason is not None else UNSET,
            token_ids=delta.token_ids if self.with_ids else UNSET,
        )


class _Templates:
    """The two events that make up most of a stream."""

    def __init__(self, answer: _Answer, index: int, usage: UnsetType | None) -> None:
        def template(delta: Delta) -> TextTemplate:
            return TextTemplate(answer.chunk(ChatChunkChoice(index=index, delta=delta), usage))

        self.content = template(Delta(content=MARK))
        self.reasoning = template(Delta(reasoning=MARK, reasoning_content=MARK))
