"""Importing the language is quick and loads no compiler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import sys, time, torch
start = time.process_time()
import tilery.tile
print(time.process_time() - start, *(m for m in ("triton", "torch._dynamo", "torch._inductor") if m in sys.modules))
"""
SECONDS = 1.5
"""Of processor time beyond torch's own; about 0.2 on a quiet machine."""


def test_import_is_light() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 0, done.stderr
    seconds, *loaded = done.stdout.split()
    print(f"import tilery.tile: {float(seconds):.2f} s beyond torch")
    assert not loaded, f"import tilery.tile loads {', '.join(loaded)}"
    assert float(seconds) < SECONDS
