"""The Ascend target: Triton source restricted to what triton-ascend documents that it lowers.

Derived from the Triton target: the same padded IR and emitter under a capability record (`capabilities`), which says
what to refuse (`check`) and what fits a core (`memory`, `fit`). `golden` keeps the text of every kernel; `linalg`
lowers it with triton-ascend, in an environment of its own. Nothing here runs on or measures an NPU.
"""

from tilery.tile.targets.ascend.capabilities import A2, Capabilities
from tilery.tile.targets.ascend.emit import emit, emit_lowered, run_interpreted

__all__ = ["A2", "Capabilities", "emit", "emit_lowered", "run_interpreted"]
