"""The OpenAI-compatible HTTP API over one engine process.

A request's way: `exchange` (one HTTP request) -> `app` (keys, routes, errors) -> `completions` or `chat_completions`
(validate, tokenise) -> `generation` (engine outputs to text) -> `sse` or one JSON body.
May be imported from here: `run`, `ServerConfig`, `StartError`. Imports downwards only: engine (no torch), observe, and
models.config, which says where a model's folder is.
"""

from tilery.server.config import ServerConfig
from tilery.server.run import StartError, run

__all__ = ["ServerConfig", "StartError", "run"]
