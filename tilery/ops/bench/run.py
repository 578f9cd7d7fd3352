"""Runs cases: checks each on fresh random data with poisoned outputs, times it, makes the row of the table."""

from __future__ import annotations

import fnmatch
import importlib
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from tilery.ops.bench import FAMILIES
from tilery.ops.bench.baselines import Baselines
from tilery.ops.bench.case import Case, Prepared
from tilery.ops.bench.measure import Ceilings, Flush, cold_us, median_us

SEED = 20_261_122


def all_cases(families: Sequence[str] = FAMILIES) -> list[Case]:
    """The cases of every family, in the order of the table."""
    return [case for family in families for case in cases_of(family)]


def cases_of(family: str) -> list[Case]:
    """The cases of one family."""
    found: list[Case] = importlib.import_module(f"tilery.ops.bench.{family}").cases()
    return found


def by_family(cases: Iterable[Case]) -> list[list[Case]]:
    """`cases` apart by family, in the order of the table; families without any are left out."""
    wanted = {case.name for case in cases}
    parts = ([case for case in cases_of(family) if case.name in wanted] for family in FAMILIES)
    return [part for part in parts if part]


def chosen(cases: Iterable[Case], patterns: Sequence[str]) -> list[Case]:
    """The cases whose kernel is named or whose name matches a shell pattern; all without patterns.

    Raises `ValueError` for a pattern that matches nothing.
    """
    cases = list(cases)
    if not patterns:
        return cases
    kept: list[Case] = []
    for pattern in patterns:
        # Square brackets are part of a name, not a set of characters.
        glob = pattern.replace("[", "[[]")
        found = [case for case in cases if case.kernel == pattern or fnmatch.fnmatchcase(case.name, glob)]
        if not found:
            kernels = ", ".join(dict.fromkeys(case.kernel for case in cases))
            raise ValueError(f"no case matches {pattern!r}; kernels: {kernels}")
        kept += [case for case in found if case not in kept]
    return kept


def poison(prepared: Prepared) -> None:
    """Every byte of the outputs 0xFF: NaN in all float formats here, -1 in the integer ones."""
    for output in prepared.outputs:
        output.view(torch.uint8).fill_(0xFF)


def measure_case(
    case: Case, ceilings: Ceilings, baselines: Baselines, flush: Flush, seed: int = SEED
) -> dict[str, Any]:
    """The row of one case: error, times, rates, ratio, and whether `must` and `aim` hold; `failure` if it raised."""
    row: dict[str, Any] = {}

    def work() -> None:
        prepared, error = _checked(case, seed)
        row.update(error=error, error_bound=case.error_bound)
        row.update(_times(case, prepared, flush))
        row.update(rates(case, prepared, row["us"], ceilings, baselines, row.get("rival_us")))
        if not error <= case.error_bound:  # a time of a wrong result meets nothing
            row.update({key: False for key in ("met", "aim_met") if row[key] is not None})

    return _row(case, row, work)


def check_case(case: Case, seed: int = SEED) -> dict[str, Any]:
    """The row of one case without times: error, or `failure` if it raised."""
    row: dict[str, Any] = {}
    return _row(case, row, lambda: row.update(error=_checked(case, seed)[1], error_bound=case.error_bound))


def _checked(case: Case, seed: int) -> tuple[Prepared, float]:
    prepared = case.make(torch.Generator(device="cuda").manual_seed(seed))
    poison(prepared)
    result = prepared.run()
    torch.cuda.synchronize()
    return prepared, prepared.error(result) if _written(prepared) else float("inf")


def _written(prepared: Prepared) -> bool:
    """Whether no poison is left: `error` looks at samples, and skipped work would be cheap."""
    floats = [output for output in prepared.outputs if output.is_floating_point()]
    return not prepared.complete or not any(bool(output.isnan().any()) for output in floats)


def _row(case: Case, row: dict[str, Any], work: Callable[[], None]) -> dict[str, Any]:
    row.update(kernel=case.kernel, shape=dict(case.shape))
    try:
        work()
    except Exception as error:
        row["failure"] = f"{type(error).__name__}: {str(error)[:500]}"
        row["trace"] = traceback.format_exc()[-1500:]
    finally:
        torch.cuda.empty_cache()
    return row


def _times(case: Case, prepared: Prepared, flush: Flush) -> dict[str, Any]:
    if not case.cold:
        times: dict[str, Any] = {"us": median_us(prepared.run)}
        rival = prepared.rival and median_us(prepared.rival)
    else:
        times = {"us": cold_us(prepared.run, flush.write), "us_after_read_flush": cold_us(prepared.run, flush.read)}
        rival = prepared.rival and cold_us(prepared.rival, flush.write)
    if rival is not None:
        times["rival_us"] = rival
    return {key: round(value, 3) for key, value in times.items()}


def rates(
    case: Case, prepared: Prepared, us: float, ceilings: Ceilings, baselines: Baselines, rival_us: float | None = None
) -> dict[str, Any]:
    """TFLOP/s, GB/s, share of the ceiling, ratio to the baseline, what was asked, for a time in microseconds."""
    tflops, gb_per_s = prepared.flops / us / 1e6, prepared.bytes / us / 1e3
    limit = getattr(ceilings, case.ceiling)
    reached = gb_per_s / 1e3 if case.ceiling == "copy" else tflops
    baseline_us = baselines.find(*case.baseline) if case.baseline else rival_us
    ratio = baseline_us / us if baseline_us else None
    value = {
        "ratio": ratio,
        "tb_per_s": gb_per_s / 1e3,
        "share_of_copy": gb_per_s / 1e3 / ceilings.copy,
        "tflops": tflops,
    }[case.metric]
    return {
        "tflops": round(tflops, 1),
        "gb_per_s": round(gb_per_s, 1),
        "ceiling": case.ceiling,
        "pct_of_ceiling": round(100 * reached / limit, 1),
        "baseline": case.baseline[0] if case.baseline else ("same run" if rival_us else None),
        "baseline_us": baseline_us,
        "ratio": None if ratio is None else round(ratio, 3),
        "metric": case.metric,
        "value": None if value is None else round(value, 3),
        "must": case.must,
        "aim": case.aim,
        "met": _met(value, case.must),
        "aim_met": _met(value, case.aim),
    }


def _met(value: float | None, asked: float | None) -> bool | None:
    return None if value is None or asked is None else value >= asked
