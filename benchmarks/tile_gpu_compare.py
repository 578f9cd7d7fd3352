"""Kernels of the tile language beside torch.compile, each comparison in a process of its own with a time limit.

Many processes compile at once, into the caches on disk too (ours, Triton's, inductor's). One that is ready is timed at
once, while all others are stopped, so that nothing else runs on the GPU. A compiler that takes too long, runs out of
memory or crashes costs its own row and no other. `tile_gpu.py` is the script that does this.

torch.compile runs in the mode max-autotune-no-cudagraphs, and both sides' calls are put into CUDA graphs alike.
Inductor tunes while other processes use the GPU too; it takes the least of many timings, which they hardly touch.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from tilery.tile import registry

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)

import tile_gpu  # noqa: E402
from tile_gpu_rivals import PART_OF, rival  # noqa: E402

registry.discover("tilery.ops.kernels")


@dataclass
class Running:
    """A process at work on one comparison. `row`: what is known of it."""

    process: Any
    pipe: Connection
    row: dict[str, Any]
    until: float


def comparisons(only: list[str] | None) -> tuple[list[tuple[str, str]], list[dict[str, Any]]]:
    """(kernel, case) of what is compared; rows that say why the others are not."""
    named, others = [], []
    for kernel, case, _ in tile_gpu.rows_of(only):
        if kernel.name in PART_OF:
            others.append({"kernel": kernel.name, "case": case, "compared_as": PART_OF[kernel.name]})
        else:
            named.append((kernel.name, case))
    return named, others


def said(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def compiled(kernel: Any, arguments: dict[str, Any], row: dict[str, Any]) -> Callable[[], Any]:
    """What torch.compile makes of the rival, called once."""
    row["compared_with"], function = rival(kernel)
    call = functools.partial(torch.compile(function, mode="max-autotune-no-cudagraphs"), **tile_gpu.clone(arguments))
    start = time.monotonic()
    call()
    torch.cuda.synchronize()
    row["torch_compile_seconds"] = round(time.monotonic() - start, 1)
    return call


def work(pipe: Connection, name: str, case: str, rounds: int) -> None:
    """One comparison, step by step as told: gets both sides ready and says so; times them. Sends rows."""
    import torch._inductor.compile_fx  # asks for the GPU, so no process that is to be forked may have it

    row: dict[str, Any] = {"kernel": name, "case": case}
    pipe.recv()
    try:
        kernel, make = next((k, m) for k, c, m in tile_gpu.rows_of([name]) if c == case)
        arguments = make(torch.Generator().manual_seed(0), "cuda")
        ours = functools.partial(kernel, **arguments)
        ours()
        try:
            theirs = compiled(kernel, arguments, row)
        except Exception as error:  # torch.compile fails: its eager form is what is left to compare with
            row["torch_compile_error"] = said(error)
            theirs = functools.partial(rival(kernel)[1], **tile_gpu.clone(arguments))
        pipe.send(row)
        pipe.recv()
        row.update(tile_gpu.compare_us(ours, theirs, rounds))
        if "torch_compile_error" in row:
            row["eager_us"], row["torch_compile_us"] = row["torch_compile_us"], None
        else:
            row["ratio"] = row["torch_compile_us"] / row["us"]
    except BaseException as error:
        row["error"] = said(error)
    pipe.send(row)


def start(context: Any, name: str, case: str, rounds: int) -> Running:
    """A process that imports what it needs and waits."""
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there, name, case, rounds), daemon=True)
    process.start()
    there.close()
    return Running(process, here, {"kernel": name, "case": case}, 0.0)


def tell(one: Running, limit: float) -> None:
    """Lets it take the next step, which may take `limit` seconds."""
    one.until = time.monotonic() + limit
    try:
        one.pipe.send("go on")
    except OSError:
        one.row["error"] = "the process ended before it began"


def answered(running: list[Running]) -> Iterator[Running]:
    """Each as it answers, ends or runs out of time; `row` is brought up to date."""
    left = list(running)
    while left:
        least = min(r.until for r in left)
        ready = wait([r.pipe for r in left], max(least - time.monotonic(), 0.0))
        for one in list(left):
            if one.pipe in ready:
                try:
                    one.row = one.pipe.recv()
                except (EOFError, OSError):
                    one.process.join(5)
                    one.row["error"] = f"the process ended with status {one.process.exitcode}"
            elif time.monotonic() > one.until:
                one.row["error"] = "not ready within the time limit: its compiler takes longer"
            else:
                continue
            left.remove(one)
            yield one


def finish(one: Running) -> None:
    one.process.kill()
    one.process.join()
    one.pipe.close()


def _forkable(pipe: Connection) -> None:
    pipe.send(not torch.cuda._is_in_bad_fork())


def processes_ready() -> Any:
    """A way to start processes, if possible with torch and the kernels imported already."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (HERE, os.environ.get("PYTHONPATH"))))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the processes are many already
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # looking for a GPU must not open it
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "tile_gpu_compare"])
    here, there = context.Pipe()
    probe = context.Process(target=_forkable, args=(there,), daemon=True)
    probe.start()
    there.close()
    try:
        good = here.poll(60) and here.recv()
    except EOFError:
        good = False
    probe.kill()
    return context if good else multiprocessing.get_context("spawn")


@contextlib.contextmanager
def stopped(others: list[Running]) -> Iterator[None]:
    """No other process runs meanwhile; the time does not count for them."""
    began = time.monotonic()
    for one in others:
        os.kill(one.process.pid, signal.SIGSTOP)
    time.sleep(0.02)  # what they have begun on the GPU ends
    try:
        yield
    finally:
        for one in others:
            os.kill(one.process.pid, signal.SIGCONT)
            one.until += time.monotonic() - began


def compare(
    cases: list[tuple[str, str]], processes: int, limit: float, until: float, rounds: int
) -> Iterator[dict[str, Any]]:
    """The rows, as they get ready, which may take `limit` seconds each; with 0 rounds nothing is timed, only compiled.
    What is not ready at `until` (monotonic seconds) is said to be out of time."""
    context, waiting = processes_ready(), list(cases)
    running: list[Running] = []
    while waiting or running:
        while waiting and len(running) < processes and time.monotonic() < until:
            running.append(start(context, *waiting.pop(0), rounds))
            tell(running[-1], min(limit, until - time.monotonic()))
        if not running:
            break
        one = next(answered(running))
        running.remove(one)
        if "error" not in one.row and rounds:
            with stopped(running):
                tell(one, limit)
                next(answered([one]))
        finish(one)
        yield one.row
    yield from ({"kernel": name, "case": case, "error": "out of time"} for name, case in waiting)
