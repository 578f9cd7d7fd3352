"""Every endpoint's contract: fields, status codes, errors."""

from __future__ import annotations

import json

import pytest

import tilery
from tests.server.harness import Server, error_of, user

ADMIN = {"Authorization": "Bearer admin"}


def test_models(server: Server) -> None:
    body = server.http.get("/v1/models").json()
    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == ["fake", "org/fake-2"]
    card = body["data"][0]
    assert (card["object"], card["max_model_len"], card["root"], card["parent"]) == ("model", 4096, "fake", None)
    assert server.http.get("/v1/models/org/fake-2").json()["id"] == "org/fake-2"
    error_of(server.http.get("/v1/models/other"), 404)


def test_completion(server: Server) -> None:
    body = server.complete("Hello", max_tokens=3).json()
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"]) == ("text_completion", "fake")
    [choice] = body["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (" one two three", "length", None)
    usage = body["usage"]
    assert usage["completion_tokens"] == 3
    assert usage["total_tokens"] == usage["prompt_tokens"] + 3
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_cached_tokens(server: Server) -> None:
    usage = server.complete([5] * 130, n=2).json()["usage"]
    assert usage["prompt_tokens"] == 130
    assert usage["prompt_tokens_details"]["cached_tokens"] == 128
    assert server.complete([[5] * 130, [5] * 64]).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 192


def test_default_max_tokens(server: Server) -> None:
    assert server.complete(max_tokens=None).json()["usage"]["completion_tokens"] == 16
    assert server.complete([5] * 4090, max_tokens=None).json()["usage"]["completion_tokens"] == 6
    assert server.chat(max_tokens=None, max_completion_tokens=2).json()["usage"]["completion_tokens"] == 2


def test_prompt_forms(server: Server) -> None:
    assert len(server.complete(["a", "b", "c"]).json()["choices"]) == 3
    assert server.complete([1, 2, 3]).json()["usage"]["prompt_tokens"] == 3
    body = server.complete([[1, 2], [3]], n=2).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 16


def test_stop_string_ends_and_aborts(server: Server) -> None:
    [choice] = server.complete(max_tokens=4000, stop=[" three", "x"]).json()["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (" one two", "stop", " three")
    [choice] = server.complete(max_tokens=4000, stop=" three", include_stop_str_in_output=True).json()["choices"]
    assert choice["text"] == " one two three"
    server.wait_for("tilery:num_requests_running", 0)


def test_stop_string_of_every_choice(server: Server) -> None:
    body = server.complete(["a", "b"], n=2, max_tokens=4000, stop=" four").json()
    assert [choice["text"] for choice in body["choices"]] == [" one two three"] * 4
    server.wait_for("tilery:num_requests_running", 0)


def test_end_of_sequence(server: Server) -> None:
    [choice] = server.complete("<<say:Good evening.>>", max_tokens=100).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Good evening.", "stop")


def test_echo_and_logprobs(server: Server) -> None:
    [choice] = server.complete("Hello", max_tokens=2, echo=True, logprobs=2).json()["choices"]
    assert choice["text"] == "Hello one two"
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["tokens"][-2:] == [" one", " two"]
    assert logprobs["text_offset"][-2:] == [5, 9]
    assert logprobs["top_logprobs"][-1][" two"] == -0.5
    assert len({len(values) for values in logprobs.values()}) == 1
    assert server.complete("Hello").json()["choices"][0]["logprobs"] is None
    assert server.complete("Hello", logprobs=0).json()["choices"][0]["logprobs"]["top_logprobs"][0] == {" one": -0.5}


def test_prompt_logprobs_and_token_ids(server: Server) -> None:
    [choice] = server.complete([5, 6, 7], prompt_logprobs=1, return_token_ids=True).json()["choices"]
    assert choice["prompt_token_ids"] == [5, 6, 7]
    assert len(choice["token_ids"]) == 4
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1]["6"]["rank"] == 1
    assert "token_ids" not in server.complete([5]).json()["choices"][0]


def test_chat(server: Server) -> None:
    body = server.chat("<<say:Good evening.>>", max_tokens=50, n=2).json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    message = body["choices"][1]["message"]
    assert (message["role"], message["content"]) == ("assistant", "Good evening.")
    assert "tool_calls" not in message
    assert body["choices"][0]["finish_reason"] == "stop"


def test_chat_logprobs(server: Server) -> None:
    [choice] = server.chat(logprobs=True, top_logprobs=2, max_tokens=1).json()["choices"]
    [entry] = choice["logprobs"]["content"]
    assert (entry["token"], entry["logprob"], bytes(entry["bytes"])) == (" one", -0.5, b" one")
    assert len(entry["top_logprobs"]) == 2


def test_reasoning_has_both_names(server: Server) -> None:
    body = server.chat("<<say:I think.</think>Yes.>>", max_tokens=50, chat_template_kwargs={"thinking": True}).json()
    message = body["choices"][0]["message"]
    assert message["content"] == "Yes."
    assert message["reasoning"] == message["reasoning_content"] == "I think."


TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("weather", "time")
]


def test_named_tool(server: Server) -> None:
    choice = {"type": "function", "function": {"name": "time"}}
    body = server.chat('<<say:{"zone":"UTC"}>>', tools=TOOLS, tool_choice=choice, max_tokens=50).json()
    [call] = body["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "time", "arguments": '{"zone":"UTC"}'}
    assert call["type"] == "function"
    assert call["id"]
    assert "index" not in call
    assert body["choices"][0]["message"]["content"] is None
    assert body["choices"][0]["finish_reason"] == "tool_calls"


def test_required_tools(server: Server) -> None:
    text = '[{"name":"weather","parameters":{"city":"Ulm"}},{"name":"time","parameters":{}}]'
    body = server.chat(f"<<say:{text}>>", tools=TOOLS, tool_choice="required", max_tokens=100).json()
    calls = [call["function"] for call in body["choices"][0]["message"]["tool_calls"]]
    assert calls == [{"name": "weather", "arguments": '{"city":"Ulm"}'}, {"name": "time", "arguments": "{}"}]


def test_tokenize_and_back(server: Server) -> None:
    body = server.post("/tokenize", {"prompt": "Hello world", "return_token_strs": True}).json()
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == 4096
    assert "Hello world" in server.post("/detokenize", {"tokens": body["tokens"]}).json()["prompt"]
    bare = server.post("/tokenize", {"prompt": "Hello world", "add_special_tokens": False}).json()
    assert bare["tokens"] == body["tokens"][1:]
    assert bare["token_strs"] is None
    chat = server.post("/tokenize", {"messages": [user("Hi")]}).json()
    assert server.chat("Hi").json()["usage"]["prompt_tokens"] == chat["count"]
    error_of(server.post("/tokenize", {}), 400)
    error_of(server.post("/detokenize", {"tokens": [10**6]}), 400)


def test_health_version_load(server: Server) -> None:
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.head("/health").status_code == 200
    assert server.http.get("/health/generate").json() == {"status": "ok", "tokens": 1}
    assert server.http.get("/version").json() == {"version": tilery.__version__}
    assert server.http.get("/load").json()["server_load"] == 0


def test_metrics(server: Server) -> None:
    server.complete("Hello", max_tokens=3)
    text = server.http.get("/metrics").text
    for prefix in ("tilery", "vllm"):
        assert f'{prefix}:num_requests_running{{engine="0",model_name="fake"}} 0.0' in text
        assert f'{prefix}:request_success_total{{engine="0",finished_reason="length",model_name="fake"}}' in text
        assert server.metric(f"{prefix}:time_to_first_token_seconds_count") > 0
        assert server.metric(f"{prefix}:generation_tokens_total") >= 3
    assert "tilery:dsa_dense_steps_total" in text
    assert "vllm:dsa" not in text


def test_model_names(server: Server) -> None:
    assert server.complete(model="org/fake-2").json()["model"] == "org/fake-2"
    error = error_of(server.complete(model="gpt-9"), 404)
    assert error["type"] == "NotFoundError"
    assert "`fake`" in error["message"]
    assert "`org/fake-2`" in error["message"]


def test_context_limit_says_both_numbers(server: Server) -> None:
    message = error_of(server.complete([5] * 10, max_tokens=5000), 400)["message"]
    assert "4096" in message
    assert "5000" in message
    error_of(server.complete([5] * 4096, max_tokens=None), 400)
    assert server.complete([5] * 4095, max_tokens=1).status_code == 200


def test_long_text_is_tokenised_and_refused(server: Server) -> None:
    assert "100002 tokens" in error_of(server.complete("a " * 100_000, max_tokens=None), 400)["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [f"s{i}" for i in range(17)]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"seed": 2**64}, "seed"),
        ({"priority": 2**40}, "priority"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, None),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [9999999]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["x"] * 1025}, "prompt"),
        ({"stream_options": {}}, "stream_options"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": "a" * 300_000}, "guided_regex"),
    ],
)
def test_invalid_fields(server: Server, fields: dict[str, object], param: str | None) -> None:
    response = server.post("/v1/completions", {"prompt": "Hello", "max_tokens": 4, **fields})
    if fields == {"prompt": ""}:  # the tokenizer adds the beginning of the sequence
        assert response.status_code == 200
        return
    assert error_of(response, 400)["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": ["hi"]}, "messages"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"max_completion_tokens": 10**6}, "max_completion_tokens"),
    ],
)
def test_invalid_chat_fields(server: Server, fields: dict[str, object], param: str) -> None:
    body = {"messages": [user("Hello")], "max_tokens": 4, **fields}
    assert error_of(server.post("/v1/chat/completions", body), 400)["param"] == param


def test_nulls_and_unknown_fields_are_defaults(server: Server) -> None:
    nulls = dict.fromkeys(("temperature", "n", "stop", "seed", "stream", "logit_bias", "tools", "response_format"))
    assert server.chat(**nulls, extra_field={"a": 1}).status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"nul", b'"x"', b"\xff\xfe", b'{"prompt": "\\ud800"}', b"[" * 100_000]
)
def test_malformed_json(server: Server, body: bytes) -> None:
    error_of(server.post("/v1/completions", body), 400)


def test_other_http_errors(server: Server) -> None:
    error_of(server.http.get("/v1/nothing"), 404)
    response = server.http.get("/v1/completions")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"
    body = json.dumps({"prompt": "Hello", "max_tokens": 1}).encode()
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "nonsense"):
        assert server.post("/v1/completions", body, headers={"content-type": content_type}).status_code == 200


def test_request_id(server: Server) -> None:
    assert server.http.get("/health", headers={"X-Request-Id": "abc"}).headers["x-request-id"] == "abc"
    assert server.http.get("/nothing").headers["x-request-id"]


@pytest.mark.parametrize(("kind", "status"), [("invalid", 400), ("overloaded", 503), ("internal", 500)])
@pytest.mark.parametrize("stream", [False, True])
def test_refused_by_the_engine(server: Server, kind: str, status: int, stream: bool) -> None:
    response = server.complete(f"<<refuse:{kind}>>", stream=stream)
    assert kind in error_of(response, status)["message"]
    assert ("retry-after" in response.headers) == (status == 503)


def test_admin(server: Server) -> None:
    error_of(server.post("/reset_prefix_cache", b""), 401)
    error_of(server.post("/reset_prefix_cache", b"", headers={"Authorization": "Bearer wrong"}), 401)
    assert server.post("/reset_prefix_cache", b"", headers=ADMIN).json() == {"reset": True}
    error_of(server.post("/abort", {"request_id": "nobody"}, headers=ADMIN), 404)
    error_of(server.post("/abort", {}, headers=ADMIN), 400)
