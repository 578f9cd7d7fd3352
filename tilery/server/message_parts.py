"""One interface over the ways in which generated text becomes a message: its parts (reasoning, content, tool calls).

Verbatim      constrained output: all of it is content
Forced        tool_choice required or named: all of it is tool calls (tool_choice.py)
ModelFormat   the model's own markers for reasoning and tool calls (server.chat)
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from tilery.server.chat import ChatParser, DeltaKind
from tilery.server.responses import CalledFunction, CalledTool
from tilery.server.tool_choice import NamedCallParser, RequiredCallsParser, new_call


class Parts(msgspec.Struct, gc=False):
    """What one piece of text adds to the message."""

    content: str = ""
    reasoning: str = ""
    calls: list[CalledTool] = []


class PartsParser(Protocol):
    def push(self, text: str, last: bool) -> Parts: ...


class Verbatim:
    def push(self, text: str, last: bool) -> Parts:
        return Parts(content=text)


class Forced:
    def __init__(self, parser: NamedCallParser | RequiredCallsParser) -> None:
        self._parser = parser

    def push(self, text: str, last: bool) -> Parts:
        return Parts(calls=self._parser.push(text))


class ModelFormat:
    def __init__(self, parser: ChatParser) -> None:
        self._parser = parser

    def push(self, text: str, last: bool) -> Parts:
        deltas = self._parser.push(text)
        if last:
            deltas += self._parser.finish()
        parts = Parts()
        for delta in deltas:
            kind = delta.kind
            if kind is DeltaKind.CONTENT:
                parts.content += delta.text
            elif kind is DeltaKind.REASONING:
                parts.reasoning += delta.text
            elif kind is DeltaKind.TOOL_START:
                parts.calls = [*parts.calls, new_call(delta.index, delta.id, delta.name)]
            else:
                part = CalledTool(index=delta.index, function=CalledFunction(delta.text))
                parts.calls = [*parts.calls, part]
        return parts
