"""The engine process: one `EngineCore` between two ZeroMQ sockets.

    API process (client.py)                              engine process (this file)
      PUSH  Command  ------------ commands.sock -------->  PULL    drained between steps
      PULL  Event    <----------- events.sock -----------  PUSH    one Outputs per step
      stdin of the child stays open for as long as the parent lives

`python -m tilery.engine.process` reads one `Launch` record (MessagePack) from stdin. Only this process imports torch.
It ends when told to (`Shutdown`), when a step fails (after `Dead`, exit code 1), or when stdin closes, which is how it
notices that its parent died. SIGINT and SIGTERM are ignored: the parent decides when to stop.
SIGUSR1 prints the stacks of all threads to stderr.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from typing import Protocol

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
    ErrorKind,
    Event,
    FinishReason,
    Outputs,
    Ready,
    Reply,
    Shutdown,
)

DEFAULT_CORE = "tilery.engine.core:EngineCore"
STATS_SECONDS = 0.1  # how often statistics travel while steps produce no output (long prefill)
LINGER_MS = 1000  # how long the last message may take to leave


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """What the child reads from stdin: a 4-byte big-endian length, then this as MessagePack."""

    config: EngineConfig
    command_address: str
    event_address: str
    core: str = DEFAULT_CORE
    """`module:Class` of the core; tests and benchmarks put a fake one here."""


class Core(Protocol):
    """What this loop asks of a core; `EngineCore` is the real one."""

    info: EngineInfo

    def add(self, request: AddRequest) -> None: ...
    def abort(self, request_ids: list[str]) -> None: ...
    def abort_child(self, request_id: str, index: int) -> None: ...
    def step(self) -> list[EngineOutput]: ...
    def has_work(self) -> bool: ...
    def stats(self) -> EngineStats: ...
    def reset_prefix_cache(self) -> bool: ...


class EngineLoop:
    """Commands in, steps, outputs out. `run` returns when `Shutdown` arrives; whatever a step raises goes through."""

    def __init__(self, core: Core, commands: zmq.Socket, events: zmq.Socket) -> None:
        self.core = core
        self.commands = commands
        self.events = events
        self.decoder = msgspec.msgpack.Decoder(Command)
        self.encoder = msgspec.msgpack.Encoder()
        self.unfinished: dict[str, int] = {}  # children still to finish, by request
        self.refused: list[EngineOutput] = []  # requests on which `add` itself failed
        self.stop = False
        self.last_sent = 0.0

    def run(self) -> None:
        self.send(Ready(info=self.core.info))
        while True:
            changed = self.receive(block=not self.core.has_work())
            if self.stop:
                self.core.abort(list(self.unfinished))
            if changed or self.core.has_work():
                self.publish(self.refused + self.core.step())
                self.refused = []
            if self.stop:
                return

    def receive(self, block: bool) -> bool:
        """Handles every command that has arrived; waits for one if `block`. True if the core must step to answer."""
        if block:
            self.commands.poll()
        changed = False
        while True:
            try:
                frame = self.commands.recv(zmq.NOBLOCK)
            except zmq.Again:
                return changed
            changed |= self.handle(self.decoder.decode(frame))

    def handle(self, command: Command) -> bool:
        match command:
            case AddRequest():
                self.add(command)
                return True
            case AbortRequests():
                self.core.abort(command.request_ids)
                return True
            case AbortChoice():
                self.core.abort_child(command.request_id, command.index)
                return True
            case Call():
                self.call(command)
                return False
            case Shutdown():
                self.stop = True
                return False

    def add(self, request: AddRequest) -> None:
        try:
            self.core.add(request)
        except Exception as error:  # a bug in one request's way must not take the others with it
            traceback.print_exc()
            self.refused += [
                EngineOutput(
                    request_id=request.request_id,
                    index=index,
                    finish_reason=FinishReason.ERROR,
                    error_kind=ErrorKind.INTERNAL,
                    error=f"{type(error).__name__}: {error}",
                )
                for index in range(request.params.n)
            ]
        else:
            self.unfinished[request.request_id] = request.params.n

    def call(self, call: Call) -> None:
        ok, value = True, ""
        match call.name:
            case "ping":
                pass
            case "stats":
                value = msgspec.json.encode(self.core.stats()).decode()
            case "reset_prefix_cache":
                ok = self.core.reset_prefix_cache()
                value = "" if ok else "The prefix cache is in use by running requests."
            case _:
                ok, value = False, f"Unknown call {call.name!r}; known: ping, stats, reset_prefix_cache."
        self.send(Reply(call_id=call.call_id, ok=ok, value=value))

    def publish(self, outputs: list[EngineOutput]) -> None:
        for output in outputs:
            if output.finish_reason is not None and output.request_id in self.unfinished:
                left = self.unfinished[output.request_id] - 1
                if left:
                    self.unfinished[output.request_id] = left
                else:
                    del self.unfinished[output.request_id]
        now = time.monotonic()
        if outputs or now - self.last_sent >= STATS_SECONDS or not self.core.has_work():
            self.last_sent = now
            self.send(Outputs(outputs=outputs, stats=self.core.stats()))

    def send(self, event: Event) -> None:
        self.events.send(self.encoder.encode(event))


def run_engine(launch: Launch) -> int:
    """Builds the core and serves it until told to stop; returns the exit code."""
    context = zmq.Context()
    events = context.socket(zmq.PUSH)
    commands = context.socket(zmq.PULL)
    for socket in (events, commands):
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.setsockopt(zmq.RCVHWM, 0)
    events.connect(launch.event_address)
    commands.connect(launch.command_address)
    core: Core | None = None
    try:
        module, _, name = launch.core.partition(":")
        core = getattr(importlib.import_module(module), name)(launch.config)
        assert core is not None
        gc.collect()
        gc.freeze()  # weights and modules live as long as the process: never scan them again
        EngineLoop(core, commands, events).run()
        return 0
    except Exception as error:
        if core is None and isinstance(error, ValueError | OSError):  # settings or files: the text says it all
            reason = str(error)
        else:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
        events.send(msgspec.msgpack.encode(Dead(error=reason)))
        return 1
    finally:
        commands.close(linger=0)
        events.close(linger=LINGER_MS)
        context.term()


def read_launch() -> Launch:
    length = int.from_bytes(sys.stdin.buffer.read(4), "big")
    return msgspec.msgpack.decode(sys.stdin.buffer.read(length), type=Launch)


def exit_with_parent(launch: Launch) -> None:
    """Ends this process as soon as stdin closes, even in the middle of a step, and clears the sockets away."""
    while os.read(0, 4096):
        pass
    shutil.rmtree(os.path.dirname(launch.event_address.removeprefix("ipc://")), ignore_errors=True)
    os._exit(1)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1)
    launch = read_launch()
    threading.Thread(target=exit_with_parent, args=(launch,), name="parent-watch", daemon=True).start()
    code = run_engine(launch)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # nothing is left to clean up, and tensor-library teardown takes time


if __name__ == "__main__":
    main()
