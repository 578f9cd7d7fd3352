"""A tiny OpenAI-style server on a raw socket, scripted by the test, and the command line in this process."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tilery.cli.main import run


@dataclass
class Script:
    """How the server behaves; tests change it before they connect."""

    pieces: Callable[[dict[str, Any]], list[str]] = lambda body: ["a", " b", " c"]
    delay: float = 0.0
    """Seconds before each chunk."""
    status: Callable[[int], int] = lambda number: 200
    """HTTP status of the n-th generation request."""
    usage: bool = True
    done: bool = True
    split: int = 0
    """Bytes per write; 0: whole events."""
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "tiny", "max_model_len": 1000}])
    metrics: list[str] = field(default_factory=list)
    """Successive answers of /metrics."""


@dataclass
class FakeServer:
    script: Script = field(default_factory=Script)
    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    open_now: int = 0
    open_most: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {key.lower(): value for key, _, value in (line.partition(": ") for line in lines if line)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            await self.answer(request_line.split()[1], headers, json.loads(body or b"null"), writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def answer(
        self, path: str, headers: dict[str, str], body: dict[str, Any], writer: asyncio.StreamWriter
    ) -> None:
        if path == "/v1/models":
            self.whole(writer, 200, {"data": self.script.models})
        elif path == "/tokenize":
            self.whole(writer, 200, {"tokens": [5, 6, 7, 8, 9, 7]})
        elif path == "/detokenize":
            self.whole(writer, 200, {"prompt": " ".join(map(str, body["tokens"]))})
        elif path == "/metrics" and self.script.metrics:
            page = self.script.metrics.pop(0).encode()
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(page)}\r\n\r\n".encode() + page)
        elif path in ("/v1/completions", "/v1/chat/completions"):
            self.bodies.append(body)
            self.headers.append(headers)
            self.open_now += 1
            self.open_most = max(self.open_most, self.open_now)
            try:
                await self.generate("chat" in path, body, writer)
            finally:
                self.open_now -= 1
        else:
            self.whole(writer, 404, {"error": {"message": f"no {path} here"}})

    def whole(self, writer: asyncio.StreamWriter, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)

    async def generate(self, chat: bool, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        status = self.script.status(len(self.bodies))
        if status != 200:
            self.whole(writer, status, {"error": {"message": "not today"}})
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        pieces = self.script.pieces(body)
        events: list[Any] = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}] if chat else []
        for position, piece in enumerate(pieces):
            finish = "length" if position == len(pieces) - 1 else None
            text = {"delta": {"content": piece}} if chat else {"text": piece}
            events.append({"choices": [{**text, "finish_reason": finish}]})
        if self.script.usage:
            events.append({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(pieces)}})
        for event in events:
            if self.script.delay and event["choices"]:
                await asyncio.sleep(self.script.delay)
            await self.event(writer, json.dumps(event))
        if self.script.done:
            await self.event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")

    async def event(self, writer: asyncio.StreamWriter, data: str) -> None:
        payload = f"data: {data}\n\n".encode()
        size = self.script.split or len(payload)
        for start in range(0, len(payload), size):
            part = payload[start : start + size]
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            if self.script.split:
                await writer.drain()
                await asyncio.sleep(0)


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    server, started, loop = FakeServer(), threading.Event(), asyncio.new_event_loop()

    async def main() -> None:
        listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
        server.port = listener.sockets[0].getsockname()[1]
        server.stop = asyncio.Event()  # type: ignore[attr-defined]
        started.set()
        async with listener:
            await server.stop.wait()  # type: ignore[attr-defined]

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),), daemon=True)
    thread.start()
    assert started.wait(10)
    yield server
    loop.call_soon_threadsafe(server.stop.set)  # type: ignore[attr-defined]
    thread.join(10)


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def tilery(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`tilery("serve", "--help")` in this process."""

    def call(*arguments: str) -> Ran:
        code = run(list(arguments))
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call
