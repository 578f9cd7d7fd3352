"""Hand-scheduled kernels for Hopper GPUs (sm_90a), written in Gluon; each behind an operator's contract.

One module per family; each has host functions that check their arguments and choose a configuration, and `variants()`,
what a machine without a GPU compiles to guard registers, spills and tensor-core instructions.
Imports: triton, when a module is imported; nothing imports these modules before a kernel is needed.
"""
