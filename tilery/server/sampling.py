"""From request fields to `SamplingParams`, with every limit that the API itself can check. Raises 400s only."""

from __future__ import annotations

from typing import Any

import msgspec

from tilery.engine.messages import EngineInfo, SamplingParams, StructuredKind, StructuredOutput
from tilery.server.config import ServerConfig
from tilery.server.errors import ApiError, invalid
from tilery.server.protocol import GenerationRequest, StructuredOutputs

PRIORITY_LIMIT = 2**31
COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions


class Limits(msgspec.Struct, frozen=True):
    """What requests are checked against."""

    server: ServerConfig
    engine: EngineInfo

    def check_token_ids(self, token_ids: list[int], param: str) -> None:
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.engine.vocab_size:
            bad = next(token for token in token_ids if not 0 <= token < self.engine.vocab_size)
            raise invalid(
                f"Token id {bad} in {param} is out of the vocabulary (0 to {self.engine.vocab_size - 1}).", param
            )

    def output_tokens(self, prompt_tokens: int, asked: int | None, param: str, default: int | None = None) -> int:
        """max_tokens for a prompt of this length. Raises a 400 that says both numbers if it cannot fit."""
        context = self.engine.max_model_len
        if prompt_tokens == 0:
            raise invalid("The prompt is empty: it needs at least one token.", "prompt")
        left = context - prompt_tokens
        if asked is not None and asked < 1:
            raise invalid(f"{param} must be at least 1, got {asked}.", param)
        if left < (asked or 1):
            wanted = f" and {param} is {asked}" if asked is not None else ""
            raise invalid(
                f"This model's maximum context length is {context} tokens, but the prompt has {prompt_tokens} tokens"
                f"{wanted}: together at least {prompt_tokens + (asked or 1)}. Shorten the prompt or lower {param}.",
                param if asked is not None and left >= 1 else "prompt",
            )
        return asked or min(left, default or left)


def sampling_params(
    request: GenerationRequest,
    limits: Limits,
    max_tokens: int,
    structured: StructuredOutput | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """`SamplingParams` checks the ranges of numbers; lists, token ids and sizes are checked here."""
    server, vocab_size = limits.server, limits.engine.vocab_size
    n = 1 if request.n is None else request.n
    if n > server.max_choices:
        raise invalid(f"n must be at most {server.max_choices}, got {n}.", "n")
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    if len(stop) > server.max_stop:
        raise invalid(f"stop takes at most {server.max_stop} strings, got {len(stop)}.", "stop")
    if not all(stop):
        raise invalid("stop must not contain empty strings.", "stop")
    limits.check_token_ids(request.stop_token_ids or [], "stop_token_ids")
    if request.priority is not None and abs(request.priority) >= PRIORITY_LIMIT:
        raise invalid(f"priority must be between -{PRIORITY_LIMIT - 1} and {PRIORITY_LIMIT - 1}.", "priority")
    try:
        return SamplingParams(
            n=n,
            temperature=_or(request.temperature, 1.0),
            top_p=_or(request.top_p, 1.0),
            top_k=min(_or(request.top_k, 0), vocab_size),
            min_p=_or(request.min_p, 0.0),
            repetition_penalty=_or(request.repetition_penalty, 1.0),
            presence_penalty=_or(request.presence_penalty, 0.0),
            frequency_penalty=_or(request.frequency_penalty, 0.0),
            logit_bias=_logit_bias(request.logit_bias, limits),
            seed=request.seed,
            max_tokens=max_tokens,
            min_tokens=_or(request.min_tokens, 0),
            stop=stop,
            stop_token_ids=tuple(request.stop_token_ids or ()),
            ignore_eos=bool(request.ignore_eos),
            include_stop_str_in_output=bool(request.include_stop_str_in_output),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            skip_special_tokens=_or(request.skip_special_tokens, True),
            structured=structured,
        )
    except ValueError as error:
        message = str(error)
        raise invalid(message, message.split(" ", 1)[0]) from None


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _logit_bias(bias: dict[str, float] | None, limits: Limits) -> dict[int, float] | None:
    if not bias:
        return None
    try:
        result = {int(token): value for token, value in bias.items()}
    except ValueError:
        raise invalid("logit_bias must map token ids to numbers.", "logit_bias") from None
    limits.check_token_ids(list(result), "logit_bias")
    return result


# ---- structured output -------------------------------------------------------------------------------------------


def structured_output(request: GenerationRequest, limit: int) -> StructuredOutput | None:
    """What the text must look like: `response_format`, `structured_outputs` or one of the `guided_*` fields.

    Only one of them may be given. Whether a schema or grammar can be compiled is for the engine to say.
    """
    found = [
        *_from_response_format(request),
        *_from_structured_outputs(request.structured_outputs),
        *_from_guided(request),
    ]
    if not found:
        return None
    if len(found) > 1:
        names = " and ".join(param for param, _, _ in found)
        raise invalid(f"Only one constraint on the output is possible, got {names}.", found[1][0])
    param, kind, spec = found[0]
    return StructuredOutput(kind=kind, spec=spec_text(kind, spec, param, limit))


def spec_text(kind: StructuredKind, spec: Any, param: str, limit: int) -> str:
    """The constraint as the engine reads it: schemas and lists of choices become JSON text."""
    if kind is StructuredKind.CHOICE and not (spec and all(spec)):
        raise invalid(f"{param} must be a list of non-empty strings.", param)
    if kind is StructuredKind.JSON_SCHEMA and isinstance(spec, str):
        try:
            if not isinstance(msgspec.json.decode(spec), dict | bool):
                raise invalid(f"{param} must be a JSON schema: an object.", param)
        except (msgspec.DecodeError, RecursionError):
            raise invalid(f"{param} is not valid JSON.", param) from None
    text = spec if isinstance(spec, str) else msgspec.json.encode(spec).decode()
    if len(text) > limit:
        raise invalid(f"{param} is longer than {limit} characters.", param)
    return text


Found = list[tuple[str, StructuredKind, Any]]


def _from_response_format(request: GenerationRequest) -> Found:
    form = request.response_format
    if form is None or form.type == "text":
        return []
    if form.type == "json_object":
        return [("response_format", StructuredKind.JSON_OBJECT, "")]
    if form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema is None:
            raise invalid("response_format of type json_schema needs json_schema.schema.", "response_format")
        return [("response_format", StructuredKind.JSON_SCHEMA, form.json_schema.schema)]
    raise invalid(
        f"response_format.type must be text, json_object or json_schema, got {form.type!r}.", "response_format"
    )


def _from_structured_outputs(given: StructuredOutputs | None) -> Found:
    if given is None:
        return []
    if given.structural_tag is not None:
        raise ApiError(400, "structured_outputs.structural_tag is not supported.", "structured_outputs")
    result: Found = []
    if given.json is not None:
        result.append(("structured_outputs.json", StructuredKind.JSON_SCHEMA, given.json))
    if given.json_object:
        result.append(("structured_outputs.json_object", StructuredKind.JSON_OBJECT, ""))
    if given.regex is not None:
        result.append(("structured_outputs.regex", StructuredKind.REGEX, given.regex))
    if given.choice is not None:
        result.append(("structured_outputs.choice", StructuredKind.CHOICE, given.choice))
    if given.grammar is not None:
        result.append(("structured_outputs.grammar", StructuredKind.GRAMMAR, given.grammar))
    return result


def _from_guided(request: GenerationRequest) -> Found:
    fields = (
        ("guided_json", StructuredKind.JSON_SCHEMA, request.guided_json),
        ("guided_regex", StructuredKind.REGEX, request.guided_regex),
        ("guided_choice", StructuredKind.CHOICE, request.guided_choice),
        ("guided_grammar", StructuredKind.GRAMMAR, request.guided_grammar),
    )
    return [field for field in fields if field[2] is not None]
