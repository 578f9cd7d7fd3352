"""The OpenAI-compatible HTTP API over one engine process.

A request's way: `exchange` (one HTTP request) -> `app` (keys, routes, errors) -> `completions` or `chat_completions`
(validate, tokenise) -> `generation` (engine outputs to text) -> `sse` or one JSON body.
May be imported from here: `run`, `ServerConfig`. Imports downwards only: engine (no torch), observe.
"""

from tilery.server.config import ServerConfig
from tilery.server.run import run

__all__ = ["ServerConfig", "run"]
