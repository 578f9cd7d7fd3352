"""Streams: the order of events, what ends them, and what happens when the client leaves."""

from __future__ import annotations

import json
import socket
import time

import pytest

from tests.server.harness import Server, user
from tests.server.test_server_api import ADMIN, TOOLS

CHAT = {"messages": [user("Hello")], "max_tokens": 4}


def test_chat_order(server: Server) -> None:
    events = server.events("/v1/chat/completions", {**CHAT, "stream_options": {"include_usage": True}})
    assert events[-1] == "[DONE]"
    first, *middle, last, usage = events[:-1]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(event["choices"][0]["finish_reason"] is None for event in [first, *middle])
    assert [event["choices"][0]["delta"]["content"] for event in [*middle, last]] == [" one", " two", " three", " four"]
    assert last["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 4
    assert all(event["usage"] is None for event in [first, *middle, last])
    assert {event["object"] for event in events[:-1]} == {"chat.completion.chunk"}
    assert len({(event["id"], event["created"], event["model"]) for event in events[:-1]}) == 1


def test_completion_order(server: Server) -> None:
    events = server.events("/v1/completions", {"prompt": "Hello", "max_tokens": 3})
    assert events[-1] == "[DONE]"
    assert [event["choices"][0]["text"] for event in events[:-1]] == [" one", " two", " three"]
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None, None, "length"]
    assert "usage" not in events[0]


def test_continuous_usage(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = server.events("/v1/completions", {"prompt": "Hello", "max_tokens": 3, "stream_options": options})
    assert [event["usage"]["completion_tokens"] for event in events[:-1]][-2:] == [3, 3]
    assert all(event["usage"]["prompt_tokens"] for event in events[:-1])


def test_stream_equals_whole(server: Server) -> None:
    """The same request with and without stream gives the same text, log-probabilities and token ids."""
    fields = {"prompt": ["a", "b"], "n": 2, "max_tokens": 5, "logprobs": 1, "echo": True, "return_token_ids": True}
    fields |= {"stop": "four", "seed": 1}
    whole = {choice["index"]: choice for choice in server.post("/v1/completions", fields).json()["choices"]}
    joined: dict[int, dict] = {index: {"text": "", "token_ids": [], "tokens": []} for index in whole}
    for event in server.events("/v1/completions", fields)[:-1]:
        for choice in event["choices"]:
            into = joined[choice["index"]]
            into["text"] += choice["text"]
            into["token_ids"] += choice["token_ids"]
            into["tokens"] += choice["logprobs"]["tokens"]
    for index, choice in whole.items():
        assert joined[index]["text"] == choice["text"]
        assert joined[index]["token_ids"] == choice["token_ids"]
        assert joined[index]["tokens"] == choice["logprobs"]["tokens"]


def test_every_choice_gets_its_role(server: Server) -> None:
    events = server.events("/v1/chat/completions", {**CHAT, "n": 3})
    roles = [event["choices"][0]["index"] for event in events[:-1] if "role" in event["choices"][0]["delta"]]
    assert roles == [0, 1, 2]


def test_reasoning_stream(server: Server) -> None:
    body = {**CHAT, "messages": [user("<<say:Hmm, hmm.</think>Yes, of course.>>")], "max_tokens": 50}
    events = server.events("/v1/chat/completions", {**body, "chat_template_kwargs": {"thinking": True}})
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "Hmm, hmm."
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hmm, hmm."
    assert "".join(delta.get("content", "") for delta in deltas) == "Yes, of course."


def test_required_tools_stream(server: Server) -> None:
    text = '[{"name":"weather","parameters":{"city":"Ulm"}},{"name":"time","parameters":{}}]'
    body = {"messages": [user(f"<<say:{text}>>")], "tools": TOOLS, "tool_choice": "required", "max_tokens": 100}
    events = server.events("/v1/chat/completions", body)
    calls: dict[int, list] = {}
    for event in events[:-1]:
        for part in event["choices"][0]["delta"].get("tool_calls", []):
            if "id" in part:
                calls[part["index"]] = [part["function"]["name"], ""]
            calls[part["index"]][1] += part["function"]["arguments"]
    assert calls == {0: ["weather", '{"city":"Ulm"}'], 1: ["time", "{}"]}
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"


def raw_stream(server: Server, prompt: str) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    body = json.dumps({"prompt": prompt, "max_tokens": 4000, "stream": True}).encode()
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert b"200 OK" in connection.recv(4096)
    return connection


@pytest.fixture(scope="module")
def slow_server() -> object:
    with Server(admin_key="admin") as server:
        server.complete("<<slow>>", max_tokens=1)
        yield server


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_aborts(slow_server: Server, stream: bool) -> None:
    before = slow_server.metric("tilery:num_preemptions_total")  # the fake core counts aborted children here
    if stream:
        connection = raw_stream(slow_server, "Hello")
    else:
        host, port = slow_server.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)))
        body = b'{"prompt": "Hello", "max_tokens": 4000}'
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    slow_server.wait_for("tilery:num_requests_running", 1)
    connection.close()
    slow_server.wait_for("tilery:num_preemptions_total", before + 1, seconds=1)
    slow_server.wait_for("tilery:num_requests_running", 0, seconds=1)
    assert slow_server.http.get("/load").json()["server_load"] == 0


def test_abort_endpoint(slow_server: Server) -> None:
    with slow_server.http.stream(
        "POST", "/v1/completions", content=b'{"prompt": "Hello", "max_tokens": 4000, "stream": true}'
    ) as response:
        lines = response.iter_lines()
        id = json.loads(next(lines).removeprefix("data: "))["id"]
        answer = slow_server.post("/abort", {"request_id": id}, headers=ADMIN)
        assert answer.json() == {"aborted": [id]}
        events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "abort"


def test_slow_reader_is_aborted_when_it_leaves(slow_server: Server) -> None:
    connections = [raw_stream(slow_server, "Hello") for _ in range(8)]
    slow_server.wait_for("tilery:num_requests_running", 8)
    time.sleep(0.1)
    for connection in connections:
        connection.close()
    slow_server.wait_for("tilery:num_requests_running", 0, seconds=1)
