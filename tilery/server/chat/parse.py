"""Generated text of DeepSeek-V3.1 / V3.2-Exp to reasoning, content and tool calls, while it streams.

    reasoning </think> content <｜tool▁calls▁begin｜> call call ... <｜tool▁calls▁end｜>
    |                                                 |
    if the prompt ends with <think>                   <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>JSON<｜tool▁call▁end｜>

The parser sees text, so the markers must be in it: detokenise with `params_for_parsing` (special tokens visible). The
output processor leaves out a final end-of-sequence token; the parser drops any that remains (`ignore_eos`).

However the text is cut into pieces, the joined result is the same. Text is handed on as soon as it cannot be part of a
marker; only a tool's name waits for `<｜tool▁sep｜>`. What has been handed on is never taken back, so a call counts
from its separator: arguments stream as they come and may be cut short by a length limit, as in OpenAI's API. Before
that point a malformed call becomes ordinary text again, markers included. Lenient where models are sloppy: a call
without the outer begin marker, a missing `<｜tool▁call▁end｜>`, blanks between calls, a call that starts inside the
reasoning (it ends the reasoning; V3.1 does so in thinking mode), a leading `<think>`.
"""

from __future__ import annotations

import re
import secrets
from enum import Enum, StrEnum, auto

import msgspec

from tilery.engine.messages import SamplingParams
from tilery.server.chat.render import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    EOS,
    SEPARATOR,
    THINK_BEGIN,
    THINK_END,
)

_MAX_NAME = 256
"""Longer than this between begin and separator is not a tool's name."""


class DeltaKind(StrEnum):
    REASONING = "reasoning"
    CONTENT = "content"
    TOOL_START = "tool_start"  # index, id and name are set
    TOOL_ARGUMENTS = "tool_arguments"  # index and text are set


class ChatDelta(msgspec.Struct, frozen=True):
    kind: DeltaKind
    text: str = ""
    index: int = 0
    """Which tool call, from 0."""
    id: str = ""
    name: str = ""


class ToolCall(msgspec.Struct, frozen=True):
    id: str
    name: str
    arguments: str
    """Text as the model wrote it: usually, but not certainly, JSON."""


class ParsedMessage(msgspec.Struct, frozen=True):
    content: str
    reasoning: str
    tool_calls: list[ToolCall]


def params_for_parsing(params: SamplingParams) -> SamplingParams:
    """The same, with special tokens visible in the text, as `ChatParser` needs it."""
    return msgspec.structs.replace(params, skip_special_tokens=False)


def parse(text: str, *, thinking: bool = False, tools: bool = True) -> ParsedMessage:
    """A whole answer at once."""
    parser = ChatParser(thinking=thinking, tools=tools)
    return collect([*parser.push(text), *parser.finish()])


def collect(deltas: list[ChatDelta]) -> ParsedMessage:
    """The message that a stream of deltas adds up to."""
    texts: dict[DeltaKind, list[str]] = {kind: [] for kind in DeltaKind}
    calls: list[tuple[str, str, list[str]]] = []
    for delta in deltas:
        if delta.kind is DeltaKind.TOOL_START:
            calls.append((delta.id, delta.name, []))
        elif delta.kind is DeltaKind.TOOL_ARGUMENTS:
            calls[delta.index][2].append(delta.text)
        else:
            texts[delta.kind].append(delta.text)
    return ParsedMessage(
        content="".join(texts[DeltaKind.CONTENT]),
        reasoning="".join(texts[DeltaKind.REASONING]),
        tool_calls=[ToolCall(id, name, "".join(arguments)) for id, name, arguments in calls],
    )


class _State(Enum):
    START = auto()  # before the first character: a leading <think> is possible
    REASONING = auto()
    CONTENT = auto()
    BETWEEN = auto()  # inside the block of calls, outside a call
    NAME = auto()
    ARGUMENTS = auto()


_OPENERS = (CALLS_BEGIN, CALL_BEGIN)
_ALL_CALL_MARKERS = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)
_MARKERS: dict[_State, tuple[str, ...]] = {
    _State.REASONING: (THINK_END, *_OPENERS),
    _State.CONTENT: _OPENERS,
    _State.BETWEEN: _ALL_CALL_MARKERS,
    _State.NAME: _ALL_CALL_MARKERS,
    _State.ARGUMENTS: (CALL_END, CALLS_END, CALL_BEGIN),
}
"""What to look for in each state. Every marker has its only "<" at its start."""


class ChatParser:
    """`thinking`: the text starts inside the reasoning. `tools`: look for tool calls. Never raises."""

    def __init__(self, *, thinking: bool = False, tools: bool = True) -> None:
        self._thinking = thinking
        self._markers = _MARKERS if tools else {**_MARKERS, _State.REASONING: (THINK_END,), _State.CONTENT: ()}
        self._patterns = _PATTERNS_WITH_TOOLS if tools else _PATTERNS_WITHOUT_TOOLS
        self._state = _State.START
        self._outer = _State.CONTENT
        """Where a malformed call's text belongs: reasoning or content."""
        self._raw = ""
        """Input that may be the beginning of an end-of-sequence marker."""
        self._buffer = ""
        """Input without end-of-sequence markers, not yet processed."""
        self._pending = ""
        """Markers and blanks of a call that is not certain yet, to be given back if it is malformed."""
        self._gap = ""
        """Blanks inside the block of calls; they mean nothing if a call or the end of the block follows."""
        self._name = ""
        self._num_calls = 0
        self._deltas: list[ChatDelta] = []

    def push(self, text: str) -> list[ChatDelta]:
        raw = (self._raw + text).replace(EOS, "")
        cut = _certain(raw, (EOS,))
        self._raw = raw[cut:]
        self._buffer += raw[:cut]
        self._process(final=False)
        return self._take()

    def finish(self) -> list[ChatDelta]:
        """At the end of the text: what was held back. The parser is over after it."""
        self._buffer += self._raw
        self._raw = ""
        self._process(final=True)
        if self._state is _State.NAME or (self._state is _State.BETWEEN and self._pending):
            self._give_back()
            self._process(final=True)
        return self._take()

    def _process(self, final: bool) -> None:
        if self._state is _State.START and not self._start(final):
            return
        while True:
            state = self._state
            pattern = self._patterns[state]
            match = pattern.search(self._buffer) if pattern is not None else None
            if match is not None:
                cut = match.start()
            else:
                cut = len(self._buffer) if final else _certain(self._buffer, self._markers[state])
            text, self._buffer = self._buffer[:cut], self._buffer[cut:]
            if text:
                self._on_text(text)
                if self._state is not state:
                    continue  # given back: look at it with other eyes
            if match is None:
                return
            self._buffer = self._buffer[len(match[0]) :]
            self._on_marker(match[0])

    def _start(self, final: bool) -> bool:
        """Whether the first state is known."""
        if self._buffer.startswith(THINK_BEGIN):
            self._buffer = self._buffer[len(THINK_BEGIN) :]
            self._state = _State.REASONING
        elif THINK_BEGIN.startswith(self._buffer) and not final:
            return False
        else:
            self._state = _State.REASONING if self._thinking else _State.CONTENT
        return True

    def _on_text(self, text: str) -> None:
        match self._state:
            case _State.REASONING | _State.CONTENT:
                self._emit_plain(text)
            case _State.ARGUMENTS:
                self._emit(ChatDelta(DeltaKind.TOOL_ARGUMENTS, text, index=self._num_calls - 1))
            case _State.NAME:
                self._name += text
                if not _may_be_name(self._name):
                    self._give_back()
            case _State.BETWEEN:
                if text.strip():
                    self._give_back(text)
                else:
                    self._gap += text

    def _on_marker(self, marker: str) -> None:
        match self._state:
            case _State.REASONING | _State.CONTENT:
                if marker == THINK_END:
                    self._state = _State.CONTENT
                else:
                    self._outer = self._state
                    self._open(marker)
            case _State.BETWEEN if marker == CALL_BEGIN:
                before = self._pending + self._gap if self._pending else ""
                self._open(before + marker)
            case _State.BETWEEN if marker == CALLS_END and not self._pending:
                self._gap = ""
                self._state = _State.CONTENT
            case _State.NAME if marker == SEPARATOR and self._name.strip():
                self._start_call()
            case _State.ARGUMENTS if marker == CALL_BEGIN:  # the end marker is missing
                self._open(marker)
            case _State.ARGUMENTS:
                self._state = _State.BETWEEN if marker == CALL_END else _State.CONTENT
            case _:  # malformed
                self._give_back(marker)

    def _open(self, pending: str) -> None:
        """A block of calls or, if it ends with that marker, a call begins."""
        self._pending = pending
        self._gap = ""
        self._state = _State.NAME if pending.endswith(CALL_BEGIN) else _State.BETWEEN

    def _start_call(self) -> None:
        self._emit(
            ChatDelta(
                DeltaKind.TOOL_START,
                index=self._num_calls,
                id=f"call_{secrets.token_hex(12)}",
                name=self._name.strip(),
            )
        )
        self._num_calls += 1
        self._pending = self._name = ""
        self._outer = _State.CONTENT
        self._state = _State.ARGUMENTS

    def _give_back(self, rest: str = "") -> None:
        """There is no call here: its markers become plain text, what came after them is looked at again as such."""
        self._state = self._outer
        if self._pending:
            self._emit_plain(self._pending)
        self._buffer = self._gap + self._name + rest + self._buffer
        self._pending = self._gap = self._name = ""

    def _emit_plain(self, text: str) -> None:
        kind = DeltaKind.REASONING if self._state is _State.REASONING else DeltaKind.CONTENT
        self._emit(ChatDelta(kind, text))

    def _emit(self, delta: ChatDelta) -> None:
        """Joins to the delta before where both are text of the same kind and index."""
        if self._deltas and delta.kind is not DeltaKind.TOOL_START:
            last = self._deltas[-1]
            if (last.kind, last.index) == (delta.kind, delta.index):
                delta = ChatDelta(delta.kind, last.text + delta.text, index=delta.index)
                self._deltas.pop()
        self._deltas.append(delta)

    def _take(self) -> list[ChatDelta]:
        deltas, self._deltas = self._deltas, []
        return deltas


def _pattern(markers: tuple[str, ...]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, markers))) if markers else None


_PATTERNS_WITH_TOOLS = {state: _pattern(markers) for state, markers in _MARKERS.items()}
_PATTERNS_WITHOUT_TOOLS = {
    **_PATTERNS_WITH_TOOLS,
    _State.REASONING: _pattern((THINK_END,)),
    _State.CONTENT: None,
}


def _certain(text: str, markers: tuple[str, ...]) -> int:
    """How much of `text`, which contains no whole marker, cannot be the beginning of one."""
    start = text.rfind("<")
    if start >= 0:
        tail = text[start:]
        if any(marker.startswith(tail) for marker in markers):
            return start
    return len(text)


def _may_be_name(text: str) -> bool:
    name = text.strip()
    return len(name) <= _MAX_NAME and not {"\n", "<"} & set(name)
