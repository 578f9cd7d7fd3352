"""Verifies many kernels, several at a time in processes of their own."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

import torch

from tilery.tile import registry
from tilery.tile.errors import TileError

if TYPE_CHECKING:
    from tilery.tile.kernel import Kernel
    from tilery.tile.verify import Report

FEW = 8
"""Kernels that one process verifies before another would have loaded torch."""


def verify_all(kernels: Sequence[Kernel], processes: int | None = None) -> Iterator[tuple[Kernel, Report | str, float]]:
    """(kernel, its report or what it raised, seconds) of every kernel, in order, as they become known.

    `processes`: 1 verifies in this process; None chooses by the number of kernels and of processors.
    """
    if processes is None:
        processes = min(os.cpu_count() or 1, 1 + len(kernels) // FEW)
    if processes < 2:
        for kernel in kernels:
            yield kernel, *_verify(kernel)
        return
    with pool(processes) as workers:
        running = [submit(workers, kernel) for kernel in kernels]
        try:
            for kernel, future in zip(kernels, running):
                found: tuple[Report | str, float]
                try:
                    found = future.result()
                except BrokenProcessPool:
                    found = "a process ended while this kernel or its neighbour ran; verify it alone", 0.0
                yield kernel, *found
        finally:
            for future in running:
                future.cancel()


def pool(processes: int) -> ProcessPoolExecutor:
    """Processes that verify: started afresh, since threads of torch do not survive a fork."""
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start)


def submit(workers: ProcessPoolExecutor, kernel: Kernel) -> Future[tuple[Report | str, float]]:
    """Verifies a kernel in one of the processes, which import its module."""
    return workers.submit(_found, kernel.function.__module__, kernel.full_name)


def _start() -> None:
    torch.set_num_threads(1)  # the processes share the processors


def _found(module: str, name: str) -> tuple[Report | str, float]:
    importlib.import_module(module)
    try:
        kernel = registry.find(name)
    except TileError as error:
        return f"{type(error).__name__}: {error}; another process sees kernels of a module's own only", 0.0
    return _verify(kernel)


def _verify(kernel: Kernel) -> tuple[Report | str, float]:
    start = time.perf_counter()
    try:
        found: Report | str = kernel.verify(raises=False)
    except Exception as error:  # whatever a kernel's own code raises; the others still run
        found = f"{type(error).__name__}: {error}"
    return found, time.perf_counter() - start
