"""The warm path of a call, written per kernel as straight Python: collect a cheap key, look it up, launch.

The key holds what a launch plan depends on: per tensor its dtype, shape, strides unless contiguous, device and whether
its address is a multiple of 16; static values; the types of scalars. Everything else (names, dims, checks with
readable messages) happens in `missed`, on the first call of each key. A call goes there always when it must not touch
memory: tensor subclasses (FakeTensor, functional tensors), active dispatch modes, gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from tilery.tile.signature import Parameter, Signature


class Missing:
    """Stands for an argument that was not given."""

    def __repr__(self) -> str:
        return "<missing>"


MISSING = Missing()
PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
"""Tensor classes whose memory is what it seems."""

LIMIT = 4096
"""Plans kept per kernel: shapes may vary without end."""

Missed = Callable[[tuple[Any, ...], Any, bool, Any], Any]


def options(signature: Signature) -> tuple[str, ...]:
    """The keyword options of a call; a kernel's own parameter of the name takes its place."""
    taken = {p.name for p in signature.parameters}
    return tuple(name for name in ("out", "sanitize") if name not in taken)


def _tensor_key(p: Parameter) -> list[str]:
    n = p.name
    parts = [f"{n}.dtype", f"{n}.shape", f"{n}.is_contiguous() or {n}.stride()", f"{n}.device", f"not _p_{n} & 15"]
    assert p.spec is not None
    return [f"None if {n} is None else ({', '.join(parts)})"] if p.spec.optional else parts


def source(signature: Signature) -> str:
    """The dispatcher's source. A plan takes the runtime arguments, the addresses of the tensors, then `out`."""
    parameters = signature.parameters
    named = options(signature)
    tensors = [p for p in parameters if p.spec is not None]
    scalars = [p for p in parameters if p.spec is None and p.kind != "static"]
    statics = [p for p in parameters if p.kind == "static"]
    heads = [f"{p.name}=_d_{p.name}" for p in parameters]
    head = ", ".join([*heads, *(["*"] if named else []), *(f"{n}={'None' if n == 'out' else 'False'}" for n in named)])
    everything = "".join(f"{p.name}, " for p in parameters)
    out, sanitize = ("out" if "out" in named else "None"), ("sanitize" if "sanitize" in named else "False")
    plain, grads = [], []
    for p in tensors:
        assert p.spec is not None
        absent = f"{p.name} is None or " if p.spec.optional else ""
        present = f"{p.name} is not None and " if p.spec.optional else ""
        plain.append(f"({absent}type({p.name}) in _plain)")
        if any(d.is_float for d in p.spec.dtypes):
            grads.append(f"({present}{p.name}.requires_grad)")
    key = [part for p in tensors for part in _tensor_key(p)]
    key += [f"type({p.name})" for p in scalars] + [p.name for p in statics]
    key += [f"type({p.name})" for p in statics]  # 1, 1.0 and True are equal keys
    runtime = "".join(f"{p.name}, " for p in parameters if p.kind != "static")
    addresses = "".join(f"_p_{p.name}, " for p in tensors)
    lines = [f"def dispatch({head}):"]
    guard = " and ".join(["not _modes()", *(["not sanitize"] if "sanitize" in named else []), *plain])
    lines.append(f"    if not ({guard}):")
    lines.append(f"        return _missed(({everything}), {out}, {sanitize}, None)")
    if grads:
        lines.append(f"    if ({' or '.join(grads)}) and _grad():")
        lines.append(f"        return _missed(({everything}), {out}, {sanitize}, None)")
    for p in tensors:
        assert p.spec is not None
        absent = f"0 if {p.name} is None else " if p.spec.optional else ""
        lines.append(f"    _p_{p.name} = {absent}{p.name}.data_ptr()")
    lines.append(f"    _key = ({''.join(f'{part}, ' for part in key)})")
    lines.append("    try:")
    lines.append("        _plan = _plans[_key]")
    lines.append("    except (KeyError, TypeError):")
    lines.append(f"        return _missed(({everything}), {out}, {sanitize}, _key)")
    lines.append(f"    return _plan({runtime}{addresses}{out})")
    return "\n".join(lines) + "\n"


def build(signature: Signature, plans: dict[Any, Any], missed: Missed) -> Callable[..., Any]:
    """The dispatcher of a kernel. `missed(arguments in order, out, sanitize, key or None)` handles the rest."""
    scope: dict[str, Any] = {
        "_plain": PLAIN, "_modes": torch._C._len_torch_dispatch_stack, "_grad": torch.is_grad_enabled,
        "_plans": plans, "_missed": missed,
    }  # fmt: skip
    for p in signature.parameters:
        scope[f"_d_{p.name}"] = MISSING if p.default is inspect.Parameter.empty else p.default
    exec(compile(source(signature), f"<dispatch of {signature.name}>", "exec"), scope)
    function: Callable[..., Any] = scope["dispatch"]
    return function
