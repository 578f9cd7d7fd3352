"""What every test shares: few threads, repeatable property tests, the folder of the bundled model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before anything imports torch: tests run side by side with others, and two threads are plenty for small tensors.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def bundled_model() -> Path:
    """The folder of `tilery-books-26m`: config.json, tokenizer and weights."""
    folder = ROOT / "tilery" / "bundled" / "tilery-books-26m"
    assert (folder / "config.json").is_file(), f"{folder} is incomplete: is this a full checkout?"
    return folder
