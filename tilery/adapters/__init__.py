"""Tilery's Hopper kernels under the names that other engines call, so that a fleet can take the kernels alone.

`flash_mla` and `deep_gemm` have the entry points of the libraries of these names: same arguments, layouts and results.
`install` puts them in the place of the originals inside vLLM and SGLang, which need no change; see docs/adapters.md.
Imports: the operators' Hopper kernels, when a function is called.
"""
