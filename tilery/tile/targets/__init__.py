"""Targets: from bound or padded Tile IR to something that runs.

One folder per target (`cpu`: generated C++; `triton`: Triton source; `ascend`: Triton source for triton-ascend). A
target takes what `tilery.tile.lowering` gives and may import the tile package and the standard library; a target
imports no other target, but for `ascend`, which restricts `triton`.
"""
