"""How far the estimate is from measured times: `python -m tilery.tile.page.accuracy`.

Compares with the times of `benchmarks/results/tile_gpu.json` (an H100; calls inside a CUDA graph, one after the other),
for every kernel and benchmark case whose work does not depend on data. The factor is the estimate over the measurement.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilery.tile import binaries, registry
from tilery.tile.errors import TileError
from tilery.tile.page.kernel import arguments_for, subject

MEASURED = Path("benchmarks/results/tile_gpu.json")


@dataclass(frozen=True)
class Row:
    """Microseconds."""

    kernel: str
    case: str
    estimated: float
    measured: float
    bound: str

    @property
    def factor(self) -> float:
        return self.estimated / self.measured


def compare(measured: Sequence[dict[str, Any]], registers: dict[str, binaries.Facts]) -> Iterator[Row]:
    """`measured`: rows with kernel, case and us; `registers`: of the binaries, by `binaries.label`."""
    registry.discover(binaries.PACKAGE)
    for row in measured:
        try:
            kernel = registry.find(row["kernel"], binaries.PACKAGE + ".")
        except TileError:
            continue  # a graph, or a kernel that is no more
        if row["case"] not in kernel.benches or not row.get("us"):
            continue
        found = registers.get(binaries.label(kernel, row["case"]))
        known = (found.registers, found.shared) if found else (0, 0)
        made = subject(kernel, arguments_for(kernel, row["case"]), binary=False, compiled=known)
        if made.lanes is not None and not made.about.work.open:
            yield Row(kernel.name, row["case"], made.lanes.seconds * 1e6, row["us"], made.lanes.bound)


def summary(rows: Sequence[Row]) -> str:
    """One line: how many, the median of the factors' distances from 1, how many are within 1.25 and 1.5, the bias."""
    distances = sorted(abs(math.log(row.factor)) for row in rows)
    within = {limit: sum(d <= math.log(limit) for d in distances) for limit in (1.25, 1.5, 2.0)}
    parts = [f"{count} within a factor of {limit:g}" for limit, count in within.items()]
    middle = math.exp(statistics.median(math.log(row.factor) for row in rows))
    return (
        f"{len(rows)} kernels: half are within a factor of {math.exp(statistics.median(distances)):.2f}; "
        f"{', '.join(parts)}; median factor {middle:.2f}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, worst last, and the summary."""
    parser = argparse.ArgumentParser(prog="python -m tilery.tile.page.accuracy", description=__doc__)
    parser.add_argument("--measured", type=Path, default=MEASURED, help="default: %(default)s")
    path = parser.parse_args(arguments).measured
    rows = list(compare(json.loads(path.read_text())["rows"], binaries.read(binaries.TABLE)))
    for row in sorted(rows, key=lambda r: abs(math.log(r.factor))):
        name = f"{row.kernel}/{row.case}"
        print(f"{name:<52} {row.estimated:>9.2f} us {row.measured:>9.2f} us {row.factor:>6.2f}  {row.bound}")
    print(summary(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
