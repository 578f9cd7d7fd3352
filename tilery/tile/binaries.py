"""What the compiled kernels need of a Hopper GPU: registers, spilled bytes, shared memory. No GPU is needed to know.

`python -m tilery.tile.binaries` compiles every kernel of the operators at the sizes of its benchmark cases (its small
cases, where it has none) and writes the table that tests compare with. `--print` only shows it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tilery.tile import registry
from tilery.tile.launch import bucket
from tilery.tile.lowering import lower
from tilery.tile.verify_all import pool

if TYPE_CHECKING:
    from tilery.tile.kernel import Kernel

TABLE = Path("benchmarks/results/hopper_binaries.json")
PACKAGE = "tilery.ops.kernels"
MORE = 1.25
"""Registers and shared memory may grow by this factor before it counts as a regression."""
SHARED_LIMIT = 232448
"""Bytes of shared memory that one program can have on Hopper."""
PER_KERNEL = 2
"""Benchmark cases that are compiled of each kernel: the first ones, usually a small and a big one."""
REGENERATE = "if that is meant, regenerate the table: python -m tilery.tile.binaries"


@dataclass(frozen=True)
class Facts:
    """One binary. `spilled`: bytes of local memory per thread."""

    registers: int
    spilled: int
    shared: int
    warps: int
    stages: int


def specialisations(kernel: Kernel) -> list[str]:
    """The names of the cases that are compiled."""
    return list(kernel.benches)[:PER_KERNEL] or list(kernel.cases)[:1]


def label(kernel: Kernel, case: str) -> str:
    """The key of a row: `norm.rms_norm/hidden_4096`."""
    return f"{kernel.full_name.removeprefix(PACKAGE + '.')}/{case}"


def arguments_of(kernel: Kernel, case: str) -> dict[str, Any]:
    """A case's arguments without their data: tensors on the meta device, so that the biggest cost nothing."""
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
    )

    def make() -> dict[str, Any]:
        rand = torch.Generator().manual_seed(0)
        return kernel.benches[case](rand, "cpu") if case in kernel.benches else kernel.cases[case](rand)

    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            given = make()
    except (DataDependentOutputException, DynamicOutputShapeException):  # a case that looks at its numbers
        given = make()
    return kernel.signature.bind((), {name: _meta(value) for name, value in given.items()})


def _meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def measure(kernel: Kernel, case: str) -> Facts:
    """Emits and compiles what a launch of the case would run on Hopper. Raises `TileError` if it does not compile."""
    from tilery.tile.targets.triton import emit, report, spec_of

    arguments = arguments_of(kernel, case)
    key, env = kernel.specialise(arguments)
    ir = kernel.trace(key)
    rounded = bucket(env, tuple(d.name for d in ir.tile_dims))
    lowered = lower(ir, rounded, "triton", kernel.schedule_for(rounded, "triton"))
    emitted = emit(lowered.kernel, lowered.schedule, spec_of(lowered.kernel, arguments, env))
    found = report(emitted)
    return Facts(found.registers, found.spills, found.shared, emitted.plan.warps, emitted.plan.stages)


def submit(workers: ProcessPoolExecutor, kernel: Kernel, case: str) -> Future[Facts]:
    """Measures in another process, which imports the kernel's module."""
    return workers.submit(_measured, kernel.function.__module__, kernel.full_name, case)


def _measured(module: str, name: str, case: str) -> Facts:
    importlib.import_module(module)
    return measure(registry.find(name), case)


def read(path: Path) -> dict[str, Facts]:
    """The recorded rows."""
    return {name: Facts(**row) for name, row in json.loads(path.read_text())["binaries"].items()}


def complaints(name: str, facts: Facts, recorded: Facts | None) -> Iterator[str]:
    """What is worse than the table says."""
    if recorded is None:
        yield f"{name} is not in {TABLE}; {REGENERATE}"
        return
    if facts.spilled > recorded.spilled:
        yield f"{name} spills {facts.spilled} bytes per thread, {recorded.spilled} are recorded; {REGENERATE}"
    if facts.registers > MORE * recorded.registers:
        yield f"{name} needs {facts.registers} registers, {recorded.registers} are recorded; {REGENERATE}"
    if facts.shared > max(MORE * recorded.shared, recorded.shared + 1024):
        yield f"{name} needs {facts.shared} B of shared memory, {recorded.shared} are recorded; {REGENERATE}"
    if facts.shared > SHARED_LIMIT:
        yield f"{name} needs {facts.shared} B of shared memory, a Hopper GPU has {SHARED_LIMIT}: use smaller blocks"


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tilery.tile.binaries", description=__doc__)
    parser.add_argument("--out", type=Path, default=TABLE, help="the table to write")
    parser.add_argument("--print", action="store_true", help="show the table, write nothing")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name has this text; others stay")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(given)
    registry.discover(PACKAGE)
    wanted = {label(k, c): (k, c) for k in registry.kernels(PACKAGE + ".") for c in specialisations(k)}
    kept = read(options.out) if options.only and options.out.is_file() else {}
    rows = {name: facts for name, facts in kept.items() if name in wanted}
    failed = 0
    with pool(options.processes) as workers:
        running = {n: submit(workers, k, c) for n, (k, c) in wanted.items() if options.only in n}
        for name, future in running.items():
            try:
                rows[name] = future.result()
                print(f"{name}: {_text(rows[name])}")
            except Exception as error:  # the others are still worth knowing
                failed += 1
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
    if not options.print:
        options.out.write_text(_document(rows))
        print(f"{len(rows)} binaries in {options.out}" + (f"; {failed} do not compile" if failed else ""))
    return 1 if failed else 0


def _text(facts: Facts) -> str:
    return f"{facts.registers} registers, {facts.spilled} B spilled, {facts.shared} B shared, {facts.warps} warps"


def _document(rows: Mapping[str, Facts]) -> str:
    """JSON with one row a line, so that changes are readable."""
    from tilery.tile.targets.triton.build import triton_version

    lines = [f"  {json.dumps(name)}: {json.dumps(asdict(facts))}" for name, facts in sorted(rows.items())]
    body = ",\n".join(lines)
    return f'{{\n "target": "sm_90a",\n "triton": "{triton_version()}",\n "binaries": {{\n{body}\n }}\n}}\n'


if __name__ == "__main__":
    sys.exit(main())
