"""The CPU target: Tile IR becomes C++ for this machine's compiler, or runs as torch operators where there is none.

`compile_cpu(kernel, env, schedule)` gives a `CpuExecutable`; its `launch(arguments, env)` is the quick way in. Inside:
`plan` (what is kept, what is fused), `nest` (one loop nest), `element` (one element of a tile), `emit` (statements),
`source` (the whole file), `build` (compiler and cache), `fallback` (no compiler). Nothing above `tilery.tile` is used.
"""

from tilery.tile.targets.cpu.executable import CpuExecutable, compile_cpu, set_threads

__all__ = ["CpuExecutable", "compile_cpu", "set_threads"]
