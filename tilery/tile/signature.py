"""What a kernel takes: annotations, the binding of dimensions at launch, and the key of a specialisation.

x: Tensor[T, H, bf16]            read-only tensor; the last annotation item is the dtype, or a tuple of allowed ones
cache: InOut[P, 64, 656, u8]     the kernel writes it
residual: Tensor[T, H, bf16] | None = None     optional; absent, it is None while tracing
eps: float, n: int               runtime scalars (f32, i32)
k: Static[int], fast: bool       known while tracing; part of the key
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from tilery.tile.builder import fail, tracing
from tilery.tile.dtypes import BY_TORCH, DType, i32
from tilery.tile.errors import LaunchError, TraceError
from tilery.tile.size import Dim, Size, as_size

T = TypeVar("T")


class Static(Generic[T]):
    """Annotation of a parameter whose value is known while tracing: `k: Static[int]`."""


@dataclass(frozen=True)
class TensorSpec:
    dims: tuple[Size, ...]
    dtypes: tuple[DType, ...]
    inout: bool = False
    optional: bool = False

    def __or__(self, other: Any) -> TensorSpec:
        if other is not None:
            raise TypeError("a tensor annotation can only be combined with None")
        return TensorSpec(self.dims, self.dtypes, self.inout, True)

    def __str__(self) -> str:
        kinds = "/".join(d.name for d in self.dtypes)
        return f"{'InOut' if self.inout else 'Tensor'}[{', '.join([*map(str, self.dims), kinds])}]"


def _spec(items: Any, inout: bool) -> TensorSpec:
    items = items if isinstance(items, tuple) and not (items and all(isinstance(i, DType) for i in items)) else (items,)
    *dims, dtype = items
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if not dtypes or not all(isinstance(d, DType) for d in dtypes):
        raise TraceError(f"Tensor[...] ends with a dtype (or a tuple of them), got {dtype!r}: Tensor[T, H, bf16]")
    return TensorSpec(tuple(as_size(d) for d in dims), tuple(dtypes), inout)


class Tensor:
    """Annotation of a tensor the kernel reads: `Tensor[T, H, bf16]`."""

    def __class_getitem__(cls, items: Any) -> TensorSpec:
        return _spec(items, False)


class InOut:
    """Annotation of a tensor the kernel reads and writes: `InOut[P, 64, 656, u8]`."""

    def __class_getitem__(cls, items: Any) -> TensorSpec:
        return _spec(items, True)


@dataclass(frozen=True)
class Parameter:
    """`kind`: "tensor", "int", "float" (runtime scalars) or "static"."""

    name: str
    kind: str
    spec: TensorSpec | None = None
    default: Any = inspect.Parameter.empty


@dataclass(frozen=True)
class Specialisation:
    """What a trace depends on: dtypes and presence of tensors, and static values; hashable."""

    dtypes: tuple[tuple[str, DType | None], ...]
    statics: tuple[tuple[str, Any], ...]
    kinds: tuple[type, ...] = field(init=False)  # 1, 1.0 and True are equal, but not the same value

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(type(v) for _, v in self.statics))

    def __str__(self) -> str:
        parts = [f"{n}={d.name if d else None}" for n, d in self.dtypes] + [f"{n}={v!r}" for n, v in self.statics]
        return ", ".join(parts)


class Signature:
    """The parameters of a kernel, and the checks of a call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = function.__name__
        scope = {**function.__globals__}
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            scope[name] = cell.cell_contents
        self.parameters: list[Parameter] = []
        for given in inspect.signature(function).parameters.values():
            kind = given.annotation
            if isinstance(kind, str):
                kind = eval(kind, scope)  # the module uses `from __future__ import annotations`
            if isinstance(kind, TensorSpec):
                self.parameters.append(Parameter(given.name, "tensor", kind, given.default))
            elif kind is int or kind is float:
                self.parameters.append(Parameter(given.name, kind.__name__, None, given.default))
            elif kind is inspect.Parameter.empty:
                raise TraceError(
                    f"parameter {given.name!r} of kernel {self.name!r} needs an annotation: Tensor[dims..., dtype], "
                    "int, float, or Static[...] for a value known while tracing"
                )
            else:
                self.parameters.append(Parameter(given.name, "static", None, given.default))
        self._names = [p.name for p in self.parameters]
        dims: dict[str, Dim] = {}
        for p in self.parameters:
            for size in p.spec.dims if p.spec else ():
                for dim in size.dims:
                    if dims.setdefault(dim.name, dim) != dim:
                        raise TraceError(f"kernel {self.name!r} has two different Dims named {dim.name!r}")
        self.dims = tuple(dims.values())

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by parameter name, defaults filled in. Raises `LaunchError`."""
        if len(args) > len(self._names):
            raise LaunchError(f"{self.name} takes {len(self._names)} arguments, got {len(args)}")
        bound = dict(zip(self._names, args))
        for name, value in kwargs.items():
            if name not in self._names:
                raise LaunchError(f"{self.name} has no parameter {name!r}; it has {', '.join(self._names)}")
            if name in bound:
                raise LaunchError(f"{self.name}: {name!r} is given twice")
            bound[name] = value
        for p in self.parameters:
            if p.name not in bound:
                if p.default is inspect.Parameter.empty:
                    raise LaunchError(f"{self.name}: argument {p.name!r} is missing")
                bound[p.name] = p.default
        return bound

    def specialise(self, bound: Mapping[str, Any]) -> Specialisation:
        """The key of a call. Raises `LaunchError` for a wrong dtype or kind of argument."""
        dtypes: list[tuple[str, DType | None]] = []
        statics: list[tuple[str, Any]] = []
        for p in self.parameters:
            value = bound[p.name]
            if p.spec is not None:
                if value is None:
                    if not p.spec.optional:
                        raise LaunchError(f"{self.name}: {p.name} must be a tensor {p.spec}, got None")
                    dtypes.append((p.name, None))
                    continue
                if not isinstance(value, torch.Tensor):
                    if tracing():
                        raise fail(
                            f"a kernel cannot call a kernel ({self.name}): share code as a plain function of tiles, or "
                            "call both kernels from a @tile.graph"
                        )
                    raise LaunchError(
                        f"{self.name}: {p.name} must be a tensor {p.spec}, got {type(value).__name__} {value!r}"
                    )
                dtype = BY_TORCH.get(value.dtype)
                if dtype not in p.spec.dtypes:
                    raise LaunchError(f"{self.name}: {p.name} must be {p.spec}, got dtype {value.dtype}")
                dtypes.append((p.name, dtype))
            elif p.kind == "static":
                if value.__hash__ is None:
                    raise LaunchError(
                        f"{self.name}: the static value {p.name}={value!r} must be hashable: a tuple, say"
                    )
                statics.append((p.name, value))
            elif not isinstance(value, (int, float)) or (p.kind == "int" and not isinstance(value, int)):
                raise LaunchError(f"{self.name}: {p.name} must be a Python {p.kind}, got {value!r}")
            elif p.kind == "int" and not i32.lowest <= value <= i32.highest:
                raise LaunchError(f"{self.name}: {p.name} must fit in 32 bits, got {value}")
        return Specialisation(tuple(dtypes), tuple(statics))

    def bind_dims(self, bound: Mapping[str, Any]) -> dict[str, int]:
        """Values of the dimensions from the tensors' shapes, all checked. Raises `LaunchError`."""
        env: dict[str, int] = {}
        seen: dict[str, str] = {}
        later: list[tuple[str, int, Size, int]] = []
        for p in self.parameters:
            tensor = bound[p.name]
            if p.spec is None or tensor is None:
                continue
            if tensor.dim() != len(p.spec.dims):
                raise LaunchError(
                    f"{self.name}: {p.name} must have {len(p.spec.dims)} dimensions {list(p.spec.dims)}, "
                    f"got shape {list(tensor.shape)}"
                )
            if tensor.dim() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1 and tensor.numel():
                raise LaunchError(
                    f"{self.name}: the last dimension of {p.name} must be contiguous (stride 1), got strides "
                    f"{list(tensor.stride())}; pass {p.name}.contiguous()"
                )
            for axis, size in enumerate(p.spec.dims):
                actual = tensor.shape[axis]
                dim = _bare(size)
                if dim is None:
                    later.append((p.name, axis, size, actual))
                elif dim.name in env:
                    if env[dim.name] != actual:
                        raise LaunchError(
                            f"{self.name}: {p.name}.shape[{axis}] is {dim.name} = {actual}, but {seen[dim.name]} says "
                            f"{dim.name} = {env[dim.name]}"
                        )
                else:
                    dim.check(actual, f"{self.name}: {p.name}.shape[{axis}]")
                    env[dim.name] = actual
                    seen[dim.name] = f"{p.name}.shape[{axis}]"
        while later:  # a size with one unknown dimension gives it, which may settle a size seen before
            waiting = []
            for name, axis, size, actual in later:
                unknown = [d.name for d in size.dims if d.name not in env]
                if unknown:
                    solved = _solve(size, actual, env)
                    if solved is None:
                        waiting.append((name, axis, size, actual))
                        continue
                    dim, value = solved
                    dim.check(value, f"{self.name}: {name}.shape[{axis}]")
                    env[dim.name] = value
                    continue
                wanted = size.evaluate(env)
                if wanted != actual:
                    raise LaunchError(f"{self.name}: {name}.shape[{axis}] must be {size} = {wanted}, got {actual}")
            if len(waiting) == len(later):
                name, axis, size, actual = waiting[0]
                missing, *others = (d for d in size.dims if d.name not in env)
                if not others:
                    factor = f" with {missing} a multiple of {missing.multiple_of}" if missing.multiple_of > 1 else ""
                    raise LaunchError(f"{self.name}: {name}.shape[{axis}] must be {size}{factor}, got {actual}")
                raise LaunchError(f"{self.name}: no tensor has the dimension {missing} by itself; add one")
            later = waiting
        return env


def _bare(size: Size) -> Dim | None:
    """The dimension that a size consists of, if it is one by itself."""
    if len(size.terms) == 1 and len(size.terms[0][0]) == 1 and len(size.dims) == 1:
        (dim,) = size.dims
        return dim if size == dim.size else None
    return None


def _solve(size: Size, actual: int, env: Mapping[str, int]) -> tuple[Dim, int] | None:
    """The one unknown dimension of a size such as `2 * I`, from its value."""
    unknown = [d for d in size.dims if d.name not in env]
    if len(unknown) != 1:
        return None
    (dim,) = unknown
    zero = size.evaluate({**env, dim.name: 0})
    step = size.evaluate({**env, dim.name: dim.multiple_of}) - zero
    if step <= 0 or (actual - zero) % step or (actual - zero) < 0:
        return None
    value = (actual - zero) // step * dim.multiple_of
    return (dim, value) if size.evaluate({**env, dim.name: value}) == actual else None
