"""How long each program of a kernel may take on a GPU, and where it runs: a model, not a measurement.

Programs are handed to multiprocessors in order, each to the first that is free. A program takes the longest of: its
share of the bytes at its multiprocessor's share of the copy rate; its operations at its share of the arithmetic rates;
the latency of memory, divided by the programs resident beside it, which hide it. What it leaves out: several passes
over the data that the bytes count once, cache hits, uneven memory channels, instruction issue. `accuracy.py` compares
it with measured times.
"""

from __future__ import annotations

import heapq
import itertools
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from tilery.tile.explain import H100, Machine, Work
from tilery.tile.ir import Kernel, Value
from tilery.tile.lowering import Lowered


@dataclass(frozen=True)
class Device:
    """`machine`: rates of the whole device. Per multiprocessor: 32-bit `registers`, `threads`, `shared` bytes,
    `programs`. `reach`: how many times its share of the copy rate one multiprocessor can draw while others are idle.
    `latency`, `launch`: seconds."""

    machine: Machine
    processors: int
    registers: int
    threads: int
    shared: int
    programs: int
    reach: float
    latency: float
    launch: float


H100_DEVICE = Device(H100, 132, 65536, 2048, 233472, 32, reach=2.5, latency=2.0e-6, launch=1.3e-6)
"""Sizes from the data sheet; latency and launch are fitted to measured kernels (`accuracy.py`), reach is a guess."""

MOST = 100_000
"""Programs that are placed one by one; of more, several consecutive ones count as one."""


@dataclass(frozen=True)
class Placed:
    """Programs `first` to `first + count - 1` on a multiprocessor, in seconds from the launch."""

    processor: int
    first: int
    count: int
    start: float
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """`resident`: programs that fit a multiprocessor at once, and `limit`, what limits them. `seconds`: of the launch,
    to the end of the last program."""

    kernel: str
    programs: int
    warps: int
    resident: int
    limit: str
    bound: str
    seconds: float
    placed: tuple[Placed, ...]
    device: Device

    @property
    def busy(self) -> float:
        """The share of the multiprocessors' time, from the first program to the last one's end, with programs."""
        span = self.seconds - self.device.launch
        return sum(p.seconds for p in self.placed) / (span * self.device.processors) if span > 0 else 0.0

    @property
    def waves(self) -> float:
        """How often all multiprocessors are filled."""
        return self.programs / (self.device.processors * self.resident)


def estimate(
    lowered: Lowered, env: Mapping[str, int], work: Work, programs: int, registers: int = 0, shared: int = 0,
    device: Device = H100_DEVICE,
) -> Estimate:  # fmt: skip
    """`lowered`: for Triton; `work`: of the whole launch; `registers` per thread and `shared` bytes per program as
    compiled, 0 where they are not known."""
    warps = lowered.schedule.warps or 4
    limits = {
        "programs": device.programs,
        "threads": device.threads // (32 * warps),
        "registers": device.registers // (registers * 32 * warps) if registers else device.programs,
        "shared memory": device.shared // shared if shared else device.programs,
    }
    limit = min(limits, key=limits.__getitem__)
    resident = max(1, limits[limit])
    shares = program_shares(lowered.kernel, env, programs)
    active = min(max(programs, 1), device.processors)
    rate = device.machine
    copy = min(rate.copy / active, device.reach * rate.copy / device.processors)
    memory = work.bytes / copy
    matrix = sum(n / rate.matrix.get(d, rate.vector) for d, n in work.matrix.items()) * device.processors
    arithmetic = max(matrix, work.vector / rate.vector * device.processors)
    whole = max(memory, arithmetic)
    beside = max(1, min(resident, -(-programs // device.processors)))
    placed = _place(shares, whole, device.latency / beside, device)
    end = max((p.start + p.seconds for p in placed), default=device.launch)
    bound = "memory" if memory >= arithmetic else "arithmetic"
    if placed and device.latency / beside > whole * statistics.median(shares):
        bound = "latency"
    return Estimate(lowered.kernel.name, programs, warps, resident, limit, bound, end, placed, device)


def _place(shares: list[float], whole: float, latency: float, device: Device) -> tuple[Placed, ...]:
    together = -(-len(shares) // MOST) or 1
    free = [(device.launch, n) for n in range(device.processors)]
    placed = []
    for first in range(0, len(shares), together):
        part = shares[first : first + together]
        start, processor = heapq.heappop(free)
        seconds = sum(max(share * whole, latency) for share in part)
        placed.append(Placed(processor, first, len(part), start, seconds))
        heapq.heappush(free, (start + seconds, processor))
    return tuple(placed)


def program_shares(kernel: Kernel, env: Mapping[str, int], programs: int) -> list[float]:
    """Each program's share of the work: equal but for ragged last blocks, where the grid's bounds are known."""
    lengths = _axes(kernel, env)
    if lengths is None or math.prod(map(len, lengths)) != programs:
        return [1.0 / programs] * programs if programs else []
    total = 1.0
    for axis in lengths:
        total *= sum(axis)
    weights = []
    for combination in itertools.product(*lengths):
        weight = 1.0
        for length in combination:
            weight *= length
        weights.append(weight / total)
    return weights


def _axes(kernel: Kernel, env: Mapping[str, int]) -> list[list[int]] | None:
    """Per axis of the grid the lengths of its blocks, or None where they are read from memory."""
    known: dict[int, int] = {}
    for op in kernel.body:
        if op.name == "size":
            known[op.result.id] = op.attr("size").evaluate(env)
        if op.name == "parallel":
            axes, steps = [], {**dict(kernel.blocks), **dict(op.attr("steps", ()))}
            for number, (kind, label) in enumerate(op.attr("axes")):
                ends = []
                for operand in op.operands[2 * number : 2 * number + 2]:
                    value = known.get(operand.id) if isinstance(operand, Value) else int(operand)
                    if value is None:
                        return None
                    ends.append(value)
                step = steps.get(label, 1) if kind == "block" else 1
                axes.append([min(step, ends[1] - at) for at in range(ends[0], ends[1], step)])
            return axes
    return None
