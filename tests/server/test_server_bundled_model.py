"""The whole way once, with the model that comes with the package."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.server.harness import Server


@pytest.fixture(scope="module")
def real() -> Iterator[Server]:
    with Server(core="tilery.engine.core:EngineCore") as server:
        yield server


def test_stream_equals_whole(real: Server) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
    whole = real.post("/v1/completions", body).json()["choices"][0]
    events = real.events("/v1/completions", body)
    assert whole["text"]
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == whole["text"]
    assert events[-2]["choices"][0]["finish_reason"] == whole["finish_reason"] == "length"


def test_second_prompt_comes_from_the_cache(real: Server) -> None:
    prompt = list(range(100, 300))
    for cached in (0, 192):
        usage = real.complete(prompt, temperature=0).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == cached


def test_schema_holds(real: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["glad", "sad"]}, "age": {"type": "integer", "maximum": 99, "minimum": 0}},
        "required": ["mood", "age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    body = real.chat("Who are you?", response_format=form, max_tokens=60, temperature=0).json()
    person = json.loads(body["choices"][0]["message"]["content"])
    assert person["mood"] in ("glad", "sad")
    assert 0 <= person["age"] <= 99


def test_required_tool_holds(real: Server) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Ulm", "Bonn"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    answer = real.chat(
        "Weather?", tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=60, temperature=0
    ).json()
    [call] = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Ulm", "Bonn")
    assert answer["choices"][0]["finish_reason"] == "tool_calls"


def test_bad_schema_is_the_clients_fault(real: Server) -> None:
    response = real.complete(guided_regex="(unclosed")
    assert response.status_code == 400, response.text
    assert real.http.get("/health/generate").status_code == 200
