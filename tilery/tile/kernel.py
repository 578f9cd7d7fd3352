"""`@tile.kernel`: a Python function that becomes an operator for every target."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, overload

import torch

from tilery.tile import dispatch, interpret, registry
from tilery.tile.dtypes import DType
from tilery.tile.errors import LaunchError, TraceError, VerifyError
from tilery.tile.graph import RECORDER
from tilery.tile.ir import Kernel as KernelIR
from tilery.tile.launch import Launcher
from tilery.tile.lowering import Lowered, lower
from tilery.tile.plans import unpack
from tilery.tile.schedule import Schedule
from tilery.tile.signature import Signature, Specialisation
from tilery.tile.tolerance import Tolerance
from tilery.tile.trace import trace

if TYPE_CHECKING:
    from tilery.tile.explain import Explanation
    from tilery.tile.page import Page
    from tilery.tile.sanitize import SanitizeReport
    from tilery.tile.verify import Report

Case = Callable[[torch.Generator], dict[str, Any]]
Scheduling = Schedule | Callable[[Mapping[str, int], str], Schedule | None] | None
Bench = Callable[[torch.Generator, str], dict[str, Any]]


class Kernel:
    """A kernel: call it with tensors. `trace` gives its IR for a specialisation."""

    def __init__(
        self, function: Callable[..., Any], reference: Callable[..., Any] | None = None,
        tolerance: Tolerance | tuple[Tolerance, ...] | None = None, schedule: Scheduling = None,
    ) -> None:  # fmt: skip
        self.function = function
        self.signature = Signature(function)
        self.name = function.__name__
        self.full_name = f"{function.__module__}.{function.__qualname__}"
        self.reference = reference
        self.tolerance = tolerance
        self.schedule = schedule
        self.cases: dict[str, Case] = {}
        self.benches: dict[str, Bench] = {}
        self._traces: dict[Specialisation, KernelIR] = {}
        self.launcher = Launcher(self)
        self._dispatch = self.launcher.dispatch
        functools.update_wrapper(self, function)
        registry.add(self)

    def __repr__(self) -> str:
        return f"<tile kernel {self.full_name}>"

    def case(self, function: Case) -> Case:
        """Decorator: `function(rand)` gives arguments by name, on CPU and small; `verify` runs every case."""
        return _declare(self.cases, self.name, "case", function)

    def bench(self, function: Bench) -> Bench:
        """Decorator: `function(rand, device)` gives arguments by name at the sizes that matter; benchmarks run them."""
        return _declare(self.benches, self.name, "bench", function)

    def arguments(self, case: str, seed: int = 0) -> dict[str, Any]:
        """The arguments of a declared case. Raises `TraceError` for a name that is not declared."""
        if case not in self.cases:
            known = ", ".join(self.cases) or "none; declare one with @" + self.name + ".case"
            raise TraceError(f"kernel {self.name!r} has no case {case!r}; it has {known}")
        return self.cases[case](torch.Generator().manual_seed(seed))

    def trace(self, key: Specialisation) -> KernelIR:
        """The IR for dtypes and static values, traced once."""
        if key not in self._traces:
            self._traces[key] = trace(self.function, self.signature, key)
        return self._traces[key]

    def interpret(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the traced IR in the reference interpreter."""
        bound = self.signature.bind(args, kwargs)
        ir = self.trace(self.signature.specialise(bound))
        out = interpret.run(ir, bound, self.signature.bind_dims(bound))
        return unpack(out)

    # --- a call ---------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the kernel on the tensors' device. Returns its outputs: a tensor, a tuple, or None.

        `out=` (a tensor or a tuple) takes the outputs instead of new memory; `sanitize=True` runs under watch.
        Raises `LaunchError` for arguments that do not fit.
        """
        if torch.compiler.is_dynamo_compiling():
            return self._traced_call(args, kwargs)
        recorder = RECORDER.get()
        if recorder is not None:  # a graph is being traced, or C calls recorded
            return recorder.call(self, args, kwargs)
        try:
            return self._dispatch(*args, **kwargs)
        except TypeError:
            given = {n: v for n, v in kwargs.items() if n not in dispatch.options(self.signature)}
            self.signature.bind(args, given)  # says which argument is wrong, if that is what is wrong
            raise

    def _traced_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that torch.compile traces: becomes one operator of the graph."""
        bound = self.signature.bind(args, kwargs)
        dtypes = []
        statics = []
        values = []
        for p in self.signature.parameters:
            value = bound[p.name]
            if p.kind == "static":
                statics.append(("dtype", value.name) if isinstance(value, DType) else value)
                continue
            if p.spec is not None:
                dtypes.append(None if value is None else value.dtype)
            if value is not None:
                values.append(value)
        return getattr(torch.ops.tilery, self._operator(tuple(dtypes), tuple(statics)))(*values)

    def _operator(self, dtypes: tuple[torch.dtype | None, ...], statics: tuple[Any, ...]) -> str:
        from tilery.tile import torchop

        return torchop.find(self, dtypes, statics)

    # What torch.compiler.assume_constant_result sets; calling it would import torch._dynamo, which takes seconds.
    _operator._dynamo_marked_constant = True  # type: ignore[attr-defined]

    # --- tools ----------------------------------------------------------------------------------------------------

    def specialise(self, arguments: Mapping[str, Any]) -> tuple[Specialisation, dict[str, int]]:
        """(key of the trace, dimensions) of arguments by name. Raises `LaunchError`."""
        return self.signature.specialise(arguments), self.signature.bind_dims(arguments)

    def schedule_for(self, env: Mapping[str, int], target: str) -> Schedule | None:
        """What the author declared for these dimensions; what it leaves open, or None, is the default's."""
        return self.schedule(env, target) if callable(self.schedule) else self.schedule

    def lower(self, target: str = "triton", *args: Any, schedule: Schedule | None = None, **kwargs: Any) -> Lowered:
        """Every stage of the lowering for "cpu", "triton" or "ascend", for the arguments of a call or for sizes alone.

        `rms_norm.lower("triton", T=64, H=7168)`: dimensions by name, dtypes the first that each parameter allows,
        static values and optional tensors (by default absent) by name.
        """
        dims = {d.name for d in self.signature.dims}
        if args or not (set(kwargs) & dims or set(kwargs) <= {p.name for p in self.signature.parameters if not p.spec}):
            key, env = self.specialise(self.signature.bind(args, kwargs))
        else:
            key, env = self.assume(**kwargs)
        wanted = schedule if schedule is not None else self.schedule_for(env, target)
        return lower(self.trace(key), env, target, wanted)

    def assume(self, **known: Any) -> tuple[Specialisation, dict[str, int]]:
        """The specialisation of a call that is only described: dimensions, static values, and dtypes by name of tensor.

        Raises `LaunchError` for a name that the kernel does not have or a missing static value.
        """
        dims = {d.name: d for d in self.signature.dims}
        parameters = {p.name: p for p in self.signature.parameters}
        unknown = [n for n in known if n not in dims and n not in parameters]
        if unknown:
            raise LaunchError(
                f"{self.name}: no dimension or parameter {unknown[0]!r}; it has {', '.join([*dims, *parameters])}"
            )
        dtypes: list[tuple[str, DType | None]] = []
        statics: list[tuple[str, Any]] = []
        for p in self.signature.parameters:
            if p.spec is not None:
                default = None if p.spec.optional else p.spec.dtypes[0]
                dtype = known.get(p.name, default)
                dtypes.append((p.name, p.spec.dtypes[0] if dtype is True else dtype or None))
            elif p.kind == "static":
                value = known.get(p.name, p.default)
                if value is inspect.Parameter.empty:
                    raise LaunchError(f"{self.name}: the static parameter {p.name!r} needs a value: {p.name}=...")
                statics.append((p.name, value))
        env = {n: known[n] for n in dims if n in known}
        for name, value in env.items():
            dims[name].check(value, self.name)
        return Specialisation(tuple(dtypes), tuple(statics)), env

    def verify(self, *args: Any, case: str | None = None, raises: bool = True, **kwargs: Any) -> Report:
        """Compares every stage of the lowering with the reference, on these arguments or on all declared cases.

        Returns the table. Raises `VerifyError` naming the first bad stage unless `raises` is False.
        """
        from tilery.tile.verify import verify

        if args or kwargs:
            cases = {"arguments": self.signature.bind(args, kwargs)}
        elif case is None and not self.cases:
            raise VerifyError(
                f"kernel {self.name!r} has no cases: declare one with @{self.name}.case, or give arguments"
            )
        else:
            cases = {name: self.arguments(name) for name in ([case] if case else self.cases)}
        return verify(self, cases, raises)

    def sanitize(self, *args: Any, nonfinite: bool = True, **kwargs: Any) -> SanitizeReport:
        """Runs copies of the arguments under watch. Raises `SanitizeError` at the first fault: an access outside a
        tensor, a race between programs, an element not written, and (`nonfinite`) a NaN or inf the kernel makes."""
        from tilery.tile import sanitize
        from tilery.tile.verify import clone

        bound = clone(self.signature.bind(args, kwargs))
        key, env = self.specialise(bound)
        return sanitize.run(self.trace(key), bound, env, nonfinite)

    def explain(self, *args: Any, copy_rate: bool = False, **kwargs: Any) -> Explanation:
        """Bytes, operations, roofline position, schedule and why, registers, and time of each pass of a call.

        `copy_rate` measures this CPU's copy rate too. The arguments are not changed.
        """
        from tilery.tile.explain import explain

        return explain(self, self.signature.bind(args, kwargs), copy_rate)

    def page(self, *args: Any, case: str = "", binary: bool = True, **kwargs: Any) -> Page:
        """Pictures of a call as one HTML page, for its arguments or for a declared case or benchmark: `.save(path)`.

        `binary`: compile for Hopper too, where Triton is installed, for registers and shared memory.
        """
        from tilery.tile.page import arguments_for, kernel_page

        bound = self.signature.bind(args, kwargs) if args or kwargs else arguments_for(self, case)
        return kernel_page(self, bound, binary)


def _declare(where: dict[str, Any], kernel: str, kind: str, function: Any) -> Any:
    name = function.__name__
    if name in where:
        raise TraceError(f"kernel {kernel!r} has two {kind}s named {name!r}; rename one")
    where[name] = function
    return function


@overload
def kernel(function: Callable[..., Any], /) -> Kernel: ...


@overload
def kernel(
    *, reference: Callable[..., Any] | None = None, tolerance: Tolerance | tuple[Tolerance, ...] | None = None,
    schedule: Scheduling = None,
) -> Callable[[Callable[..., Any]], Kernel]: ...  # fmt: skip


def kernel(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Makes a function a kernel: `@tile.kernel`, or `@tile.kernel(reference=..., tolerance=..., schedule=...)`.

    `reference`: a torch function of the same parameters that returns what the kernel returns and changes its InOut
    tensors in place. `tolerance`: one for all compared tensors, or one each (returned outputs, then InOut parameters).
    `schedule`: a `Schedule`, or a function `(env, target) -> Schedule | None`; None leaves the choice to the default.
    """
    if function is not None:
        return Kernel(function)
    return lambda f: Kernel(f, **options)
