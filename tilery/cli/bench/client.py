"""One streaming request over one raw socket, with the time at which each chunk arrived.

`httptools` parses HTTP in C, the event lines are split here, `msgspec` decodes only the fields that count. A chunk
costs some ten microseconds, so that the generator does not measure itself. Connections are not reused: a request
pays for its own, as a new user would.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, cast

import httptools
import msgspec

from tilery.cli.connection import Target, error_message


@dataclass
class RequestResult:
    """What one request did. Times are seconds; `start_time` is `time.perf_counter()`."""

    success: bool = False
    prompt_len: int = 0
    output_len: int = 0
    start_time: float = 0.0
    ttft: float = 0.0
    latency: float = 0.0
    """From sending to the last token (the closing usage chunk does not count)."""
    itl: list[float] = field(default_factory=list)
    """Every gap between two chunks with tokens."""
    text: str = ""
    error: str = ""


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class Timeline:
    """Turns chunks and their times into a `RequestResult`; knows nothing of sockets.

    A chunk counts as tokens if it carries text, or is neither the opening role chunk nor a bare closing chunk: a token
    may decode to nothing yet (half a character). The clock of the last token stops at the last such chunk.
    """

    def __init__(self, start: float, prompt_len: int) -> None:
        self.start = start
        self.prompt_len = prompt_len
        self.times: list[float] = []
        self.texts: list[str] = []
        self.completion_tokens: int | None = None
        self.finished: float | None = None
        self.error = ""

    def add(self, now: float, data: bytes) -> None:
        try:
            chunk = _decode(data)
        except msgspec.DecodeError as error:
            self.error = self.error or f"malformed event: {error}"
            return
        if chunk.error is not None:
            self.error = self.error or error_message(data, 200)
        if chunk.usage is not None:
            self.prompt_len = chunk.usage.prompt_tokens or self.prompt_len
            self.completion_tokens = chunk.usage.completion_tokens or self.completion_tokens
        for choice in chunk.choices:
            text, opening, called = choice.text, False, False
            if choice.delta is not None:
                delta = choice.delta
                text = delta.content or delta.reasoning or delta.reasoning_content
                opening, called = delta.role is not None, bool(delta.tool_calls)
            closing = choice.finish_reason is not None
            if closing:
                self.finished = now
            if text or called or not (opening or closing):
                self.times.append(now)
                self.texts.append(text or "")

    def result(self) -> RequestResult:
        result = RequestResult(prompt_len=self.prompt_len, start_time=self.start, text="".join(self.texts))
        times = self.times or ([self.finished] if self.finished is not None else [])
        if self.error or not times:
            result.error = self.error or "the answer held no tokens"
            return result
        result.success = True
        result.ttft = times[0] - self.start
        result.latency = times[-1] - self.start
        result.itl = [later - earlier for earlier, later in pairwise(times)]
        result.output_len = self.completion_tokens if self.completion_tokens is not None else len(times)
        return result


class _Connection(asyncio.Protocol):
    """Feeds one response to a timeline. `done` is set when the stream is complete, refused or broken."""

    def __init__(self, request: bytes, timeline: Timeline) -> None:
        self.request = request
        self.timeline = timeline
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.parser = httptools.HttpResponseParser(self)
        self.rest = b""
        self.complete = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self.request)  # uvloop's transports share no base class with asyncio's

    def data_received(self, data: bytes) -> None:
        self.now = time.perf_counter()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish(f"malformed HTTP: {error}")

    def on_body(self, body: bytes) -> None:
        if self.parser.get_status_code() != 200:
            self.rest += body
            return
        lines = (self.rest + body).split(b"\n")
        self.rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    self.complete = True
                else:
                    self.timeline.add(self.now, data)

    def on_message_complete(self) -> None:
        status = self.parser.get_status_code()
        if status != 200:
            self._finish(f"HTTP {status}: {error_message(self.rest, status)}")
        elif not self.complete:
            self._finish("the stream ended without [DONE]")
        else:
            self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        if self.complete:
            self._finish()
        else:
            self._finish(f"connection lost: {error}" if error else "the server closed the connection early")

    def _finish(self, error: str = "") -> None:
        if not self.done.done():
            self.timeline.error = self.timeline.error or error
            self.done.set_result(None)


def request_bytes(target: Target, path: str, body: bytes, headers: dict[str, str]) -> bytes:
    name = f"[{target.host}]" if ":" in target.host else target.host
    lines = [
        f"POST {target.prefix}{path} HTTP/1.1",
        f"Host: {name}:{target.port}",
        "Content-Type: application/json",
        "Accept: text/event-stream",
        "Connection: close",
        f"Content-Length: {len(body)}",
        *(f"{key}: {value}" for key, value in headers.items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()  # reads every root certificate: once, not per request


async def send(
    target: Target, path: str, body: bytes, prompt_len: int, headers: dict[str, str], timeout: float
) -> RequestResult:
    """Sends one request and waits for the end of its stream; never raises for what the server does."""
    timeline = Timeline(time.perf_counter(), prompt_len)
    transport = None
    try:
        async with asyncio.timeout(timeout):
            transport, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(request_bytes(target, path, body, headers), timeline),
                target.host,
                target.port,
                ssl=_tls() if target.tls else None,
            )
            await connection.done
    except TimeoutError:
        timeline.error = f"no complete answer within {timeout:g} s"
    except OSError as error:
        timeline.error = str(error)
    finally:
        if transport is not None:
            transport.abort()
    return timeline.result()
