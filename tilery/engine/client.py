"""The API side of the engine: starts the process, sends requests, hands every output to the stream that waits for it.

    client = await EngineClient.launch(config)
    with client.generate(AddRequest(...)) as stream:     # leaving early aborts the request in the engine
        async for outputs in stream:                     # list[EngineOutput]: all that arrived since the last turn
            ...

The way of one token: one socket read for a whole engine step, one decode, one list append and one wake-up per request.
A reader that falls behind gets several outputs in one turn. All methods belong to the event loop that called `launch`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

import msgspec
import zmq

from tilery.engine.config import EngineConfig
from tilery.engine.messages import (
    AbortChoice,
    AbortRequests,
    AddRequest,
    Call,
    Command,
    Dead,
    EngineInfo,
    EngineOutput,
    EngineStats,
    Event,
    Outputs,
    Ready,
    Reply,
    Shutdown,
)
from tilery.engine.process import DEFAULT_CORE, Launch


class EngineDeadError(RuntimeError):
    """The engine process ended or failed; the text says how. Nothing more can be generated."""


class Stream:
    """The outputs of one or more requests, all children interleaved; ends after every child has finished.

    Iterating gives non-empty lists of `EngineOutput` in the engine's order. Raises `EngineDeadError`.
    """

    __slots__ = ("_client", "_items", "_unfinished", "_waiter")

    def __init__(self, client: EngineClient, requests: Sequence[AddRequest]) -> None:
        self._client = client
        self._items: list[EngineOutput] = []
        self._unfinished = {request.request_id: request.params.n for request in requests}  # children by request
        self._waiter: asyncio.Future[None] | None = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> list[EngineOutput]:
        while not self._items:
            if not self._unfinished:
                raise StopAsyncIteration
            self._client.check_alive()
            self._waiter = self._client.loop.create_future()
            await self._waiter
        items, self._items = self._items, []
        return items

    def close(self) -> None:
        """Ends the iteration; aborts what is unfinished. Closing twice does nothing."""
        self._items.clear()
        if self._unfinished:
            unfinished, self._unfinished = self._unfinished, {}
            self._client.forget(unfinished)
        self._wake()

    def drop(self, request_id: str) -> None:
        """Aborts one of several requests; what it still produces is not delivered."""
        if self._unfinished.pop(request_id, None) is not None:
            self._client.forget([request_id])
            self._wake()

    def _push(self, output: EngineOutput) -> bool:
        """True when the last child of its request has finished."""
        self._items.append(output)
        self._wake()
        if output.finish_reason is None:
            return False
        left = self._unfinished[output.request_id] - 1
        if left:
            self._unfinished[output.request_id] = left
            return False
        del self._unfinished[output.request_id]
        return True

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)


class EngineClient:
    """One engine process. Make it with `launch`, end it with `close`."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.info: EngineInfo
        self.stats = EngineStats()
        """The latest the engine has said."""
        self.dead: str | None = None
        """Why the engine can no longer serve; None while it can."""
        self.observer: Callable[[Outputs], None] | None = None
        """Called with every message of outputs, also those of closed streams."""
        self._streams: dict[str, Stream] = {}
        self._calls: dict[int, asyncio.Future[Reply]] = {}
        self._call_ids = itertools.count(1)
        self._decoder = msgspec.msgpack.Decoder(Event)
        self._encoder = msgspec.msgpack.Encoder()
        self._ready: asyncio.Future[EngineInfo] = self.loop.create_future()
        self._folder = tempfile.mkdtemp(prefix="tilery-")  # mode 0700: only this user reaches the sockets
        self._context = zmq.Context()
        self._commands = self._socket(zmq.PUSH, "commands.sock")
        self._events = self._socket(zmq.PULL, "events.sock")
        self._process: asyncio.subprocess.Process
        self._watch: asyncio.Task[None]

    @classmethod
    async def launch(cls, config: EngineConfig, core: str = DEFAULT_CORE) -> EngineClient:
        """Starts the process and waits until it can serve. Raises `EngineDeadError` with the reason if it cannot.

        `core` names another `module:Class` to run in the process (tests, benchmarks).
        """
        client = cls()
        try:
            await client._start(config, core)
            client.info = await client._ready
        except BaseException:
            await client.close(grace=0)
            raise
        return client

    def generate(self, *requests: AddRequest) -> Stream:
        """Sends the requests; their outputs come through one stream.

        Raises `EngineDeadError` at once if there is nobody to serve them.
        """
        stream = Stream(self, requests)
        for request in requests:
            if request.request_id in self._streams:
                raise ValueError(f"request_id {request.request_id!r} is already running.")
        for request in requests:
            self._send(request)
            self._streams[request.request_id] = stream
        return stream

    def abort(self, request_ids: Iterable[str]) -> None:
        """Unfinished children of these requests end with `FinishReason.ABORT`; unknown ids are ignored."""
        self._send(AbortRequests(request_ids=list(request_ids)))

    async def call(self, name: str) -> Reply:
        """ "ping", "stats" or "reset_prefix_cache"; see `messages.Call`."""
        call = Call(call_id=next(self._call_ids), name=name)
        self._send(call)
        future = self._calls[call.call_id] = self.loop.create_future()
        return await future

    async def close(self, grace: float = 5.0) -> None:
        """Asks the process to stop and kills it after `grace` seconds. Open streams raise `EngineDeadError`."""
        if hasattr(self, "_process"):
            if grace > 0 and self.dead is None:
                self._send(Shutdown())
            self._die("The engine was shut down.")
            try:
                await asyncio.wait_for(self._process.wait(), grace)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
            await self._watch
        if not self._commands.closed:
            self.loop.remove_reader(self._events.fileno())
            self._commands.close(linger=0)
            self._events.close(linger=0)
            self._context.term()
            shutil.rmtree(self._folder, ignore_errors=True)

    def check_alive(self) -> None:
        if self.dead is not None:
            raise EngineDeadError(self.dead)

    def abort_choice(self, request_id: str, index: int) -> None:
        """Ends one choice of a request whose other choices go on."""
        if request_id in self._streams and self.dead is None:
            self._send(AbortChoice(request_id=request_id, index=index))

    def forget(self, request_ids: Iterable[str]) -> None:
        """Nobody reads these any more: drop what still arrives and let the engine stop working on them."""
        known = [request_id for request_id in request_ids if self._streams.pop(request_id, None) is not None]
        if known and self.dead is None:
            self._send(AbortRequests(request_ids=known))

    # ---- process and sockets -------------------------------------------------------------------------------------

    def _socket(self, kind: int, name: str) -> zmq.Socket:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, 0)  # no limit: admission control bounds the requests, and outputs are tiny
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.bind(f"ipc://{self._folder}/{name}")
        return socket

    async def _start(self, config: EngineConfig, core: str) -> None:
        launch = Launch(
            config=config,
            command_address=f"ipc://{self._folder}/commands.sock",
            event_address=f"ipc://{self._folder}/events.sock",
            core=core,
        )
        record = msgspec.msgpack.encode(launch)
        path = os.pathsep.join(
            entry or os.getcwd() for entry in sys.path
        )  # what is importable here is importable there
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "tilery.engine.process"),
            stdin=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._process.stdin is not None  # stays open: its end tells the child that we are gone
        self._process.stdin.write(len(record).to_bytes(4, "big") + record)
        self._watch = self.loop.create_task(self._watch_process())
        self.loop.add_reader(self._events.fileno(), self._receive)

    async def _watch_process(self) -> None:
        code = await self._process.wait()
        self._receive()  # its last words may still be in the socket
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        self._die(f"The engine process ended ({how}).")

    def _send(self, command: Command) -> None:
        self.check_alive()
        try:
            self._commands.send(self._encoder.encode(command), zmq.NOBLOCK)
        except zmq.Again:  # no peer: the process has gone and we are about to hear of it
            self._die("The engine process closed its connection.")
            self.check_alive()

    def _receive(self) -> None:
        """Reads until the socket is empty: its descriptor only signals changes."""
        while not self._events.closed:
            try:
                frame = self._events.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            event = self._decoder.decode(frame)
            match event:
                case Outputs():
                    self._dispatch(event)
                case Ready():
                    if not self._ready.done():
                        self._ready.set_result(event.info)
                case Reply():
                    future = self._calls.pop(event.call_id, None)
                    if future is not None and not future.done():
                        future.set_result(event)
                case Dead():
                    self._die(event.error)

    def _dispatch(self, event: Outputs) -> None:
        self.stats = event.stats
        streams = self._streams
        for output in event.outputs:
            stream = streams.get(output.request_id)
            if stream is not None and stream._push(output):
                del streams[output.request_id]
        if self.observer is not None:
            self.observer(event)

    def _die(self, reason: str) -> None:
        """The first reason wins. Wakes everybody who waits, so that nobody waits for ever."""
        if self.dead is not None:
            return
        self.dead = reason
        error = EngineDeadError(reason)
        if not self._ready.done():
            self._ready.set_exception(error)
        for call in self._calls.values():
            if not call.done():
                call.set_exception(error)
        self._calls.clear()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream._wake()
