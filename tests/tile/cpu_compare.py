"""Runs kernels on the CPU target and in the reference interpreter, and compares."""

import torch

from tilery.tile import interpret
from tilery.tile.targets.cpu.executable import compile_many


def specialised(kernel, *args, **kwargs):
    """(traced IR, arguments by name, dimensions) of a call."""
    bound = kernel.signature.bind(args, kwargs)
    return kernel.trace(kernel.signature.specialise(bound)), bound, kernel.signature.bind_dims(bound)


def copied(arguments):
    return {n: (v.clone() if isinstance(v, torch.Tensor) and v.is_contiguous() else v) for n, v in arguments.items()}


def close(got, expected, rtol=1e-5, atol=1e-5):
    """Equal to rounding: a step of the format for 16- and 8-bit floats."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    step = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float8_e4m3fn: 0.13, torch.float8_e5m2: 0.26}
    if got.dtype in step:
        got, expected, rtol = got.float(), expected.float(), step[got.dtype]
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, equal_nan=True)


def run_both(ir, arguments, env, executable):
    """(outputs and InOut tensors from C++, the same from the interpreter)."""
    results = []
    for run in (executable, lambda a, e: interpret.run(ir, a, e)):
        own = copied(arguments)
        out = run(own, env)
        results.append((*out, *(own[p.value.name] for p in ir.params if p.inout)))
    return results


def compare(calls, rtol=1e-5, atol=1e-5, optimise="-O1"):
    """`calls`: (kernel, args, kwargs); compiled in one file, each compared with the interpreter."""
    items = [specialised(kernel, *args, **kwargs) for kernel, args, kwargs in calls]
    executables = compile_many([(ir, env, None) for ir, _, env in items], optimise=optimise)
    for (ir, arguments, env), executable in zip(items, executables):
        for got, expected in zip(*run_both(ir, arguments, env, executable)):
            close(got, expected, rtol, atol)
