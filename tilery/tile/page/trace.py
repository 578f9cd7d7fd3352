"""Traces in the Chrome format, which Perfetto and chrome://tracing open: one lane per multiprocessor.

A trace says in `otherData` what it is: `"measured": false` and how it was estimated. Traces from timers inside a kernel
will have the same lanes and `"measured": true`; everything that draws or stores a trace takes both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tilery.tile.page.estimate import Estimate

Trace = dict[str, Any]
LABEL = "estimated, not measured"


def trace_of(estimates: Sequence[Estimate], names: Sequence[str] = ()) -> Trace:
    """Launches one after the other. `names`: of the launches, by default their kernels'. Times in microseconds."""
    names = names or [e.kernel for e in estimates]
    device = estimates[0].device
    events: list[dict[str, Any]] = [_meta("process_name", f"{device.machine.name} ({LABEL})")]
    events += [_meta("thread_name", f"SM {n}", n) for n in range(device.processors)]
    begin = 0.0
    for name, made in zip(names, estimates):
        for p in made.placed:
            count = f" to {p.first + p.count - 1}" if p.count > 1 else ""
            events.append(
                {
                    "ph": "X", "pid": 0, "tid": p.processor, "cat": "estimated", "name": f"{name} {p.first}{count}",
                    "ts": round((begin + p.start) * 1e6, 4), "dur": round(p.seconds * 1e6, 4),
                    "args": {"kernel": name, "program": p.first, "programs": p.count, "bound by": made.bound},
                }
            )  # fmt: skip
        begin += made.seconds
    about = {
        "measured": False, "source": "cost model", "note": LABEL, "device": device.machine.name,
        "launches": [{"name": n, "seconds": e.seconds, "programs": e.programs} for n, e in zip(names, estimates)],
    }  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": about}


def _meta(kind: str, name: str, lane: int = 0) -> dict[str, Any]:
    return {"ph": "M", "pid": 0, "tid": lane, "name": kind, "args": {"name": name}}


def lanes_of(trace: Trace) -> dict[int, list[tuple[float, float, int, str]]]:
    """Per lane (start, duration, programs, launch) in microseconds, in order."""
    lanes: dict[int, list[tuple[float, float, int, str]]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "M" and event["name"] == "thread_name":
            lanes.setdefault(event["tid"], [])
        elif event["ph"] == "X":
            about = event.get("args", {})
            row = (event["ts"], event["dur"], about.get("programs", 1), about.get("kernel", event["name"]))
            lanes.setdefault(event["tid"], []).append(row)
    return {lane: sorted(rows) for lane, rows in sorted(lanes.items())}
