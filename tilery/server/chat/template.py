"""Which chat format a checkpoint speaks, and the Jinja templates of those that are not DeepSeek's.

A template is a program from a checkpoint. It runs in Jinja's immutable sandbox (no attribute that starts with an
underscore, no change of the caller's objects), with a limit on the rendered size and on time. The time limit is looked
at whenever the template calls, subscripts, computes or outputs something: a guard against accidents and oversized
conversations, not against a hostile author, who can still burn memory in one filter. Serve only checkpoints you trust.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tilery.engine.tokenizer import Tokenizer
from tilery.server.chat.parse import ChatParser
from tilery.server.chat.render import (
    SPECIAL_TOKENS,
    THINK_BEGIN,
    THINK_END,
    ChatFormatError,
    ChatPrompt,
    check_messages,
    check_tool,
    render_prompt,
)

DSML = "｜DSML｜"
"""Token of the tool format that came with DeepSeek-V3.2 (December 2025)."""
_RESERVED = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "pad_token")


class ChatTemplate:
    """The chat format of one model. Safe to share between threads.

    `native` is true for DeepSeek-V3.1 and V3.2-Exp: the model type is one of DeepSeek's, the tokenizer has every
    special token of the format, and the checkpoint's template, if it has one, knows the two thinking modes (V3 and R1
    do not). A `template` given here replaces the checkpoint's and is always used.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        model_type: str = "",
        *,
        template: str | None = None,
        max_seconds: float = 2.0,
        max_chars: int = 16_000_000,
    ) -> None:
        own = tokenizer.chat_template
        self.native: bool = (
            template is None
            and model_type.startswith("deepseek")
            and all(tokenizer.token_id(token) is not None for token in SPECIAL_TOKENS)
            and (own is None or (THINK_END in own and "thinking" in own))
        )
        self._dsml = self.native and own is None and tokenizer.token_id(DSML) is not None
        self._max_seconds = max_seconds
        self._max_chars = max_chars
        self._compiled: jinja2.Template | None = None
        if not self.native:
            source = template if template is not None else own
            if source is not None:
                self._compiled = _compile(source)
            self._tokens = {
                f"{name}_token": "" if id is None else tokenizer.token_text(id)
                for name, id in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("pad", tokenizer.pad_id))
            }

    @property
    def parses_tools(self) -> bool:
        """Whether `parser` recognises this model's tool calls; if not they stay in the content."""
        return self.native and not self._dsml

    def apply(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> ChatPrompt:
        """OpenAI-style messages to the prompt. Of `template_kwargs`, `thinking` and `enable_thinking` mean the same;
        a Jinja template gets all of them.

        Raises `ChatFormatError` (message, field, what is wrong), also for errors inside a template.
        """
        arguments = dict(template_kwargs or {})
        thinking = _thinking(arguments)
        if self.native:
            if self._dsml and tools:
                raise ChatFormatError("tools", "this checkpoint uses the DSML tool format, which is not supported yet")
            return render_prompt(
                messages,
                tools=tools,
                thinking=bool(thinking),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        if self._compiled is None:
            raise ChatFormatError("messages", "this model has no chat template; use /v1/completions or provide one")
        if clash := sorted(set(arguments) & set(_RESERVED)):
            raise ChatFormatError(f"chat_template_kwargs.{clash[0]}", "is set by the server and cannot be given")
        if thinking is not None:
            arguments["thinking"] = arguments["enable_thinking"] = thinking
        for index, tool in enumerate(tools or ()):
            check_tool(tool, index)
        variables = {
            **self._tokens,
            **arguments,
            "messages": _for_template(messages),
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        text = self._run(self._compiled, variables)
        if continue_final_message:
            text = _cut_after_final(text, variables["messages"][-1])
        return ChatPrompt(text, in_reasoning=text.rstrip().endswith(THINK_BEGIN))

    def parser(self, prompt: ChatPrompt, *, tools: bool) -> ChatParser:
        """For the answer to `prompt`; `tools`: the request offers tools and allows calling them."""
        return ChatParser(thinking=prompt.in_reasoning, tools=tools and self.parses_tools)

    def _run(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        token = _deadline.set(time.monotonic() + self._max_seconds)
        pieces: list[str] = []
        size = 0
        try:
            for piece in template.generate(**variables):
                size += len(piece)
                if size > self._max_chars:
                    raise ChatFormatError(
                        "messages", f"the chat template writes more than {self._max_chars} characters"
                    )
                _check_time()
                pieces.append(piece)
        except _TooSlow as error:
            limit = f"{self._max_seconds} seconds"
            raise ChatFormatError("messages", f"the chat template takes longer than {limit}") from error
        except _TooMuch as error:
            limit = f"{self._max_chars} characters"
            raise ChatFormatError("messages", f"the chat template writes more than {limit}") from error
        except Exception as error:  # a template can fail with anything
            raise ChatFormatError("messages", f"the chat template refused them: {error}") from error
        finally:
            _deadline.reset(token)
        return "".join(pieces)


# ---- Jinja -----------------------------------------------------------------------------------------------------------

_deadline: ContextVar[float] = ContextVar("chat_template_deadline", default=float("inf"))


class _TooSlow(Exception):
    pass


class _TooMuch(Exception):
    pass


def _check_time() -> None:
    if time.monotonic() > _deadline.get():
        raise _TooSlow


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "+"})

    def call(self, *args: Any, **kwargs: Any) -> Any:
        _check_time()
        return super().call(*args, **kwargs)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _check_time()
        return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        _check_time()
        return super().getattr(obj, attribute)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_time()
        if operator == "**" or (operator == "*" and not (_is_number(left) and _is_number(right))):
            raise TypeError(f"operator {operator} is not available to chat templates on these values")
        return super().call_binop(context, operator, left, right)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks what an assistant wrote, for training; here it means nothing."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str) -> jinja2.Template:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template is not valid Jinja: {error}") from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the HTML escaping of Jinja's own filter, as transformers has it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


# ---- arguments -------------------------------------------------------------------------------------------------------


def _thinking(arguments: Mapping[str, Any]) -> bool | None:
    """None if neither is given."""
    for name in ("thinking", "enable_thinking"):
        value = arguments.get(name)
        if value is not None:
            if not isinstance(value, bool):
                raise ChatFormatError(f"chat_template_kwargs.{name}", f"must be true or false, got {value!r}")
            return value
    return None


def _for_template(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As templates of the field expect them: content as one string, arguments of calls as objects."""
    prepared = []
    for message, checked in zip(messages, check_messages(messages)):
        entry = {**message, "role": checked.role}
        if message.get("content") is not None and not isinstance(message["content"], str):
            entry["content"] = checked.content
        elif message.get("content") is None and not checked.calls:
            entry["content"] = ""
        if checked.reasoning is not None:
            entry["reasoning_content"] = checked.reasoning
        if checked.calls:
            entry["tool_calls"] = [
                {
                    **call,
                    "type": "function",
                    "function": {**call["function"], "name": own.name, "arguments": _loads(own.arguments)},
                }
                for call, own in zip(message["tool_calls"], checked.calls)
            ]
        prepared.append(entry)
    return prepared


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _cut_after_final(text: str, final: Mapping[str, Any]) -> str:
    """The rendered text up to the end of the final message's content."""
    if final["role"] != "assistant" or not final["content"] or final.get("tool_calls"):
        raise ChatFormatError("continue_final_message", "the last message must be an assistant's, with content only")
    for content in (final["content"], final["content"].strip()):
        end = text.rfind(content)
        if end >= 0 and content:
            return text[: end + len(content)]
    raise ChatFormatError("continue_final_message", "the chat template does not show the last message's content")
