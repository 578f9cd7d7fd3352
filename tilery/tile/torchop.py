"""Kernels as torch operators: what `torch.compile`, fake tensors and functionalisation see.

One operator per specialisation (dtypes, present tensors, static values), named `tilery::<kernel>_<hash>`, defined the
first time it is needed. Its schema says what the kernel changes; its fake implementation gives the outputs' shapes
from the dimensions, symbolic ones included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tilery.tile import cache
from tilery.tile.dtypes import BY_NAME, BY_TORCH
from tilery.tile.launch import refuse_gradients
from tilery.tile.plans import unpack
from tilery.tile.signature import Specialisation

if TYPE_CHECKING:
    from tilery.tile.kernel import Kernel

NAMESPACE = "tilery"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_OPERATORS: dict[tuple[str, Specialisation], Any] = {}


def runtime_names(kernel: Kernel, spec: Specialisation) -> list[str]:
    """The parameters that the operator takes: present tensors, and scalars."""
    absent = {n for n, d in spec.dtypes if d is None}
    return [p.name for p in kernel.signature.parameters if p.kind != "static" and p.name not in absent]


def schema(kernel: Kernel, spec: Specialisation) -> str:
    """`(Tensor x, Tensor(a0!) cache, float eps) -> (Tensor, Tensor)`."""
    parameters = {p.name: p for p in kernel.signature.parameters}
    parts: list[str] = []
    for name in runtime_names(kernel, spec):
        p = parameters[name]
        if p.spec is not None:
            parts.append(f"Tensor(a{len(parts)}!) {name}" if p.spec.inout else f"Tensor {name}")
        else:
            parts.append(f"{'SymInt' if p.kind == 'int' else 'float'} {name}")
    count = len(kernel.launcher.interface(spec).returned)
    returns = "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
    return f"({', '.join(parts)}) -> {returns}"


def operator(kernel: Kernel, spec: Specialisation) -> Any:
    """The operator of a specialisation, defined on first use."""
    known = _OPERATORS.get((kernel.full_name, spec))
    if known is not None and known[0] is kernel:
        return known[1]
    name = f"{kernel.name}_{cache.digest(kernel.full_name, spec)[:10]}"
    if known is not None:  # a kernel of the same name was defined before: a reloaded module
        name += f"_{id(kernel):x}"
    names = runtime_names(kernel, spec)
    statics = dict(spec.statics)
    absent = {n: None for n, d in spec.dtypes if d is None}

    def arguments(values: tuple[Any, ...]) -> dict[str, Any]:
        return {**statics, **absent, **dict(zip(names, values))}

    def run(*values: Any) -> Any:
        return kernel.launcher.dispatch(**arguments(values))

    def fake(*values: Any) -> Any:
        bound = arguments(values)
        env = kernel.signature.bind_dims(bound)
        device = next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))
        made = tuple(
            torch.empty([d.evaluate(env) for d in o.dims], dtype=o.dtype.torch, device=device)
            for o in kernel.launcher.interface(spec).returned
        )
        return unpack(made)

    def differentiate(*values: Any) -> Any:
        refuse_gradients(kernel.name, {n: v for n, v in zip(names, values) if isinstance(v, Tensor)})
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*values)

    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    _LIBRARY.define(name + schema(kernel, spec), tags=tags)
    _LIBRARY.impl(name, run, "CPU")
    _LIBRARY.impl(name, run, "CUDA")
    _LIBRARY.impl(name, differentiate, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    _OPERATORS[kernel.full_name, spec] = (kernel, overload)
    return overload


def call(kernel: Kernel, spec: Specialisation, bound: Mapping[str, Any]) -> Any:
    """Calls the operator with arguments by name."""
    return operator(kernel, spec)(*(bound[n] for n in runtime_names(kernel, spec)))


def find(kernel: Kernel, dtypes: tuple[torch.dtype | None, ...], statics: tuple[Any, ...]) -> str:
    """The name of the operator for torch dtypes and static values in the order of the signature; a static `DType`,
    which torch.compile cannot pass, comes as ("dtype", name)."""
    statics = tuple(BY_NAME[v[1]] if isinstance(v, tuple) and v[:1] == ("dtype",) else v for v in statics)
    parameters = kernel.signature.parameters
    tensors = [p.name for p in parameters if p.spec is not None]
    fixed = [p.name for p in parameters if p.kind == "static"]
    kinds = tuple((n, None if d is None else BY_TORCH[d]) for n, d in zip(tensors, dtypes))
    return str(operator(kernel, Specialisation(kinds, tuple(zip(fixed, statics)))).overloadpacket.__name__)
