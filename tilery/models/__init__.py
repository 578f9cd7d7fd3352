"""Model families: one readable page each, plain tensors over `ops`, no parallelism inside.

`loader.load_model` opens a Hugging Face checkpoint and builds the family its config.json names; `step.StepInput` is
what a model computes on, `cache.allocate` makes the tensors it reads and writes. Imports downwards only: ops, observe.
"""
