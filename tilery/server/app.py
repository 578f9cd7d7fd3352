"""The ASGI application: request ids, keys, routes, errors. Finding the endpoint is one dictionary lookup."""

from __future__ import annotations

import asyncio
import hmac
import traceback
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NamedTuple

from tilery.server import admin
from tilery.server.chat_completions import chat_completions
from tilery.server.completions import completions
from tilery.server.errors import ApiError
from tilery.server.exchange import Disconnected, Exchange, Message
from tilery.server.service import Service


class Route(NamedTuple):
    method: str
    endpoint: Callable[[Service, Exchange], Awaitable[None]]
    access: str = "key"
    """open: everybody; key: one of the API keys if there are any; admin: the admin key."""


ROUTES = {
    "/v1/chat/completions": Route("POST", chat_completions),
    "/v1/completions": Route("POST", completions),
    "/v1/models": Route("GET", admin.models),
    "/tokenize": Route("POST", admin.tokenize),
    "/detokenize": Route("POST", admin.detokenize),
    "/load": Route("GET", admin.load),
    "/health": Route("GET", admin.health, "open"),
    "/health/generate": Route("GET", admin.health_generate),
    "/metrics": Route("GET", admin.metrics, "open"),
    "/version": Route("GET", admin.version, "open"),
    "/abort": Route("POST", admin.abort, "admin"),
    "/reset_prefix_cache": Route("POST", admin.reset_prefix_cache, "admin"),
}
MODEL = Route("GET", admin.model)


class App:
    """Every answer, errors included, carries X-Request-Id: the client's own, if it sent one."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
            return
        exchange = Exchange(scope, receive, send)
        request_id = exchange.headers.get(b"x-request-id") or uuid.uuid4().hex.encode()
        exchange.extra_headers.append((b"x-request-id", request_id[:256]))
        path = exchange.path
        try:
            try:
                await self._find(exchange)(self.service, exchange)
            except ApiError as error:
                await self._fail(exchange, error)
            except Exception as error:
                traceback.print_exc()
                await self._fail(exchange, ApiError(500, f"Internal error: {type(error).__name__}."))
        except (Disconnected, asyncio.CancelledError):
            pass  # nobody is left to answer; the engine has been told by the generation's context manager
        finally:
            exchange.release()
            known = path if path in ROUTES else "other"
            self.service.metrics.responses[known, exchange.status or 499] += 1

    def _find(self, exchange: Exchange) -> Callable[[Service, Exchange], Awaitable[None]]:
        route = ROUTES.get(exchange.path)
        if route is None:
            if not exchange.path.startswith("/v1/models/"):
                raise ApiError(404, f"There is no endpoint {exchange.path}.")
            route = MODEL
        if exchange.method != route.method and not (exchange.method == "HEAD" and route.method == "GET"):
            allow = ((b"allow", route.method.encode()),)
            raise ApiError(405, f"{exchange.path} takes {route.method}, not {exchange.method}.", headers=allow)
        self._check_key(exchange, route.access)
        return route.endpoint

    def _check_key(self, exchange: Exchange, access: str) -> None:
        config = self.service.config
        if access == "open" or (access == "key" and not config.api_keys):
            return
        if access == "admin" and config.admin_key is None:
            raise ApiError(403, "Administrative endpoints are closed: the server was started without an admin key.")
        keys = (config.admin_key or "",) if access == "admin" else config.api_keys
        scheme, _, token = exchange.headers.get(b"authorization", b"").partition(b" ")
        given = token.strip()
        if scheme.lower() != b"bearer" or not any(hmac.compare_digest(given, key.encode()) for key in keys):
            challenge = ((b"www-authenticate", b"Bearer"),)
            raise ApiError(401, "A valid key is needed: `Authorization: Bearer KEY`.", headers=challenge)

    async def _fail(self, exchange: Exchange, error: ApiError) -> None:
        if exchange.started:  # the status line has gone: the stream says it and ends without [DONE]
            await exchange.finish(b"data: " + error.encode() + b"\n\n")
        else:
            await exchange.reply(error.encode(), error.response.error.code, headers=error.headers)
