"""The rivals' figures, measured on an H100 80GB HBM3 (700 W, 132 multiprocessors), and when a ratio to them counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilery.ops.bench.measure import Ceilings

FILE = Path(__file__).with_name("baselines_h100.json")
WITHIN = 0.03
"""How far the card's ceilings may lie from those of the file for ratios to count."""

KEYS = {
    "bf16": "bf16_matmul_8192_tflops",
    "fp8": "fp8_matmul_8192_tflops",
    "int8": "int8_matmul_8192_tops",
    "copy": "device_copy_tb_per_s",
}


@dataclass(frozen=True)
class Baselines:
    """The file's content: tables of rows, each row the sizes of a shape and a time `us`."""

    tables: Mapping[str, Any]

    @staticmethod
    def load(path: Path = FILE) -> Baselines:
        return Baselines(json.loads(path.read_text(encoding="utf-8")))

    def find(self, table: str, keys: Mapping[str, int]) -> float:
        """The rival's time in microseconds. Raises `KeyError` naming table and keys if no row or several have them."""
        rows = [row for row in self.tables[table] if all(row.get(key) == value for key, value in keys.items())]
        if len(rows) != 1:
            raise KeyError(f"baselines: {len(rows)} rows of {table} have {dict(keys)}; expected one")
        return float(rows[0]["us"])

    def comparable(self, found: Ceilings) -> dict[str, float]:
        """Measured over filed ceiling, by name; ratios count where all lie within `WITHIN` of 1."""
        filed = self.tables["ceilings"]
        return {name: round(getattr(found, name) / filed[key], 4) for name, key in KEYS.items()}
