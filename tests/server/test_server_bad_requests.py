"""Whatever a client sends, it gets a 4xx with a message or a valid answer, never a 5xx, and the server goes on."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.harness import Server, error_of, user

ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([-1, 0, 1, 2, 2**31, 2**63, 2**64]),
    st.floats(),
    st.text(max_size=8),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = (
    *("model", "prompt", "messages", "stream", "stream_options", "n", "max_tokens", "max_completion_tokens"),
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("logit_bias", "seed", "stop", "stop_token_ids", "response_format", "min_tokens", "ignore_eos", "echo"),
    *("logprobs", "top_logprobs", "prompt_logprobs", "return_token_ids", "priority", "cache_salt", "best_of"),
    *("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "suffix", "tokens"),
    *("tools", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "add_generation_prompt"),
    *("continue_final_message", "skip_special_tokens", "add_special_tokens", "include_stop_str_in_output"),
)
VALID: dict[str, Any] = {
    "prompt": "Hello",
    "messages": [user("Hello")],
    "max_tokens": 2,
    "tokens": [1, 2],
}
fields = st.dictionaries(st.sampled_from(FIELDS), values, max_size=3)
tool = st.fixed_dictionaries(
    {"type": values, "function": st.fixed_dictionaries({"name": values, "parameters": values})}
)
message = st.dictionaries(st.sampled_from(("role", "content", "tool_calls", "name", "reasoning", "prefix")), values)


def check(server: Server, path: str, body: bytes) -> None:
    response = server.http.post(path, content=body)
    if response.status_code != 200:
        assert 400 <= response.status_code < 500, (path, body, response.text)
        error_of(response, response.status_code)
    assert b"InternalServerError" not in response.content  # as an event of a stream


@settings(max_examples=200)
@given(path=st.sampled_from(ENDPOINTS), changed=fields)
def test_any_value_in_any_field(server: Server, path: str, changed: dict[str, Any]) -> None:
    given = {**VALID, **changed}
    if path == "/tokenize" and not changed:
        return
    if isinstance(given.get("max_tokens"), int | None):
        given["max_tokens"] = min(given["max_tokens"] or 2, 4)  # valid requests must stay short
    if isinstance(given.get("max_completion_tokens"), int):
        given["max_completion_tokens"] = min(given["max_completion_tokens"], 4)
    check(server, path, json.dumps(given).encode("utf-8", "surrogatepass"))


@settings(max_examples=100)
@given(messages=st.lists(message | values, max_size=3), tools=st.lists(tool, max_size=2), choice=values)
def test_any_conversation(server: Server, messages: list[Any], tools: list[Any], choice: Any) -> None:
    body = {"messages": messages, "tools": tools, "tool_choice": choice, "max_tokens": 2}
    check(server, "/v1/chat/completions", json.dumps(body).encode("utf-8", "surrogatepass"))


@settings(max_examples=100)
@given(path=st.sampled_from(ENDPOINTS), body=st.binary(max_size=40) | values.map(lambda v: json.dumps(v).encode()))
def test_any_bytes(server: Server, path: str, body: bytes) -> None:
    check(server, path, body)


@settings(max_examples=50)
@given(path=st.sampled_from(ENDPOINTS), position=st.integers(0, 200), byte=st.integers(0, 255))
def test_damaged_body(server: Server, path: str, position: int, byte: int) -> None:
    body = bytearray(json.dumps(VALID).encode())
    body[position % len(body)] = byte
    check(server, path, bytes(body))


def test_still_answers_after_all_that(server: Server) -> None:
    assert server.chat().status_code == 200
    server.wait_for("tilery:num_requests_running", 0)
