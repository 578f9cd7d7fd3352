"""A real server process over the fake core, on a free port of the loopback interface."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import msgspec

from tilery.server import ServerConfig

MAIN = """
import sys, msgspec
from tests.server.fake_core import MODEL
from tilery.engine.config import EngineConfig
from tilery.server import ServerConfig, run
run(EngineConfig(model=MODEL), msgspec.json.decode(sys.argv[1], type=ServerConfig), core=sys.argv[2])
"""


class Server:
    """Use it as a context manager; leaving it ends the processes."""

    def __init__(self, core: str = "tests.server.fake_core:FakeCore", **settings: Any) -> None:
        config = msgspec.json.encode(ServerConfig(**{"port": 0, **settings})).decode()
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, config, core],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline()
        if not self.ready_line:
            raise RuntimeError(self.process.communicate()[1])
        self.url = self.ready_line.split(" on ")[1].split(" ")[0]
        self.http = httpx.Client(base_url=self.url, timeout=10, trust_env=False)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                self.process.send_signal(number)
                try:
                    self.process.wait(2)
                except subprocess.TimeoutExpired:
                    continue
        self.process.communicate()

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.http.post(path, content=content, **options)

    def complete(self, prompt: Any = "Hello", **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt, "max_tokens": 4, **fields})

    def chat(self, text: str = "Hello", **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": [user(text)], "max_tokens": 4, **fields})

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The decoded events of a stream; the last one is the string "[DONE]" if it was sent."""
        response = self.post(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return list(parse_events(response.text))

    def metric(self, name: str) -> float:
        """The sum over the samples of that name."""
        lines = self.http.get("/metrics").text.splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name]
        assert values, f"no metric {name}"
        return sum(values)

    def wait_for(self, name: str, value: float, seconds: float = 3.0) -> None:
        end = time.monotonic() + seconds
        while self.metric(name) != value:
            assert time.monotonic() < end, f"{name} is {self.metric(name)}, not {value}, after {seconds} s"
            time.sleep(0.02)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def parse_events(text: str) -> Iterator[Any]:
    for line in text.split("\n\n"):
        if line:
            assert line.startswith("data: "), line
            yield "[DONE]" if line == "data: [DONE]" else json.loads(line.removeprefix("data: "))


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, after checking the envelope."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == status
    assert body["error"]["message"]
    return body["error"]
