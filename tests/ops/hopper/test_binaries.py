"""Every Hopper kernel compiles for sm_90a, without a GPU, into code that needs no more than is recorded.

`python -m tilery.ops.hopper.binaries` writes the record, benchmarks/results/hopper_kernels.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from tilery.ops.hopper import binaries  # noqa: E402
from tilery.ops.hopper.binaries import Facts  # noqa: E402

RECORD = Path(__file__).resolve().parents[3] / binaries.TABLE
NAMES = list(binaries.variants())
ONCE_A_BLOCK = {
    "index_logits/index_logits_64", "index_logits/index_logits_paged_2", "index_logits/index_logits_paged_3",
    "index_select/index_select_keep",
}  # fmt: skip
"""They save registers once a block of queries; test_index.py looks that nothing spills inside their loops."""


@pytest.fixture(scope="module")
def recorded() -> dict[str, Facts]:
    return binaries.read(RECORD)


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Facts]]]:
    """What becomes known of the variants whose tests are selected, two processes at a time."""
    chosen = [i.callspec.params["name"] for i in request.session.items
              if getattr(i, "originalname", "") == "test_is_no_worse_than_recorded"]  # fmt: skip
    with ProcessPoolExecutor(2) as workers:
        running = {name: workers.submit(binaries.facts, name) for name in chosen}
        try:
            yield running
        finally:
            for future in running.values():
                future.cancel()


@pytest.mark.parametrize("name", NAMES)
def test_is_no_worse_than_recorded(name: str, compiled: dict[str, Future[Facts]], recorded: dict[str, Facts]) -> None:
    wrong = list(binaries.complaints(name, compiled[name].result(), recorded.get(name)))
    assert not wrong, "\n".join(wrong)


def test_the_record_has_no_others(recorded: dict[str, Facts]) -> None:
    gone = sorted(set(recorded) - set(NAMES))
    assert not gone, f"{binaries.TABLE} has rows of variants that are gone: {gone}"


def test_the_record_is_of_the_triton_that_is_supported() -> None:
    assert json.loads(RECORD.read_text())["triton"] == "3.6.0"


def test_nothing_recorded_spills_and_products_use_tensor_cores(recorded: dict[str, Facts]) -> None:
    assert {name for name, facts in recorded.items() if facts.spills} <= ONCE_A_BLOCK
    others = ("topk", "guess", "choose", "combine")
    assert not [name for name in recorded if not recorded[name].tensor and not any(word in name for word in others)]


def test_the_check_itself() -> None:
    before = Facts(registers=168, spills=0, shared=200_000, tensor=24)
    assert not list(binaries.complaints("k", before, before))
    worse = Facts(registers=255, spills=3, shared=240_000, tensor=0)
    said = "\n".join(binaries.complaints("k", worse, before))
    for part in ("spills 3 times", "255 registers", "Hopper has 232448", "lost its tensor-core", "240000 shared"):
        assert part in said
    assert "is not in" in next(binaries.complaints("k", before, None))
