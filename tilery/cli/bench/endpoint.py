"""The server under test: which model it has, where random tokens come from, how a request to it is written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilery.cli.bench import report
from tilery.cli.bench.dataset import BenchRequest, TokenSource
from tilery.cli.connection import NoServer, ServerError, Target, call, call_json
from tilery.cli.errors import CliError

TOKEN_SAMPLE = """The quick brown fox jumps over the lazy dog while seven wise owls quietly judge each bold leap.
In 1905 a young clerk at the patent office asked what a beam of light would look like if one could ride along with it.
Rivers carry stones to the sea; time, patient and slow, grinds every mountain into sand, and sand again into rock.
She opened the letter, read it twice, laughed aloud, and walked out into the garden without her coat or her hat.
def area(width: float, height: float) -> float: return width * height  # numbers: 3.14159, 42, 1000000
Markets rose on Tuesday, fell on Wednesday, and ended the week exactly where prudent people had said they would."""
"""Ordinary text, so that random prompts hold ordinary tokens and no special ones."""


@dataclass(frozen=True)
class Server:
    target: Target
    endpoint: str
    model: str
    max_model_len: int | None
    headers: dict[str, str]

    @property
    def chat(self) -> bool:
        return "chat" in self.endpoint

    @property
    def backend(self) -> str:
        return "openai-chat" if self.chat else "openai"


def find_server(target: Target, endpoint: str, model: str | None, headers: dict[str, str]) -> Server:
    """Asks /v1/models for the model's name and context length. Raises `CliError` that says what to do."""
    try:
        models = call_json(target, "/v1/models", headers=headers)["data"]
        cards = {card["id"]: card for card in models}
    except NoServer as error:
        raise CliError(
            f"no server answers at {target.url} ({error}): start one with `tilery serve`, or give --base-url."
        ) from error
    except ServerError as error:
        raise CliError(f"{target.url}/v1/models refused: {error}") from error
    except (KeyError, TypeError) as error:
        raise CliError(f"{target.url}/v1/models is not an OpenAI-style list of models.") from error
    if not cards and model is None:
        raise CliError(f"{target.url}/v1/models lists no model: name one with --model.")
    name = model or next(iter(cards))
    if cards and name not in cards:
        raise CliError(f"--model {name}: the server has {', '.join(cards)}.")
    return Server(target, endpoint, name, cards.get(name, {}).get("max_model_len"), headers)


def token_source(server: Server, vocab_size: int | None) -> TokenSource:
    """Where random tokens come from. Raises `CliError` if the server has no /tokenize and no size was given."""
    if vocab_size is not None:
        return TokenSource.from_vocabulary(vocab_size)
    try:
        payload = {"model": server.model, "prompt": TOKEN_SAMPLE, "add_special_tokens": False}
        ids = call_json(server.target, "/tokenize", payload, server.headers)["tokens"]
        return TokenSource(np.unique(np.asarray(ids, dtype=np.int64)))
    except (NoServer, ServerError, KeyError, TypeError, ValueError) as error:
        raise CliError(
            f"{server.target.url}/tokenize does not answer ({error}): give the model's --vocab-size for random tokens."
        ) from error


def request_body(server: Server, request: BenchRequest, temperature: float, ignore_eos: bool) -> bytes:
    prompt = request.prompt
    body: dict[str, Any] = {
        "model": server.model,
        "max_tokens": request.output_len,
        "temperature": temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if ignore_eos:
        body["ignore_eos"] = True
    if server.chat:
        body["messages"] = [{"role": "user", "content": prompt if isinstance(prompt, str) else to_text(server, prompt)}]
    else:
        body["prompt"] = prompt
    return json.dumps(body).encode()


def to_text(server: Server, tokens: list[int]) -> str:
    """A chat endpoint takes text only; tokenised again, its length may differ a little."""
    try:
        payload = {"model": server.model, "tokens": tokens}
        return str(call_json(server.target, "/detokenize", payload, server.headers)["prompt"])
    except (NoServer, ServerError, KeyError, TypeError) as error:
        raise CliError(
            f"{server.target.url}/detokenize does not answer ({error}): random tokens need /v1/completions here."
        ) from error


def read_drafting(server: Server) -> report.Drafting | None:
    try:
        page = call(server.target, "/metrics", headers=server.headers)
    except (NoServer, ServerError):
        return None  # other servers need not have the page; the report then has no block on drafts
    return report.read_drafting(page.decode("utf-8", "replace"))
