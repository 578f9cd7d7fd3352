"""Messages to a prompt in the format of DeepSeek-V3.1, V3.1-Terminus and V3.2-Exp.

    BOS system <｜User｜>question<｜Assistant｜></think>answer EOS <｜User｜>question<｜Assistant｜></think>
                                                                               or, thinking: <think>
    a call:    ...<｜Assistant｜></think>content<｜tool▁calls▁begin｜>
               <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜> ... <｜tool▁calls▁end｜> EOS
    a result:  <｜tool▁output▁begin｜>TEXT<｜tool▁output▁end｜>    and then the assistant goes on without a new tag

(without the line breaks). Past reasoning is not part of the context. All bars are U+FF5C, all low blocks U+2581.

What this rests on. The text agrees with the published chat template of DeepSeek-V3.1 for every well-formed conversation
(system messages first in order, turns user / assistant / tool results). Tool descriptions are not in that template but
in the model card, which this follows; inference engines write them slightly differently (a blank line after "Where:",
doubled braces, a final newline), and which of these the model saw in training is not known, nor whether a missing
system prompt leaves the two line feeds before "## Tools" (here: no).

On purpose different from the published template, where that one would continue garbage:

* After an assistant message, or with system messages only, the template opens no new turn; we open one.
* It puts EOS behind a final assistant message marked `prefix`; we leave it open to be continued.
* It omits the assistant tag when no user message precedes; we omit it only after tool results.
* It strips reasoning (`...</think>`) from the content of plain answers only; we also strip it from answers that
  follow tool results or carry tool calls.

Out of scope: the DSML tool format of DeepSeek-V3.2 (December 2025) and V4; `ChatTemplate` refuses tools there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_BEGIN = "<think>"
THINK_END = "</think>"
CALLS_BEGIN = "<｜tool▁calls▁begin｜>"
CALLS_END = "<｜tool▁calls▁end｜>"
CALL_BEGIN = "<｜tool▁call▁begin｜>"
CALL_END = "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
OUTPUT_BEGIN = "<｜tool▁output▁begin｜>"
OUTPUT_END = "<｜tool▁output▁end｜>"

SPECIAL_TOKENS = (
    *(BOS, EOS, USER, ASSISTANT, THINK_BEGIN, THINK_END),
    *(CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR, OUTPUT_BEGIN, OUTPUT_END),
)
"""A tokenizer must know each of these as one token for this format to make sense."""

_TOOL_RULES = (
    "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
    f"{CALLS_BEGIN}{CALL_BEGIN}tool_call_name{SEPARATOR}tool_call_arguments{CALL_END}"
    f"{{additional_tool_calls}}{CALLS_END}\n\n"
    "Where:\n"
    "- `tool_call_name` must be an exact match to one of the available tools\n"
    "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
    "- For multiple tool calls, chain them directly without separators or spaces"
)
_ROLES = ("system", "developer", "user", "assistant", "tool")


class ChatFormatError(ValueError):
    """A conversation that cannot be rendered. `index` is the message's (or tool's) position, `field` its path."""

    def __init__(self, field: str, problem: str, index: int | None = None) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.index = index


class ChatPrompt(msgspec.Struct, frozen=True):
    text: str
    """Starts with BOS if the format has one: encode it with `add_special_tokens=False`."""
    in_reasoning: bool
    """The model's output starts inside the reasoning: give this to `ChatParser`."""


class Call(msgspec.Struct, frozen=True):
    name: str
    arguments: str
    """JSON text."""


class Message(msgspec.Struct, frozen=True):
    """One checked message; roles are system, user, assistant, tool."""

    role: str
    content: str
    reasoning: str | None = None
    calls: tuple[Call, ...] = ()
    prefix: bool = False


def render(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = False,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str:
    """The prompt's text; see `render_prompt`."""
    return render_prompt(
        messages,
        tools=tools,
        thinking=thinking,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
    ).text


def render_prompt(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    thinking: bool = False,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> ChatPrompt:
    """OpenAI-style messages to DeepSeek's format.

    `continue_final_message` (or `"prefix": true` in the final message, DeepSeek's own spelling) leaves the final
    assistant message open, so that the model continues it. With thinking, a final message that has reasoning but no
    content continues inside the reasoning; so does, as in the published template, the content of a message marked
    `prefix` without reasoning. After tool results the model continues its turn and does not think anew.

    Raises `ChatFormatError` that names the message and field.
    """
    checked = check_messages(messages)
    parts = [BOS, _system_prompt(checked, tools)]
    turns = [message for message in checked if message.role != "system"]
    final = turns[-1] if turns else None
    if continue_final_message and (final is None or final.role != "assistant"):
        raise ChatFormatError(
            "continue_final_message", "the last message must have role 'assistant'", index=len(messages) - 1
        )
    open_end = final is not None and final.role == "assistant" and (continue_final_message or final.prefix)
    in_reasoning = False
    after_tool = False
    for message in turns:
        if message.role == "user":
            parts += (USER, message.content)
        elif message.role == "tool":
            parts += (OUTPUT_BEGIN, message.content, OUTPUT_END)
        elif message is final and open_end:
            text, in_reasoning = _open_turn(message, thinking, after_tool)
            parts.append(text)
        else:
            parts += ("" if after_tool else ASSISTANT + THINK_END, message.content, _calls(message.calls), EOS)
        after_tool = message.role == "tool"
    if add_generation_prompt and not open_end and not after_tool:
        parts += (ASSISTANT, THINK_BEGIN if thinking else THINK_END)
        in_reasoning = thinking
    return ChatPrompt("".join(parts), in_reasoning)


def _open_turn(message: Message, thinking: bool, after_tool: bool) -> tuple[str, bool]:
    """The text of a turn to be continued and whether it ends inside the reasoning."""
    if message.calls:
        raise ChatFormatError("continue_final_message", "a message with tool_calls is complete and cannot be continued")
    if after_tool:
        return message.content, False
    if thinking and message.reasoning is not None:
        opened = ASSISTANT + THINK_BEGIN + message.reasoning
        return (opened + THINK_END + message.content, False) if message.content else (opened, True)
    if thinking and message.prefix:
        return ASSISTANT + THINK_BEGIN + message.content, True
    return ASSISTANT + THINK_END + message.content, False


def _system_prompt(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> str:
    parts = [message.content for message in messages if message.role == "system"]
    if tools:
        parts.append(describe_tools(tools))
    return "\n\n".join(parts)


def describe_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """The system prompt's section on tools, after the model card. JSON keeps non-ASCII characters."""
    lines = ["## Tools\nYou have access to the following tools:\n\n"]
    for index, tool in enumerate(tools):
        function = check_tool(tool, index)
        parameters = json.dumps(function.get("parameters") or {}, ensure_ascii=False)
        lines.append(
            f"### {function['name']}\nDescription: {function.get('description') or ''}\n\nParameters: {parameters}\n\n"
        )
    return "".join(lines) + _TOOL_RULES


def _calls(calls: Sequence[Call]) -> str:
    if not calls:
        return ""
    return (
        CALLS_BEGIN
        + "".join(f"{CALL_BEGIN}{call.name}{SEPARATOR}{call.arguments}{CALL_END}" for call in calls)
        + CALLS_END
    )


# ---- checking --------------------------------------------------------------------------------------------------------


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Raises `ChatFormatError` for what is not a conversation."""
    if not messages:
        raise ChatFormatError("messages", "must have at least one message")
    return [_check_message(message, index) for index, message in enumerate(messages)]


def check_tool(tool: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """The tool's `function` object."""
    field = f"tools[{index}]"
    if not isinstance(tool, Mapping) or not isinstance(tool.get("function"), Mapping):
        raise ChatFormatError(field, 'must be {"type": "function", "function": {"name": ...}}', index)
    function = tool["function"]
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise ChatFormatError(f"{field}.function.name", "must be a non-empty string", index)
    return function


def _check_message(message: Mapping[str, Any], index: int) -> Message:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise ChatFormatError(where, f"must be an object, got {type(message).__name__}", index)
    role = message.get("role")
    if role not in _ROLES:
        raise ChatFormatError(f"{where}.role", f"unknown role {role!r}; expected one of {', '.join(_ROLES)}", index)
    content = _text(message.get("content"), f"{where}.content", index)
    if role != "assistant":
        if content is None:
            raise ChatFormatError(f"{where}.content", f"a {role} message needs content", index)
        if role == "tool" and not message.get("tool_call_id"):
            raise ChatFormatError(f"{where}.tool_call_id", "a tool message must say which call it answers", index)
        return Message("system" if role == "developer" else role, content)

    calls = _tool_calls(message.get("tool_calls"), f"{where}.tool_calls", index)
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise ChatFormatError(f"{where}.reasoning", f"must be a string, got {type(reasoning).__name__}", index)
    if content is None and not calls and reasoning is None:
        raise ChatFormatError(f"{where}.content", "an assistant message needs content or tool_calls", index)
    content = content or ""
    if THINK_END in content:
        before, _, content = content.partition(THINK_END)
        reasoning = reasoning or before.removeprefix(THINK_BEGIN)
    return Message(role, content, reasoning, calls, message.get("prefix") is True)


def _text(content: object, field: str, index: int) -> str | None:
    """A string, or a list of text parts joined."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ChatFormatError(field, f"must be a string or a list of text parts, got {type(content).__name__}", index)
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            shown = repr(kind) if isinstance(part, Mapping) else type(part).__name__
            raise ChatFormatError(
                f"{field}[{number}]",
                f'this model reads text only; expected {{"type": "text", "text": ...}}, got {shown}',
                index,
            )
        if not isinstance(part.get("text"), str):
            raise ChatFormatError(f"{field}[{number}].text", "must be a string", index)
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(calls: object, field: str, index: int) -> tuple[Call, ...]:
    if calls is None:
        return ()
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ChatFormatError(field, f"must be a list, got {type(calls).__name__}", index)
    checked = []
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ChatFormatError(f"{field}[{number}].function.name", "must be a non-empty string", index)
        arguments = function.get("arguments")
        if isinstance(arguments, Mapping):
            arguments = json.dumps(arguments, ensure_ascii=False)
        if arguments is None or arguments == "":
            arguments = "{}"
        if not isinstance(arguments, str):
            raise ChatFormatError(
                f"{field}[{number}].function.arguments",
                f"must be JSON text or an object, got {type(arguments).__name__}",
                index,
            )
        checked.append(Call(function["name"], arguments))
    return tuple(checked)
