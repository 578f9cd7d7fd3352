"""Every kernel compiles for Hopper, without a GPU, into a binary that needs no more of it than is recorded.

`python -m tilery.tile.binaries` writes the record, benchmarks/results/hopper_binaries.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from tests.ops.kernels.support import ALL
from tilery.tile.binaries import SHARED_LIMIT, TABLE, Facts, complaints, label, read, specialisations, submit
from tilery.tile.kernel import Kernel
from tilery.tile.verify_all import pool

triton = pytest.importorskip("triton")

PROCESSES = 2
ROOT = Path(__file__).resolve().parents[3]
WANTED = [pytest.param(k, case, id=label(k, case)) for k in ALL for case in specialisations(k)]


@pytest.fixture(scope="module")
def recorded() -> dict[str, Facts]:
    return read(ROOT / TABLE)


@pytest.fixture(scope="module")
def binaries(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Facts]]]:
    """What becomes known of the kernels whose tests are selected."""
    chosen = [i.callspec.params for i in request.session.items
              if getattr(i, "originalname", "") == "test_needs_no_more_than_recorded"]  # fmt: skip
    with pool(min(PROCESSES, len(chosen))) as workers:
        running = {label(p["kernel"], p["case"]): submit(workers, p["kernel"], p["case"]) for p in chosen}
        try:
            yield running
        finally:
            for future in running.values():
                future.cancel()


@pytest.mark.parametrize(("kernel", "case"), WANTED)
def test_needs_no_more_than_recorded(
    kernel: Kernel, case: str, binaries: dict[str, Future[Facts]], recorded: dict[str, Facts]
) -> None:
    name = label(kernel, case)
    wrong = list(complaints(name, binaries[name].result(), recorded.get(name)))
    assert not wrong, "\n".join(wrong)


def test_the_record_has_no_others(recorded: dict[str, Facts]) -> None:
    gone = sorted(set(recorded) - {param.id for param in WANTED})
    assert not gone, f"{TABLE} has rows of kernels or cases that are gone: {gone}; run python -m tilery.tile.binaries"


def test_the_record_is_of_the_triton_that_is_supported() -> None:
    """Another compiler allocates other registers."""
    made = json.loads((ROOT / TABLE).read_text())["triton"]
    assert made.split(".")[:2] == triton.__version__.split(".")[:2], "run python -m tilery.tile.binaries"


def test_what_counts_as_worse() -> None:
    old = Facts(registers=100, spilled=0, shared=8192, warps=4, stages=2)

    def worse(**changed: int) -> str:
        return "\n".join(complaints("norm.x/y", Facts(**{**vars(old), **changed}), old))

    assert worse() == ""
    assert worse(registers=125, shared=10240) == ""
    assert worse(spilled=8).startswith("norm.x/y spills 8 bytes per thread, 0 are recorded; if that is meant, regener")
    assert "needs 126 registers, 100 are recorded" in worse(registers=126)
    assert "needs 10241 B of shared memory, 8192 are recorded" in worse(shared=10241)
    assert "use smaller blocks" in worse(shared=SHARED_LIMIT + 1)
    assert list(complaints("norm.x/y", old, None)) == [
        "norm.x/y is not in benchmarks/results/hopper_binaries.json; if that is meant, regenerate the table: "
        "python -m tilery.tile.binaries"
    ]
