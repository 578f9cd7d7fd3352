"""`tilery chat`: a streaming conversation in the terminal with any OpenAI-compatible server."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tilery.cli.options import api_key_header


def chat(
    url: Annotated[str, typer.Option(help="The server's address.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Model name in the API.", show_default="the server's first")] = None,
    system: Annotated[str | None, typer.Option(help="System message.", show_default="none")] = None,
    thinking: Annotated[bool, typer.Option("--thinking", help="Ask the model to reason before it answers.")] = False,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens per answer.", show_default="up to the model's limit")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 0.7,
    api_key: Annotated[
        str | None, typer.Option(help="Bearer key.", envvar="TILERY_API_KEY", show_default="none")
    ] = None,
) -> None:
    """Talk to a running server: /help lists what can be typed, Ctrl-C stops an answer, Ctrl-D leaves."""
    from tilery.cli.connection import parse_url
    from tilery.cli.conversation import Conversation, converse, first_model

    target = parse_url(url, "--url")
    headers = api_key_header(api_key)
    name = model or first_model(target, headers)
    conversation = Conversation(target, headers, name, thinking, max_tokens, temperature, system)
    if sys.stdin.isatty():
        try:
            import readline  # noqa: F401  # line editing and history for input()
        except ImportError:
            pass
        print(f"{name} at {target.url}. /help lists the commands, Ctrl-D leaves.")
    converse(conversation)
