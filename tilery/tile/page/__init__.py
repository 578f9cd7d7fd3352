"""Pictures of a kernel or a graph: one HTML page that opens from disk, without a GPU. `docs/tile/pictures.md`.

`diff` aligns the stages, `memory` and `estimate` model what a program takes and how long, `trace` makes Chrome traces,
`svg` draws, `html` escapes and assembles, `kernel` and `graph` say what stands on a page.
"""

from tilery.tile.page.estimate import H100_DEVICE, Device, Estimate, estimate
from tilery.tile.page.graph import graph_page
from tilery.tile.page.html import Page
from tilery.tile.page.kernel import arguments_for, kernel_page, subject
from tilery.tile.page.trace import Trace, trace_of

__all__ = [
    "H100_DEVICE", "Device", "Estimate", "Page", "Trace", "arguments_for", "estimate", "graph_page", "kernel_page",
    "subject", "trace_of",
]  # fmt: skip
