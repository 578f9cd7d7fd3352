"""The Triton target: padded Tile IR -> readable Triton source -> a binary for Hopper -> a launch.

`emit` writes the source and the `Plan` of its launch; `build` compiles it, with or without a GPU; `launch` runs it;
`interp` runs the same source on CPU in Triton's interpreter. Importing this imports neither triton nor a compiler:
that happens at the first build. May be imported from here: `emit`, `Spec`, `compile_kernel`, `TritonExecutable`,
`BinaryReport`, `report`, `run_interpreted`.
"""

from tilery.tile.targets.triton.build import BinaryReport, report
from tilery.tile.targets.triton.emit import Emitted, emit
from tilery.tile.targets.triton.interp import run_interpreted
from tilery.tile.targets.triton.launch import TritonExecutable, compile_kernel, find_cached
from tilery.tile.targets.triton.plan import Plan, Spec, spec_of

__all__ = [
    "BinaryReport", "Emitted", "Plan", "Spec", "TritonExecutable", "compile_kernel", "emit", "find_cached", "report",
    "run_interpreted", "spec_of",
]  # fmt: skip
