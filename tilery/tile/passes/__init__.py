"""The passes: each one a pure function from a kernel to a kernel that means the same.

`lowering.py` puts them in order; the interpreter runs what any of them leaves, which is how they are verified.
"""

from tilery.tile.passes.bind import bind
from tilery.tile.passes.cleanup import cse, dce, hoist, simplify
from tilery.tile.passes.pad import pad
from tilery.tile.passes.widen import widen

__all__ = ["bind", "cse", "dce", "hoist", "pad", "simplify", "widen"]
