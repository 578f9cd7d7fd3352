"""The loop of a benchmark: starts each request at its time and gathers the results.

Requests start on time whether or not earlier ones were answered (open loop), unless `max_concurrency` holds them back.
"""

from __future__ import annotations

import asyncio
import gc
import math
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np

from tilery.cli.bench.client import RequestResult, send
from tilery.cli.bench.dataset import BenchRequest, Workload, arrival_times
from tilery.cli.bench.endpoint import Server

T = TypeVar("T")
REQUEST_TIMEOUT = 6 * 3600.0
"""Seconds; a run that overloads a server on purpose waits long."""


def start_times(workload: Workload, rate: float, burstiness: float, rng: np.random.Generator) -> list[float]:
    """A trace keeps its own clock unless a rate is given."""
    own = [request.arrival for request in workload.requests if request.arrival is not None]
    if math.isinf(rate) and len(own) == len(workload.requests):
        return own
    return arrival_times(len(workload.requests), rate, burstiness, rng).tolist()


async def run_benchmark(
    server: Server,
    requests: Sequence[BenchRequest],
    bodies: Sequence[bytes],
    times: Sequence[float],
    max_concurrency: int | None,
    num_warmups: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> tuple[list[RequestResult], float]:
    """Sends request i at `times[i]` seconds, or as soon after as `max_concurrency` lets it.

    Returns the results in order and the seconds from the first request to the last answer.
    """
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency else None

    async def one(index: int) -> RequestResult:
        body, length = bodies[index], requests[index].prompt_len
        return await send(server.target, server.endpoint, body, length, server.headers, REQUEST_TIMEOUT)

    async def timed(index: int) -> RequestResult:
        if gate is None:
            result = await one(index)
        else:
            async with gate:
                result = await one(index)
        tick()
        return result

    for warmup in range(num_warmups):
        await one(warmup % len(bodies))
    gc.collect()
    gc.freeze()  # the prompts need no second look while times are taken
    start = time.perf_counter()
    tasks = []
    for index, when in enumerate(times):
        wait = start + when - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(timed(index)))
    results = await asyncio.gather(*tasks)
    duration = time.perf_counter() - start
    gc.unfreeze()
    return list(results), duration


def run_loop(main: Coroutine[Any, Any, T]) -> T:
    """uvloop where there is one: it halves the generator's own share of a chunk's time."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


def progress(total: int) -> Callable[[], None]:
    """A counter on a terminal's stderr, silent elsewhere."""
    if not sys.stderr.isatty():
        return lambda: None
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        print(f"\r{done}/{total} requests", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return tick
