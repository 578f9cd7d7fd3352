"""Times on a CUDA device: medians of graph replays, with a cold second-level cache or not; the card's ceilings."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

REPLAYS = 11
TARGET_US = 20_000.0
"""About how long one replayed graph should take: long against the clock's resolution."""


def capture(call: Callable[[], Any], times: int = 1, between: Callable[[], Any] | None = None) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `times` calls, each after `between`. The call runs twice before, outside the graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            if between is not None:
                between()
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            if between is not None:
                between()
            call()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """One replay, in microseconds, by events."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1000.0


def median_us(call: Callable[[], Any], replays: int = REPLAYS) -> float:
    """Median time of one call with whatever the caches hold, from graphs of as many calls as make about 20 ms."""
    once = capture(call)
    replay_us(once)
    guess = min(replay_us(once) for _ in range(3))
    times = max(1, min(200, round(TARGET_US / max(guess, 1.0))))
    graph = capture(call, times)
    replay_us(graph)
    return statistics.median(replay_us(graph) for _ in range(replays)) / times


class Flush:
    """Empties the second-level cache: a kernel that reads or writes a buffer of five times its size.

    `write` is what most published figures are taken with; it leaves dirty lines that the measured kernel has to wait
    for. `read` leaves clean ones, as the weights of the layer before do in a real step.
    """

    def __init__(self) -> None:
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.buffer = torch.empty(5 * size // 4, dtype=torch.float32, device="cuda").normal_()
        self.total = torch.empty((), dtype=torch.float32, device="cuda")

    def write(self) -> None:
        self.buffer.zero_()

    def read(self) -> None:
        torch.sum(self.buffer, dim=0, out=self.total)


def cold_us(call: Callable[[], Any], flush: Callable[[], Any], replays: int = REPLAYS) -> float:
    """Median time of one call with a cold second-level cache: a graph of (flush, call) pairs less one of flushes,
    replayed in turn, so that a drift of the clock hits both alike."""
    pairs = 20
    both, alone = capture(call, pairs, flush), capture(flush, pairs)
    for graph in (both, alone):
        replay_us(graph)
    return statistics.median(replay_us(both) - replay_us(alone) for _ in range(replays)) / pairs


@dataclass(frozen=True)
class Ceilings:
    """What this card reaches today: TFLOP/s (TOP/s for int8) of 8192-cubed products, TB/s of a copy, both ways."""

    bf16: float
    fp8: float
    int8: float
    copy: float

    @staticmethod
    def measure(size: int = 8192) -> Ceilings:
        """Measures all four on random data: torch.mm, torch._scaled_mm, torch._int_mm, Tensor.copy_ of 4 GB."""
        a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
        products = (_bf16(a, b), _fp8(a, b), _int8(a, b))
        bf16, fp8, int8 = (2.0 * size**3 / median_us(call, 7) / 1e6 for call in products)
        source = torch.empty(2**30, dtype=torch.float32, device="cuda").normal_()
        target = torch.empty_like(source)
        copy = 2.0 * source.numel() * 4 / median_us(lambda: target.copy_(source), 7) / 1e6
        return Ceilings(round(bf16, 1), round(fp8, 1), round(int8, 1), round(copy, 3))


def _bf16(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.mm(a, b)


def _fp8(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device="cuda")
    return lambda: torch._scaled_mm(a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _int8(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    ai, bi = ((x * 32).clamp(-127, 127).to(torch.int8) for x in (a, b))
    return lambda: torch._int_mm(ai, bi.t())
