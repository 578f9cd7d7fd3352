"""Start, keys, drain, and the death of the engine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.server.harness import Server, error_of, parse_events, user

STREAM = b'{"prompt": "Hello", "max_tokens": 4000, "stream": true}'


class Background:
    """A request in a thread: `result` waits for its text."""

    def __init__(self, work: Callable[[], str]) -> None:
        self.text = ""
        self.thread = threading.Thread(target=self._run, args=(work,))
        self.thread.start()

    def _run(self, work: Callable[[], str]) -> None:
        self.text = work()

    def result(self, seconds: float = 5) -> str:
        self.thread.join(seconds)
        assert not self.thread.is_alive(), "the request hangs"
        return self.text


def engine_pid(server: Server) -> int:
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(server.process.pid)], capture_output=True, text=True, check=True
    )
    return int(children.stdout.split()[0])


def test_ready_line_and_clean_exit() -> None:
    with Server() as server:
        assert server.ready_line.startswith("Tilery ")
        assert "serving fake on http://127.0.0.1:" in server.ready_line
        assert "(ready in " in server.ready_line
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0


def test_failing_core_says_why() -> None:
    with pytest.raises(RuntimeError, match="The engine could not start: no such model"):
        Server(core="tests.server.fake_core:FailingCore")


def test_missing_model_says_why() -> None:
    code = """
from tilery.engine.config import EngineConfig
from tilery.server import ServerConfig, run
run(EngineConfig(model="/nowhere"), ServerConfig(port=0), core="tests.server.fake_core:FailingCore")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=20)
    assert answer.returncode == 1
    assert "StartError: no model folder '/nowhere'" in answer.stderr
    assert "never retrieved" not in answer.stderr


def test_busy_port_says_so() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"Port {port} on 127.0.0.1 is in use"):
            Server(port=port)


def test_keys() -> None:
    with Server(api_keys=("one", "two"), max_body_bytes=1000) as server:
        for path in ("/health", "/metrics", "/version"):
            assert server.http.get(path).status_code == 200
        for path in ("/v1/models", "/load", "/health/generate"):
            error_of(server.http.get(path), 401)
        error_of(server.chat(), 401)
        for wrong in ("Bearer three", "Basic one", "Bearer", "one", "Bearer onetwo"):
            response = server.http.get("/v1/models", headers={"Authorization": wrong})
            assert error_of(response, 401)["type"] == "AuthenticationError"
            assert response.headers["www-authenticate"] == "Bearer"
        for right in ("Bearer one", "bearer two"):
            assert server.http.get("/v1/models", headers={"Authorization": right}).status_code == 200
        # closed without an admin key, whoever asks
        error_of(server.post("/abort", {"request_id": "x"}, headers={"Authorization": "Bearer one"}), 403)
        large = {"prompt": "x" * 2000}
        error_of(server.post("/v1/completions", large, headers={"Authorization": "Bearer one"}), 413)
        assert server.http.get("/health").status_code == 200


def test_engine_crash_ends_streams_and_health() -> None:
    with Server() as server:
        server.complete("<<slow>>", max_tokens=1)
        open_stream = Background(lambda: server.http.post("/v1/completions", content=STREAM).text)
        waiting = Background(
            lambda: server.http.post("/v1/completions", content=STREAM.replace(b"true", b"false")).text
        )
        server.wait_for("tilery:num_requests_running", 2)
        os.kill(engine_pid(server), signal.SIGKILL)
        *events, last = parse_events(open_stream.result(1.5))
        assert events
        assert last["error"]["code"] == 503
        assert "signal 9" in last["error"]["message"]
        assert "signal 9" in waiting.result(1.5)
        error_of(server.http.get("/health"), 503)
        assert "signal 9" in error_of(server.chat(), 503)["message"]
        assert "retry-after" in server.chat().headers
        assert server.http.get("/v1/models").status_code == 200
        assert server.http.get("/metrics").status_code == 200


@pytest.mark.parametrize(("command", "reason"), [("late-crash", "told to crash"), ("exit", "exit code 7")])
def test_engine_failure_is_told(command: str, reason: str) -> None:
    with Server() as server:
        start = time.monotonic()
        text = server.complete(f"<<{command}>>", max_tokens=4000, stream=True).text
        assert reason in text
        assert "[DONE]" not in text
        assert time.monotonic() - start < 1.5
        error_of(server.http.get("/health"), 503)


@pytest.fixture
def slow() -> Iterator[Server]:
    with Server(drain_seconds=1.0) as server:
        server.complete("<<slow>>", max_tokens=1)
        yield server


def test_drain_finishes_what_runs(slow: Server) -> None:
    running = Background(lambda: slow.complete("Hello", max_tokens=30).text)
    slow.wait_for("tilery:num_requests_running", 1)
    slow.process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    response = slow.chat()
    error_of(response, 503)
    assert response.headers["retry-after"] == "1"
    error_of(slow.http.get("/health"), 503)
    assert '"finish_reason":"length"' in running.result()
    assert slow.process.wait(5) == 0


def test_drain_aborts_after_the_grace(slow: Server) -> None:
    running = Background(lambda: slow.complete("Hello", max_tokens=4000).text)
    slow.wait_for("tilery:num_requests_running", 1)
    slow.process.send_signal(signal.SIGTERM)
    assert '"finish_reason":"abort"' in running.result()
    assert slow.process.wait(5) == 0


def test_second_signal_ends_at_once(slow: Server) -> None:
    def request() -> str:
        try:
            return slow.complete("Hello", max_tokens=4000).text
        except Exception as error:
            return repr(error)

    running = Background(request)
    slow.wait_for("tilery:num_requests_running", 1)
    slow.process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    start = time.monotonic()
    slow.process.send_signal(signal.SIGTERM)
    slow.process.wait(3)
    assert time.monotonic() - start < 0.8
    running.result()


def sockets() -> set[Path]:
    """The private folders of all engines of this machine."""
    return set(Path(tempfile.gettempdir()).glob("tilery-*"))


def test_engine_leaves_with_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    before = sockets()
    with Server() as server:
        pid = engine_pid(server)
        assert sockets() > before
        server.process.kill()
        server.process.wait()
        end = time.monotonic() + 2
        while os.path.exists(f"/proc/{pid}") and "Z" not in _state(pid):
            assert time.monotonic() < end, "the engine outlived its parent"
            time.sleep(0.02)
        assert sockets() <= before


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"


def test_browsers_need_an_allowed_origin() -> None:
    with Server(cors_origins=("https://a.example",)) as server:
        allowed = server.http.get("/health", headers={"Origin": "https://a.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        assert "access-control-allow-origin" not in server.http.get("/health", headers={"Origin": "https://b"}).headers
        body = {"messages": [user("Hello")], "max_tokens": 2}
        assert server.post("/v1/chat/completions", body, headers={"Origin": "https://a.example"}).status_code == 200
