"""A kernel compiled for the CPU, and how it is called.

`launch(arguments, env)` is the quick way: a function written for this kernel, without loops or look-ups. It trusts its
caller (the launch layer checks shapes and dtypes): `arguments` in the order of the kernel's parameters, tensors on the
CPU with the dtypes, contiguity and tile-shaping sizes that were compiled for. Measured cost: docs/notes/cpu_target.md.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tilery.tile.errors import LaunchError
from tilery.tile.ir import Kernel, Output, TensorType
from tilery.tile.lowering import lower
from tilery.tile.schedule import Schedule
from tilery.tile.size import Size
from tilery.tile.targets.cpu import build
from tilery.tile.targets.cpu.fallback import fallback_launch
from tilery.tile.targets.cpu.source import HEADER, Source, emit

Launch = Callable[[Sequence[Any], Mapping[str, int]], tuple[Tensor, ...]]
_threads = 0


def set_threads(count: int) -> None:
    """How many threads share the programs of a grid; torch's number unless set."""
    global _threads
    _threads = max(1, count)
    if build.compiler() is not None:
        build.resize_pool(_threads)


def _pool() -> int:
    if not _threads:
        set_threads(torch.get_num_threads())
    return build.pool()


class CpuExecutable:
    """One specialisation of a kernel. `kernel`: the bound IR; `source`: its C++ (empty without a compiler);
    `launch(arguments, env) -> outputs`; `native`: whether it is compiled C++."""

    def __init__(self, kernel: Kernel, source: Source | None, launch: Launch, strided: frozenset[str]) -> None:
        self.kernel, self.launch, self.strided = kernel, launch, strided
        self.native = source is not None
        self.source = HEADER + "\n" + source.text if source is not None else ""
        self._variants: dict[frozenset[str], CpuExecutable] = {strided: self}

    def __call__(self, arguments: Mapping[str, Any], env: Mapping[str, int]) -> tuple[Tensor, ...]:
        """Runs with arguments by name, as `interpret.run` does, tensors of any strides. Raises `LaunchError`."""
        values, strided = [], set()
        for param in self.kernel.params:
            name = param.value.name
            if name not in arguments:
                raise LaunchError(f"{self.kernel.name}: argument {name!r} is missing; expected {self._names()}")
            value = arguments[name]
            if isinstance(param.value.type, TensorType):
                self._check(name, value, param.value.tensor)
                if not value.is_contiguous():
                    strided.add(name)
            values.append(value)
        key = frozenset(strided)
        if key not in self._variants:
            self._variants[key] = compile_cpu(self.kernel, env, strided=key)
        return self._variants[key].launch(values, env)

    def _names(self) -> str:
        return ", ".join(p.value.name for p in self.kernel.params)

    def _check(self, name: str, value: Any, kind: TensorType) -> None:
        if not isinstance(value, Tensor) or value.device.type != "cpu" or value.dtype != kind.dtype.torch:
            got = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            raise LaunchError(f"{self.kernel.name}: {name} must be a CPU tensor of {kind.dtype}, got {got}")
        if value.dim() and value.shape[-1] > 1 and value.stride(-1) != 1 and value.numel():
            raise LaunchError(
                f"{self.kernel.name}: the last dimension of {name} must be contiguous; pass {name}.contiguous()"
            )


def compile_cpu(
    kernel: Kernel, env: Mapping[str, int], schedule: Schedule | None = None,
    strided: frozenset[str] = frozenset(), optimise: str = build.OPTIMISE,
) -> CpuExecutable:  # fmt: skip
    """Compiles a kernel at stage "trace" (it is lowered with `env` and `schedule`) or "bound".

    `env`: at least `kernel.tile_dims`. `strided`: names of tensor parameters whose strides are passed at launch;
    the others must be contiguous. Without a compiler the result runs torch operators. Raises `LoweringError`.
    """
    return compile_many([(kernel, env, schedule)], strided, optimise)[0]


def compile_many(
    items: Sequence[tuple[Kernel, Mapping[str, int], Schedule | None]],
    strided: frozenset[str] = frozenset(), optimise: str = build.OPTIMISE,
) -> list[CpuExecutable]:  # fmt: skip
    """Several kernels in one run of the compiler."""
    bound = [k if k.stage == "bound" else lower(k, env, "cpu", schedule).kernel for k, env, schedule in items]
    if build.compiler() is None:
        return [CpuExecutable(k, None, fallback_launch(k, env), strided) for k, (_, env, _) in zip(bound, items)]
    symbols = [re.sub(r"\W", "_", k.name) + (f"_{n}" if len(items) > 1 else "") for n, k in enumerate(bound)]
    sources = [emit(k, f"k_{symbol}", strided) for k, symbol in zip(bound, symbols)]
    library = build.build(HEADER + "\n" + "\n".join(s.text for s in sources), symbols[0], optimise)
    return [CpuExecutable(k, s, _native_launch(k, s, library), strided) for k, s in zip(bound, sources)]


def _native_launch(kernel: Kernel, source: Source, library: ctypes.CDLL) -> Launch:
    """Writes the launch function: allocate, call, return."""
    function = getattr(library, f"{source.name}_launch")
    tensors = [f"a{n}.data_ptr()" for n, p in enumerate(kernel.params) if isinstance(p.value.type, TensorType)]
    place = {p.value.name: n for n, p in enumerate(kernel.params)}
    scope: dict[str, Any] = {"call": function, "pool": _pool(), "empty": torch.empty, "full": _full}
    lines = [f"{''.join(f'a{n}, ' for n in range(len(kernel.params)))} = arguments"] if kernel.params else []
    lines += [f"d_{name} = env[{name!r}]" for name in source.dims]
    for number, out in enumerate(kernel.outputs):
        lines.append(f"o{number} = {_allocation(out, number, scope)}")
        tensors.append(f"o{number}.data_ptr()")
    integers = [f"d_{name}" for name in source.dims]
    integers += [f"a{place[name]}.stride({axis})" for name, axis in source.strided]
    integers += [f"a{place[name]}" for name in source.ints]
    floats = [f"a{place[name]}" for name in source.floats]
    function.restype = None
    function.argtypes = [
        ctypes.c_void_p, *[ctypes.c_void_p] * len(tensors), *[ctypes.c_int64] * len(integers),
        *[ctypes.c_double] * len(floats),
    ]  # fmt: skip
    lines.append(f"call({', '.join(['pool', *tensors, *integers, *floats])})")
    by_id = {out.value.id: number for number, out in enumerate(kernel.outputs)}
    lines.append(f"return ({''.join(f'o{by_id[v.id]}, ' for v in kernel.returns)})")
    text = "def launch(arguments, env):\n" + "".join(f"    {line}\n" for line in lines)
    exec(compile(text, f"<launch {kernel.name}>", "exec"), scope)
    launch: Launch = scope["launch"]
    return launch


def _allocation(out: Output, number: int, scope: dict[str, Any]) -> str:
    kind = out.value.tensor
    scope[f"t{number}"] = kind.dtype.torch
    shape = "".join(f"{_python(d)}, " for d in kind.dims)
    if out.init is None:
        return f"empty(({shape}), dtype=t{number})"
    return f"full(({shape}), {out.init!r}, t{number})"


def _full(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
    if value == 0:
        return torch.zeros(shape, dtype=dtype)
    return torch.full(shape, value).to(dtype) if dtype.itemsize == 1 else torch.full(shape, value, dtype=dtype)


def _python(size: Size) -> str:
    """A size as Python over the variables `d_NAME`."""
    return re.sub(r"[A-Za-z_]\w*", lambda m: f"d_{m.group()}", str(size))
