"""What the serving path itself costs: HTTP, validation, tokenisation, process boundary, detokenisation, SSE.

    python benchmarks/server_overhead.py --output benchmarks/results/server_overhead.json

The real server, client and engine process run with a core that has no model: every step gives each running request one
token. A client process speaks HTTP over raw sockets and counts SSE events; the server's CPU time is read from /proc.

    flat out    the core never waits: how many events per second one API process can write at most. The API falls
                behind the core, so events of one stream leave in groups (see events per read).
    paced       the core takes 4 ms per step, as a real model would: what an event costs when each is sent alone.

Both processes and the client share the machine's cores, so with two cores the flat-out figure is a lower bound; CPU
seconds per event do not depend on that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import selectors
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from tilery.engine.config import EngineConfig  # noqa: E402
from tilery.engine.messages import AddRequest, EngineInfo, EngineOutput, EngineStats, FinishReason  # noqa: E402

MODEL = str(ROOT / "tilery" / "bundled" / "tilery-books-26m")
PACE = "TILERY_BENCH_STEP_SECONDS"  # how the benchmark tells its core, three processes away
TEXT = " the quick brown fox jumps over the lazy dog and runs"


class InstantCore:
    """One token per request and step, from a fixed text; no work in between."""

    def __init__(self, config: EngineConfig) -> None:
        from tilery.engine.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(MODEL)
        self.text = tokenizer.encode(TEXT, add_special_tokens=False)
        self.pace = float(os.environ.get(PACE, "0"))
        self.next_step = 0.0
        self.info = EngineInfo(
            model="instant",
            dtype="none",
            vocab_size=tokenizer.vocab_size,
            max_model_len=1 << 20,
            block_size=64,
            num_blocks=1,
            cache_dtype="auto",
            eos_token_ids=[],
            speculative_tokens=0,
            version="0",
        )
        self.running: dict[str, list[int]] = {}  # request: tokens made, tokens wanted

    def add(self, request: AddRequest) -> None:
        self.running[request.request_id] = [0, request.params.max_tokens or 1]

    def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.running.pop(request_id, None)

    def step(self) -> list[EngineOutput]:
        if self.pace:
            time.sleep(max(0.0, self.next_step - time.monotonic()))
            self.next_step = time.monotonic() + self.pace
        outputs = []
        for request_id, counts in list(self.running.items()):
            token = self.text[counts[0] % len(self.text)]
            counts[0] += 1
            finish = FinishReason.LENGTH if counts[0] >= counts[1] else None
            if finish is not None:
                del self.running[request_id]
            outputs.append(EngineOutput(request_id=request_id, token_ids=[token], finish_reason=finish))
        return outputs

    def has_work(self) -> bool:
        return bool(self.running)

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self.running))

    def reset_prefix_cache(self) -> bool:
        return True


# ---- server process ----------------------------------------------------------------------------------------------


def serve(port: int) -> None:
    from tilery.server import ServerConfig, run

    run(EngineConfig(model=MODEL), ServerConfig(port=port), core="server_overhead:InstantCore")


# ---- client process ----------------------------------------------------------------------------------------------


def client(port: int, endpoint: str, streams: int, tokens: int) -> dict[str, float]:
    """Opens all streams at once and reads them to the end, counting `data:` lines."""
    prompt = {"messages": [{"role": "user", "content": "Go."}]} if "chat" in endpoint else {"prompt": "Go."}
    body = json.dumps({**prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True}).encode()
    head = f"POST {endpoint} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    selector = selectors.DefaultSelector()
    for _ in range(streams):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ, bytearray())
    start = time.perf_counter()
    for key in list(selector.get_map().values()):
        key.fileobj.send(head + body)  # type: ignore[union-attr]
    events = reads = size = 0
    while selector.get_map():
        for key, _ in selector.select():
            data = key.fileobj.recv(1 << 18)  # type: ignore[union-attr]
            reads += 1
            size += len(data)
            tail: bytearray = key.data
            whole = bytes(tail) + data
            events += whole.count(b"data: ") - bytes(tail).count(b"data: ")
            tail[:] = whole[-8:]
            if whole.endswith(b"0\r\n\r\n"):
                selector.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]
            elif not data:
                raise SystemExit("the server closed a stream early")
    seconds = time.perf_counter() - start
    return {"events": events, "reads": reads, "bytes": size, "seconds": seconds}


# ---- measuring ---------------------------------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(endpoint: str, streams: int, tokens: int, pace: float) -> dict[str, float | str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, PACE: str(pace)}
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(port)], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        server.stdout.readline()  # the ready line
        command = [sys.executable, __file__, "--client", str(port), endpoint]
        load(command, streams, max(1, tokens // 20))  # warm up
        before = cpu_seconds(server.pid)
        result = load(command, streams, tokens)
        cpu = cpu_seconds(server.pid) - before
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(20)
    events = result["events"]
    return {
        "endpoint": endpoint,
        "step_seconds": pace,
        "streams": streams,
        "tokens_per_stream": tokens,
        "events": events,
        "seconds": round(result["seconds"], 4),
        "events_per_second": round(events / result["seconds"]),
        "api_cpu_microseconds_per_event": round(cpu / events * 1e6, 2),
        "events_per_api_cpu_second": round(events / cpu),
        "events_per_read": round(events / result["reads"], 2),
        "bytes_per_event": round(result["bytes"] / events, 1),
    }


def load(command: list[str], streams: int, tokens: int) -> dict[str, float]:
    answer = subprocess.run([*command, str(streams), str(tokens)], check=True, stdout=subprocess.PIPE).stdout
    return json.loads(answer)


def environment() -> dict[str, str | int | None]:
    from importlib.metadata import version

    import tilery

    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ("uvicorn", "uvloop", "httptools", "msgspec", "pyzmq", "tokenizers")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or None,
        "tilery": tilery.__version__,
        "python": platform.python_version(),
        "cpu": models[0].split(":")[1].strip() if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        **{package: version(package) for package in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of the serving path, without a model.")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--client", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        return serve(options.serve)
    if options.client:
        port, endpoint, streams, tokens = options.client
        return print(json.dumps(client(int(port), endpoint, int(streams), int(tokens))))

    runs = []
    print(f"{'endpoint':<22}{'step':>6}{'events/s':>10}{'CPU us/event':>14}{'events/CPU s':>14}{'events/read':>13}")
    for endpoint in ("/v1/completions", "/v1/chat/completions"):
        for pace in (0.0, 0.004):
            for _ in range(options.repeats):
                run = measure(endpoint, options.streams, options.tokens, pace)
                runs.append(run)
                print(
                    f"{endpoint:<22}{pace * 1e3:>4g}ms{run['events_per_second']:>10,}"
                    f"{run['api_cpu_microseconds_per_event']:>14}{run['events_per_api_cpu_second']:>14,}"
                    f"{run['events_per_read']:>13}",
                    flush=True,
                )
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"environment": environment(), "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
