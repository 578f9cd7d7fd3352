"""One family of cases in a process of its own: a kernel that breaks the CUDA context or hangs costs its family only.

`isolated` starts `python -m tilery.ops.bench.worker` and yields rows as they come; cases that the process did not live
to measure come back as failures.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from tilery.ops.bench import run
from tilery.ops.bench.baselines import Baselines
from tilery.ops.bench.case import Case
from tilery.ops.bench.measure import Ceilings, Flush

SECONDS = 240.0
"""After which a family's process is ended."""


def isolated(cases: Sequence[Case], ceilings: Ceilings | None) -> Iterator[dict[str, Any]]:
    """The rows of `cases`, measured in another process; only checked where `ceilings` is None."""
    order = json.dumps({"names": [case.name for case in cases], "ceilings": ceilings and vars(ceilings)})
    command = [sys.executable, "-m", "tilery.ops.bench.worker"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    ending = threading.Timer(SECONDS, process.kill)
    ending.start()
    missing = {case.name: case for case in cases}
    try:
        process.stdin.write(order)
        process.stdin.close()
        for line in process.stdout:
            if line.startswith("{"):
                row = json.loads(line)
                missing.pop(row.pop("name"), None)
                yield row
        code = process.wait()
    finally:
        ending.cancel()
        process.kill()
        process.wait()
    why = f"its process ended with exit code {code} before it was measured (limit {SECONDS:.0f} s)"
    for case in missing.values():
        yield {"kernel": case.kernel, "shape": dict(case.shape), "failure": why}


def main() -> None:
    """Reads the order from standard input and prints one row a line."""
    order = json.load(sys.stdin)
    by_name = {case.name: case for case in run.all_cases()}
    baselines = Baselines.load()
    ceilings = Ceilings(**order["ceilings"]) if order["ceilings"] else None
    flush = Flush() if ceilings else None
    for name in order["names"]:
        case = by_name[name]
        if ceilings is None or flush is None:
            row = run.check_case(case)
        else:
            row = run.measure_case(case, ceilings, baselines, flush)
        print(json.dumps({"name": name, **row}), flush=True)


if __name__ == "__main__":
    main()
