"""A small blocking HTTP client for the commands that talk to a running server: JSON calls and event streams.

The standard library's `http.client` does the work. The load generator has its own asynchronous client, because there
each chunk's time of arrival counts.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tilery.cli.errors import CliError


class ServerError(Exception):
    """The server answered, but not with success. `status` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class NoServer(Exception):
    """Nobody answered, or the connection broke."""


@dataclass(frozen=True)
class Target:
    """Where a server is. `prefix` is the path before `/v1`, without a slash at its end."""

    host: str
    port: int
    tls: bool = False
    prefix: str = ""

    @property
    def url(self) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{name}:{self.port}{self.prefix}"


def parse_url(url: str, option: str) -> Target:
    """`http://host:port[/prefix][/v1]` as a target. Raises `CliError` that names `option`."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
        raise CliError(f"{option} {url}: expected an address such as http://127.0.0.1:8000.")
    tls = parts.scheme == "https"
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    return Target(parts.hostname, port or (443 if tls else 80), tls, prefix)


def error_message(body: bytes, status: int) -> str:
    """The `error.message` of an OpenAI-style answer, else the beginning of the body."""
    try:
        value = json.loads(body)
        error = value.get("error", value)
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, AttributeError, KeyError, TypeError):
        text = " ".join(body.decode("utf-8", "replace").split())
        return text[:200] or f"HTTP status {status}"


def _connect(target: Target, timeout: float | None) -> http.client.HTTPConnection:
    if target.tls:
        return http.client.HTTPSConnection(
            target.host, target.port, timeout=timeout, context=ssl.create_default_context()
        )
    return http.client.HTTPConnection(target.host, target.port, timeout=timeout)


def _send(
    connection: http.client.HTTPConnection, target: Target, path: str, payload: object, headers: dict[str, str]
) -> http.client.HTTPResponse:
    body = None if payload is None else json.dumps(payload).encode()
    headers = {"Content-Type": "application/json", "Connection": "close", **headers}
    connection.request("GET" if body is None else "POST", target.prefix + path, body, headers)
    response = connection.getresponse()
    if response.status >= 400:
        raise ServerError(response.status, error_message(response.read(), response.status))
    return response


def call(
    target: Target, path: str, payload: object = None, headers: dict[str, str] | None = None, timeout: float = 30.0
) -> bytes:
    """GET, or POST of a JSON payload; the answer's body. Raises `NoServer` or `ServerError`."""
    with closing(_connect(target, timeout)) as connection:
        try:
            return _send(connection, target, path, payload, headers or {}).read()
        except (OSError, http.client.HTTPException) as error:
            raise NoServer(str(error) or type(error).__name__) from error


def call_json(
    target: Target, path: str, payload: object = None, headers: dict[str, str] | None = None, timeout: float = 30.0
) -> Any:
    """`call`, with the body decoded. Raises `ServerError` for a body that is no JSON, too."""
    body = call(target, path, payload, headers, timeout)
    try:
        return json.loads(body)
    except ValueError as error:
        raise ServerError(200, f"{target.url}{path} did not answer with JSON.") from error


def stream(target: Target, path: str, payload: object, headers: dict[str, str] | None = None) -> Iterator[Any]:
    """POSTs and yields each event's JSON until `[DONE]`. Closing the generator hangs up, which cancels the request.

    Raises `NoServer`, also when the stream ends without `[DONE]`, or `ServerError`, also for an error event.
    """
    with closing(_connect(target, None)) as connection:
        try:
            with closing(_send(connection, target, path, payload, headers or {})) as response:
                for line in response:
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return
                    event = json.loads(data)
                    if event.get("error"):
                        raise ServerError(response.status, error_message(data, response.status))
                    yield event
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise NoServer(str(error) or type(error).__name__) from error
    raise NoServer("the stream ended before it was complete")
