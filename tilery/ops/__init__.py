"""Operators: for each a contract, a float reference, one implementation per target, and a registry that chooses.

The contract is the docstring of the reference function (shapes, dtypes, layouts, tie rules, errors, source). Models
call operators through the record that `registry.select(platform)` returns, never an implementation directly.
May be imported from here: `registry`, and the reference functions for tests. Imports nothing of the package but `tile`.
"""
