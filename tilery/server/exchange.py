"""One HTTP request and its answer, straight on ASGI.

No response classes and no middleware between a token and the socket: `write` is one call into the HTTP server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

import msgspec

from tilery.server.errors import ApiError, from_decoding, invalid

T = TypeVar("T")
Message = MutableMapping[str, Any]
Header = tuple[bytes, bytes]

JSON = b"application/json"
EVENTS: tuple[Header, ...] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx: do not collect the stream
)


class Disconnected(Exception):
    """The client closed the connection."""


class Exchange:
    """`started` is true once the status line has been given to the HTTP server."""

    def __init__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])  # names are lower case
        self.started = False
        self.status = 0
        self.extra_headers: list[Header] = []
        """Sent with the answer, whatever it is."""
        self._receive = receive
        self._send = send
        self._watch: asyncio.Task[None] | None = None

    async def body(self, limit: int) -> bytes:
        """The whole body. Raises a 413 above `limit` bytes, `Disconnected` if the client went away."""
        parts: list[bytes] = []
        size, more = 0, True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                parts.clear()
                if size > 4 * limit:
                    break
            else:
                parts.append(part)
            more = message.get("more_body", False)
        if size > limit:  # what fits four times was read, so that the client gets to see the answer
            raise ApiError(413, f"The request body is larger than {limit} bytes.", headers=((b"connection", b"close"),))
        return b"".join(parts)

    async def decode(self, decoder: msgspec.json.Decoder[T], limit: int) -> T:
        """The body as the decoder's type, whatever its content type says. Raises a 400."""
        try:
            return decoder.decode(await self.body(limit))
        except msgspec.MsgspecError as error:
            raise from_decoding(error) from None
        except RecursionError:
            raise invalid("The request body is nested too deeply.") from None
        except UnicodeDecodeError:
            raise invalid("The request body is not valid UTF-8.") from None

    def cancel_on_disconnect(self) -> None:
        """From here on the current task is cancelled when the client goes away. Call it when the body has been read."""
        task = asyncio.current_task()
        assert task is not None

        async def watch() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            task.cancel()

        self._watch = asyncio.create_task(watch())

    def release(self) -> None:
        """The answer is complete: stop watching the connection."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    async def reply(
        self, body: bytes, status: int = 200, content_type: bytes = JSON, headers: tuple[Header, ...] = ()
    ) -> None:
        length = str(len(body)).encode()
        await self._start(status, ((b"content-type", content_type), (b"content-length", length), *headers))
        self.release()
        await self._send({"type": "http.response.body", "body": b"" if self.method == "HEAD" else body})

    async def reply_json(self, value: object, status: int = 200) -> None:
        await self.reply(msgspec.json.encode(value), status)

    async def start_events(self) -> None:
        await self._start(200, EVENTS)

    async def write(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self, data: bytes = b"") -> None:
        self.release()
        await self._send({"type": "http.response.body", "body": data})

    async def _start(self, status: int, headers: tuple[Header, ...]) -> None:
        self.started = True
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *self.extra_headers]})
