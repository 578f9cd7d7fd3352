"""`tilery chat` against a scripted server."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest

from tilery.cli.connection import NoServer, ServerError, Target, parse_url
from tilery.cli.conversation import Conversation, obey
from tilery.cli.errors import CliError


@pytest.fixture
def talk(tilery: Callable, fake_server, monkeypatch: pytest.MonkeyPatch) -> Callable:
    def call(lines: str, *arguments: str):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        return tilery("chat", "--url", fake_server.url, *arguments)

    return call


def conversation(fake_server) -> Conversation:
    return Conversation(Target("127.0.0.1", fake_server.port), {}, "tiny", False, None, 0.0, None)


def test_turns_are_kept(talk, fake_server) -> None:
    ran = talk("hi\nmore\n", "--system", "be brief", "--max-tokens", "5")
    assert ran.code == 0
    assert ran.out == "a b c\na b c\n"
    first, second = fake_server.bodies
    assert first["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert [m["content"] for m in second["messages"]] == ["be brief", "hi", "a b c", "more"]
    assert (first["model"], first["max_tokens"], first["stream"]) == ("tiny", 5, True)
    assert "chat_template_kwargs" not in first


def test_thinking_asks_for_it(talk, fake_server) -> None:
    talk("hi\n", "--thinking")
    assert fake_server.bodies[0]["chat_template_kwargs"] == {"thinking": True}
    assert "max_tokens" not in fake_server.bodies[0]


def test_commands(talk, fake_server) -> None:
    ran = talk("/help\nhi\n/reset\nhello\n/system be kind\nyes\n/system\n/what\n/quit\nnever sent\n")
    assert "Ctrl-C" in ran.out
    assert "Unknown command /what" in ran.out
    sent = [[m["content"] for m in body["messages"]] for body in fake_server.bodies]
    assert sent == [["hi"], ["hello"], ["be kind", "yes"]]


def test_a_failed_answer_leaves_the_conversation_as_it_was(talk, fake_server) -> None:
    fake_server.script.status = lambda number: 503 if number == 1 else 200
    ran = talk("lost\nkept\n")
    assert ran.code == 0
    assert "not today" in ran.err
    assert [m["content"] for m in fake_server.bodies[1]["messages"]] == ["kept"]


def test_a_broken_stream_is_an_error(fake_server) -> None:
    fake_server.script.done = False
    talk = conversation(fake_server)
    with pytest.raises(NoServer, match="before it was complete"):
        talk.ask("hi", lambda piece, reasoning: None)
    assert talk.turns == []


def test_ctrl_c_keeps_what_came(fake_server) -> None:
    """The signal arrives while a piece is written."""
    seen: list[str] = []

    def write(piece: str, reasoning: bool) -> None:
        seen.append(piece)
        if piece == " b":
            raise KeyboardInterrupt

    talk = conversation(fake_server)
    talk.ask("hi", write)
    assert seen == ["a", " b", " [stopped]"]
    assert talk.turns == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a b"}]


def test_obey_system_shows_and_sets(fake_server) -> None:
    talk = conversation(fake_server)
    assert "no system message" in obey(talk, "/system")
    obey(talk, "/system be terse")
    assert obey(talk, "/system") == "be terse"


def test_no_server_says_what_to_do(tilery) -> None:
    ran = tilery("chat", "--url", "http://127.0.0.1:9")
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert "tilery serve" in ran.err
    assert "--url" in ran.err


def test_no_model(talk, fake_server) -> None:
    fake_server.script.models = []
    ran = talk("hi\n")
    assert ran.code == 2
    assert "--model" in ran.err


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://127.0.0.1:8000", Target("127.0.0.1", 8000)),
        ("127.0.0.1:8000/v1/", Target("127.0.0.1", 8000)),
        ("https://localhost/deep/v1", Target("localhost", 443, True, "/deep")),
        ("http://[::1]:80", Target("::1", 80)),
    ],
)
def test_addresses(url: str, target: Target) -> None:
    assert parse_url(url, "--url") == target


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "http://", "http://127.0.0.1:http", "http://127.0.0.1:99999"])
def test_bad_addresses(url: str) -> None:
    with pytest.raises(CliError, match="--url"):
        parse_url(url, "--url")


def test_server_error_carries_its_status(fake_server) -> None:
    fake_server.script.status = lambda number: 401
    with pytest.raises(ServerError, match="not today") as caught:
        conversation(fake_server).ask("hi", lambda piece, reasoning: None)
    assert caught.value.status == 401
