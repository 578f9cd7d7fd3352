"""The table of `tilery bench ops`: as text while it runs, as Markdown in the docs, from the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = (
    "kernel",
    "shape",
    "us",
    "TFLOP/s",
    "GB/s",
    "% of ceiling",
    "error",
    "baseline us",
    "ratio",
    "asked",
    "reached",
)
UNITS = {"ratio": "x", "tb_per_s": " TB/s", "share_of_copy": " of copy", "tflops": " TFLOP/s"}


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row as text, a cell for each of `COLUMNS`."""
    shape = " ".join(f"{key} {value}" for key, value in row["shape"].items())
    if "failure" in row:
        return [row["kernel"], shape, "failed: " + row["failure"].splitlines()[0][:80], *[""] * (len(COLUMNS) - 3)]
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    return [
        row["kernel"],
        shape,
        f"{row['us']:.1f}",
        f"{row['tflops']:.0f}",
        f"{row['gb_per_s']:.0f}",
        f"{row['pct_of_ceiling']:.0f} {row['ceiling']}",
        f"{row['error']:.1e}" + ("" if row["error"] <= row["error_bound"] else " WRONG"),
        "" if row["baseline_us"] is None else f"{row['baseline_us']:.1f}",
        ratio,
        asked(row),
        verdict(row),
    ]


def line(row: Mapping[str, Any]) -> str:
    """A row as one line, while others are still being measured."""
    return "  ".join(cell for cell in cells(row) if cell) if "us" in row else checked(row)


def checked(row: Mapping[str, Any]) -> str:
    """A row without times."""
    shape = " ".join(f"{key} {value}" for key, value in row["shape"].items())
    if "failure" in row:
        return f"{row['kernel']}  {shape}  failed: {row['failure'].splitlines()[0][:200]}"
    verdict = "right" if row["error"] <= row["error_bound"] else "WRONG"
    return f"{row['kernel']}  {shape}  error {row['error']:.1e} of {row['error_bound']:g}  {verdict}"


def asked(row: Mapping[str, Any]) -> str:
    if row["must"] is None:
        return ""
    aim = "" if row["aim"] is None else f" (aim {row['aim']:g})"
    return f"{row['must']:g}{aim}{UNITS[row['metric']]}"


def verdict(row: Mapping[str, Any]) -> str:
    if row["must"] is None or row["value"] is None:
        return ""
    word = "aim" if row["aim_met"] else "yes" if row["met"] else "missed"
    return f"{row['value']:.2f} {word}"


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Columns padded with spaces."""
    table = [list(COLUMNS), *map(cells, rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
    )


def markdown(result: Mapping[str, Any]) -> str:
    """The table of the docs, generated: kernel by kernel, with the ceilings it was measured against."""
    ceilings = result["ceilings"]
    lines = [
        f"{result['device']}, {result['date'][:10]}, commit {str(result['commit'])[:7]}. Ceilings in the same run: "
        f"{ceilings['bf16']:g} bf16 and {ceilings['fp8']:g} FP8 TFLOP/s, {ceilings['int8']:g} int8 TOP/s, "
        f"{ceilings['copy']:g} TB/s copied.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    return "\n".join(lines + ["| " + " | ".join(cells(row)) + " |" for row in result["rows"]]) + "\n"
