"""The official client, as users have it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest

from tests.server.harness import Server, user
from tests.server.test_server_api import TOOLS


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake", "org/fake-2"]


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt="Hello", max_tokens=3, logprobs=1)
    assert answer.choices[0].text == " one two three"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == [" one", " two", " three"]
    stream = client.completions.create(model="fake", prompt="Hello", max_tokens=3, stream=True)
    assert "".join(event.choices[0].text for event in stream) == " one two three"


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="fake", messages=[user("<<say:Good evening.>>")], max_completion_tokens=20, logprobs=True, top_logprobs=1
    )
    assert answer.choices[0].message.content == "Good evening."
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.choices[0].logprobs is not None


def test_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="fake", messages=[user("Hello")], max_tokens=3, stream=True, stream_options={"include_usage": True}
    )
    *events, usage = list(stream)
    assert "".join(event.choices[0].delta.content or "" for event in events) == " one two three"
    assert events[-1].choices[0].finish_reason == "length"
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 3


def test_tools_stream(client: openai.OpenAI) -> None:
    """The client's own accumulator puts the call together."""
    with client.chat.completions.stream(
        model="fake",
        messages=[user('<<say:{"zone":"UTC"}>>')],
        tools=TOOLS,
        tool_choice={"type": "function", "function": {"name": "time"}},
        max_tokens=50,
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.name == "time"
    assert json.loads(message.tool_calls[0].function.arguments) == {"zone": "UTC"}


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="Hello")
    with pytest.raises(openai.BadRequestError, match="temperature must be"):
        client.completions.create(model="fake", prompt="Hello", temperature=-1)
