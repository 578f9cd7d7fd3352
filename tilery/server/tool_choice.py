"""Forced tool calls: a JSON schema makes the model write calls and nothing else; this turns the JSON back into calls.

    tool_choice "required"   the text is [{"name": NAME, "parameters": {...}}, ...]
    tool_choice NAME         the text is the arguments of that one function

With tool_choice "auto" the model writes calls in its own format, which `server.chat` parses.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec

from tilery.engine.messages import StructuredKind, StructuredOutput
from tilery.server.errors import invalid
from tilery.server.protocol import ChatRequest, NamedTool, Tool
from tilery.server.responses import CalledFunction, CalledTool
from tilery.server.sampling import spec_text

ANY_OBJECT = {"type": "object", "properties": {}}
_HEAD = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"parameters"\s*:')


def forced_tool(request: ChatRequest) -> str | None:
    """ "required", or the name of the one function to call; None if the model may choose. Raises a 400."""
    choice = request.tool_choice
    if choice is None or choice in ("auto", "none"):
        return None
    if not request.tools:
        raise invalid("tool_choice needs tools.", "tool_choice")
    if isinstance(choice, NamedTool):
        if all(tool.function.name != choice.function.name for tool in request.tools):
            raise invalid(f"tool_choice names {choice.function.name!r}, which is not among the tools.", "tool_choice")
        return choice.function.name
    if choice != "required":
        raise invalid(f"tool_choice must be none, auto, required or a named function, got {choice!r}.", "tool_choice")
    return choice


def constraint(request: ChatRequest, forced: str, limit: int) -> StructuredOutput:
    """The schema that the model's text must follow."""
    tools = request.tools or []
    if isinstance(request.tool_choice, NamedTool):
        schema = next(tool.function.parameters for tool in tools if tool.function.name == forced) or ANY_OBJECT
    else:
        schema = _list_of_calls(tools, many=request.parallel_tool_calls is not False)
    return StructuredOutput(
        kind=StructuredKind.JSON_SCHEMA, spec=spec_text(StructuredKind.JSON_SCHEMA, schema, "tools", limit)
    )


def _list_of_calls(tools: Sequence[Tool], many: bool) -> dict[str, Any]:
    """References inside a function's schema point to the root, so definitions move there."""
    definitions: dict[str, Any] = {}
    calls = []
    for tool in tools:
        parameters = dict(tool.function.parameters or ANY_OBJECT)
        definitions |= parameters.pop("$defs", {})
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "parameters": parameters},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not many:
        schema["maxItems"] = 1
    return {**schema, "$defs": definitions} if definitions else schema


def new_call(index: int, id: str, name: str, arguments: str = "") -> CalledTool:
    """The first part of a call."""
    return CalledTool(index=index, id=id, type="function", function=CalledFunction(arguments, name))


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class NamedCallParser:
    """All text is the arguments of one call."""

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def push(self, text: str) -> list[CalledTool]:
        if self._name is not None:
            name, self._name = self._name, None
            return [new_call(0, _new_id(), name, text)]
        return [CalledTool(index=0, function=CalledFunction(text))] if text else []


class RequiredCallsParser:
    """Follows the list of calls as it grows: a call is announced when its name is complete, its arguments stream."""

    def __init__(self) -> None:
        self._index = -1
        self._head = ""  # of the call whose name is not complete yet
        self._depth = 0  # of brackets inside the arguments; 0 outside
        self._in_arguments = False
        self._in_string = False
        self._escaped = False

    def push(self, text: str) -> list[CalledTool]:
        result: list[CalledTool] = []
        arguments = ""
        for char in text:
            if self._in_arguments:
                arguments += char
                self._follow(char)
                if not self._in_arguments:
                    result.append(CalledTool(index=self._index, function=CalledFunction(arguments)))
                    arguments = ""
            elif self._head or char == "{":
                self._head += char
                if char == ":" and (match := _HEAD.fullmatch(self._head)):
                    self._index += 1
                    self._head = ""
                    self._in_arguments = True
                    result.append(new_call(self._index, _new_id(), msgspec.json.decode(match[1])))
        if arguments:
            result.append(CalledTool(index=self._index, function=CalledFunction(arguments)))
        return result

    def _follow(self, char: str) -> None:
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self._in_arguments = self._depth > 0


def join_calls(parts: Sequence[CalledTool]) -> list[CalledTool]:
    """The parts of a stream as whole calls."""
    calls: list[CalledTool] = []
    for part in parts:
        if part.id is not msgspec.UNSET:
            calls.append(msgspec.structs.replace(part, index=msgspec.UNSET))
        else:
            last = calls[-1].function
            function = CalledFunction(last.arguments + part.function.arguments, last.name)
            calls[-1] = msgspec.structs.replace(calls[-1], function=function)
    return calls
