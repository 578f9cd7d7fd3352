"""Every registered kernel: its contract, and every stage of its lowering on every case against its reference.

The one place that verifies kernels; the other files here test what a reference cannot say. Two processes share the
work, and the kernels' tests read the results.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from tests.ops.kernels.support import ALL
from tilery.tile.kernel import Kernel
from tilery.tile.verify import Report
from tilery.tile.verify_all import pool, submit

PROCESSES = 2
Reports = dict[str, Future[tuple[Report | str, float]]]


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest) -> Iterator[Reports]:
    """What becomes known of the kernels whose tests are selected."""
    chosen = {item.callspec.params["kernel"].full_name for item in request.session.items if hasattr(item, "callspec")
              and item.originalname == "test_every_stage"}  # fmt: skip
    kernels = [k for k in ALL if k.full_name in chosen]
    with pool(min(PROCESSES, len(kernels))) as workers:
        running = {k.full_name: submit(workers, k) for k in kernels}
        try:
            yield running
        finally:
            for future in running.values():
                future.cancel()


@pytest.mark.parametrize("kernel", ALL, ids=lambda k: k.name)
def test_contract(kernel: Kernel) -> None:
    """A docstring, a reference, a tolerance, a case."""
    assert kernel.function.__doc__
    assert kernel.reference is not None
    assert kernel.tolerance is not None
    assert kernel.cases


@pytest.mark.parametrize("kernel", ALL, ids=lambda k: k.name)
def test_every_stage(kernel: Kernel, reports: Reports) -> None:
    found, seconds = reports[kernel.full_name].result()
    assert isinstance(found, Report), found
    assert found.ok, f"{found.first_bad}\n{found}"
    print(f"{kernel.name}: {len(found.rows)} stages, {seconds:.1f} s")
