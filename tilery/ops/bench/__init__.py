"""`tilery bench ops`: every hand-scheduled kernel checked against its reference, timed beside its rivals.

`case` says what a case is, `measure` times and finds the card's ceilings, `baselines` holds the rivals' figures, the
modules named in `FAMILIES` hold the cases, `run` puts them together, `worker` gives each family a process of its own,
`report` writes the tables.
Imports: the operators.
"""

FAMILIES = ("gemm", "mla", "indexer", "quantised")
"""The modules of this package with a function `cases() -> list[Case]`."""
