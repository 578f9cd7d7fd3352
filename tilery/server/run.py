"""`run`: from settings to a serving process, and its orderly end.

Start: take the port, start the engine process, load tokenizer and templates while it starts, listen when it is ready.
End: the first SIGTERM or SIGINT stops new generation (503) and lets running answers finish for `drain_seconds`, then
aborts them; a second signal ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn

import tilery
from tilery.engine.client import EngineClient, EngineDeadError
from tilery.engine.config import EngineConfig
from tilery.engine.process import DEFAULT_CORE
from tilery.engine.tokenizer import Tokenizer
from tilery.models.config import resolve_model
from tilery.server.app import App
from tilery.server.chat import ChatTemplate
from tilery.server.config import ServerConfig
from tilery.server.service import Service

BACKLOG = 4096
ABORT_SECONDS = 2.0  # how long answers may take to say that they were aborted


class StartError(RuntimeError):
    """The server cannot start; the text says why and what to do."""


def run(config: EngineConfig, server: ServerConfig, core: str = DEFAULT_CORE) -> None:
    """Serves until a signal ends it. Raises `StartError`.

    `core` names another `module:Class` to run in the engine process (tests, benchmarks).
    """
    started = time.monotonic()
    try:
        import uvloop
    except ImportError:  # no uvloop on Windows
        loop_runner = asyncio.run
    else:
        loop_runner = uvloop.run
    with contextlib.suppress(asyncio.CancelledError):  # SIGTERM while it starts
        loop_runner(_serve(config, server, core, started))


async def _serve(config: EngineConfig, server: ServerConfig, core: str, started: float) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    listener = _bind(server.host, server.port)
    with contextlib.closing(listener):
        loading = asyncio.create_task(asyncio.to_thread(_load, config, server))
        try:
            client = await EngineClient.launch(config, core)
        except EngineDeadError as error:
            await loading  # a missing tokenizer is the clearer reason
            raise StartError(f"The engine could not start: {error}") from None
        try:
            tokenizer, chat = await loading
            tokenizer.eos_ids = tuple(client.info.eos_token_ids) or tokenizer.eos_ids
            service = Service(client, tokenizer, chat, server)
            gc.collect()
            gc.freeze()  # modules and tokenizer live as long as the process: never scan them again
            await _listen(service, listener, started)
        finally:
            await client.close()


async def _listen(service: Service, listener: socket.socket, started: float) -> None:
    http = _Uvicorn(
        uvicorn.Config(
            with_cors(App(service), service.config.cors_origins),
            http="httptools",
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=service.config.keep_alive_seconds,
        ),
        on_ready=lambda: _announce(service, listener, started),
    )
    loop = asyncio.get_running_loop()
    drain: list[asyncio.Task[None]] = []

    def on_signal() -> None:
        if drain:
            http.should_exit = http.force_exit = True
        else:
            drain.append(loop.create_task(_drain(service, http)))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        await http.serve(sockets=[listener])
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        for task in drain:
            task.cancel()


async def _drain(service: Service, http: uvicorn.Server) -> None:
    service.draining = True
    running = len(service.running)
    if running:
        print(f"Stopping: {running} running requests may finish within {service.config.drain_seconds:g} s.", flush=True)
    try:
        await asyncio.wait_for(service.idle.wait(), service.config.drain_seconds)
    except TimeoutError:
        service.abort(list(service.running))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(service.idle.wait(), ABORT_SECONDS)
    http.should_exit = True
    # Idle connections are closed by the HTTP server; one that never reads its answer must not hold us up.
    await asyncio.sleep(ABORT_SECONDS)
    http.force_exit = True


def with_cors(app: Any, origins: tuple[str, ...]) -> Any:
    if not origins:
        return app
    from starlette.middleware.cors import CORSMiddleware

    return CORSMiddleware(app, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])


class _Uvicorn(uvicorn.Server):
    """uvicorn with our signal handling, and a word when it listens."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._on_ready()


def _announce(service: Service, listener: socket.socket, started: float) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(
        f"Tilery {tilery.__version__} serving {service.model_names[0]} on http://{shown}:{port} "
        f"(ready in {time.monotonic() - started:.1f} s)",
        flush=True,
    )


def _bind(host: str, port: int) -> socket.socket:
    """Takes the port before anything expensive starts; connections are refused until the server listens."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise StartError(f"{host} is not an address of this machine: {error.strerror}.") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise StartError(
                f"Port {port} on {host} is in use. Stop the other program or choose another port with --port."
            ) from None
        raise StartError(f"Cannot listen on {host}:{port}: {error.strerror or error}.") from None
    listener.setblocking(False)
    return listener


def _load(config: EngineConfig, server: ServerConfig) -> tuple[Tokenizer, ChatTemplate]:
    """Raises `StartError` for a missing or unreadable tokenizer or chat template."""
    try:
        folder = resolve_model(config.model)
        tokenizer = Tokenizer.load(folder)
        settings = folder / "config.json"
        model_type = json.loads(settings.read_bytes()).get("model_type", "") if settings.is_file() else ""
        template = Path(server.chat_template).read_text(encoding="utf-8") if server.chat_template else None
        return tokenizer, ChatTemplate(tokenizer, model_type, template=template)
    except (OSError, ValueError) as error:
        raise StartError(str(error)) from None
