"""The table of what every Hopper kernel's machine code needs, and the check against it. No GPU is needed.

`python -m tilery.ops.hopper.binaries` compiles all variants for sm_90a and writes the table; tests compile them again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tilery.ops.hopper.variant import Variant, build

MODULES = (
    "dense_mla", "gemm", "grouped_gemm", "index_logits", "index_select", "int4_gemm", "int8_gemm", "prefill",
    "sparse_mla", "sparse_prefill", "topk",
)  # fmt: skip
"""The modules with `variants()`."""

TABLE = Path("benchmarks/results/hopper_kernels.json")
SHARED_LIMIT = 232448
"""Bytes of shared memory that one program can have on Hopper."""
MORE = 1.1
"""Registers at launch and shared memory may grow by this factor before it counts as a regression."""
REGENERATE = "if that is meant, write the table anew: python -m tilery.ops.hopper.binaries"


@dataclass(frozen=True)
class Facts:
    """One binary. spills: loads and stores of local memory. tensor: HGMMA, QGMMA and IGMMA instructions together."""

    registers: int
    spills: int
    shared: int
    tensor: int


def variants() -> dict[str, Variant]:
    """Every variant of every module, by `module/name`. Raises `ValueError` if a name occurs twice."""
    found: dict[str, Variant] = {}
    for module in MODULES:
        for variant in importlib.import_module(f"tilery.ops.hopper.{module}").variants():
            name = f"{module}/{variant.name}"
            if name in found:
                raise ValueError(f"two variants are called {name}")
            found[name] = variant
    return found


def facts(name: str) -> Facts:
    """Compiles one variant, by its name in `variants()`."""
    built = build(variants()[name])
    tensor = sum(built.counts.get(opcode, 0) for opcode in ("HGMMA", "QGMMA", "IGMMA"))
    return Facts(built.registers, built.spills, built.shared, tensor)


def read(path: Path) -> dict[str, Facts]:
    """The recorded rows."""
    return {name: Facts(**row) for name, row in json.loads(path.read_text())["kernels"].items()}


def complaints(name: str, found: Facts, recorded: Facts | None) -> Iterator[str]:
    """What is worse than the table says, or than any kernel may be."""
    if recorded is None:
        yield f"{name} is not in {TABLE}; {REGENERATE}"
        return
    if found.shared > SHARED_LIMIT:
        yield f"{name} wants {found.shared} bytes of shared memory, Hopper has {SHARED_LIMIT}"
    if found.spills > recorded.spills:
        yield f"{name} spills {found.spills} times, recorded {recorded.spills}; {REGENERATE}"
    for fact in ("registers", "shared"):
        now, before = getattr(found, fact), getattr(recorded, fact)
        if now > MORE * before:
            yield f"{name} needs {now} {fact}, recorded {before}; {REGENERATE}"
    if recorded.tensor and not found.tensor:
        yield f"{name} has lost its tensor-core instructions"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the Hopper kernels and write what they need.")
    parser.add_argument("--print", action="store_true", help="only show it")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    import triton

    names = list(variants())
    with ProcessPoolExecutor(options.processes) as workers:
        rows = dict(zip(names, workers.map(facts, names), strict=True))
    for name, row in rows.items():
        print(f"{name:60} {row.registers:4} registers {row.spills:4} spills {row.shared:7} shared {row.tensor:4} MMA")
    if not options.print:
        table = {"triton": triton.__version__, "kernels": {name: asdict(row) for name, row in rows.items()}}
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
        print(f"written: {TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
