"""What every benchmark script needs: the device, versions and commit beside its numbers, and one way to write the JSON.

    from _common import environment, write_result
    write_result("my_claim", {"runs": runs, "environment": environment()}, args.out)

Scripts are run from the repository root as `python benchmarks/my_claim.py`; results go to `benchmarks/results/`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "msgspec", "transformers", "vllm")


def environment() -> dict[str, Any]:
    """Everything that a reader needs to judge or repeat a number, as plain JSON values."""
    commit = _git("rev-parse", "HEAD")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")) if commit else None,
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpus": _gpus(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": _versions(),
    }


def write_result(name: str, result: dict[str, Any], path: str | Path | None = None) -> Path:
    """Writes `result`, and an `environment` if it has none, to `path` or benchmarks/results/NAME.json."""
    target = Path(path) if path else RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    record = {"benchmark": name, **result}
    record.setdefault("environment", environment())
    target.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"Written: {target}")
    return target


def _git(*arguments: str) -> str | None:
    try:
        ran = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def _cpu() -> dict[str, Any]:
    """Model name, and the instruction sets that decide how fast matrix work is."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {"model": platform.processor() or platform.machine(), "features": []}
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
    return {"model": fields.get("model name", platform.machine()), "features": [f for f in wanted if f in flags]}


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _gpus() -> list[str]:
    """Name, memory and driver of each, from the driver's own tool; none where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        ran = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return ran.stdout.strip().splitlines() if ran.returncode == 0 else []


def _versions() -> dict[str, str]:
    import tilery

    found = {"tilery": tilery.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
