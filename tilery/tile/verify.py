"""Runs every stage of a kernel's lowering and compares each with the reference: where does a result go wrong?

The rows of a report, in order: the traced IR; every pass for CPU and for Triton in the interpreter; the emitted Triton
source in Triton's interpreter; the last stages again with blocks of 1 and of a small size (results must not depend on
the schedule); the compiled code of the CPU and, with arguments there, of the GPU. A stage that equals an earlier one is
not run again. The C++ of all cases is compiled at once, quickly rather than well. `verify_all.py` does many kernels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tilery.tile import interpret
from tilery.tile.errors import LoweringError, VerifyError
from tilery.tile.ir import Kernel as KernelIR
from tilery.tile.ir import TensorType
from tilery.tile.launch import bucket
from tilery.tile.lowering import Lowered, lower
from tilery.tile.passes.bind import block_labels
from tilery.tile.schedule import Schedule
from tilery.tile.tolerance import Difference, Tolerance, default_tolerance

if TYPE_CHECKING:
    from tilery.tile.kernel import Kernel
    from tilery.tile.targets.cpu.executable import CpuExecutable

ON_GPU = "triton: on the GPU"
SMALL = (1, 4)
"""Block sizes that every kernel is run with besides its schedule's."""
OPTIMISE = "-O1"
"""For the C++ of small cases; loops are made vector code as ever."""


@dataclass(frozen=True)
class Row:
    """One stage of one case; `worst` is the compared tensor with the largest error. `error`: it did not run."""

    case: str
    stage: str
    worst: str
    difference: Difference | None
    error: str = ""
    note: str = ""

    @property
    def ok(self) -> bool:
        return not self.error and (self.difference is None or self.difference.ok)


@dataclass(frozen=True)
class Report:
    """What `verify` found. `str(report)` is the table."""

    kernel: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def first_bad(self) -> Row | None:
        """The earliest stage that is wrong."""
        return next((row for row in self.rows if not row.ok), None)

    def __str__(self) -> str:
        head = f"{'case':<12} {'stage':<28} {'worst':<10} {'max abs':>10} {'max rel':>10} {'outside':>9}  pass"
        lines = [self.kernel, head]
        for r in self.rows:
            start = f"{r.case:<12} {r.stage:<28} {r.worst:<10}"
            if r.difference is None:
                lines.append(f"{start} {'':>10} {'':>10} {'':>9}  {r.error or r.note}")
            else:
                d = r.difference
                verdict = "yes" if d.ok else "NO"
                lines.append(f"{start} {d.absolute:>10.3g} {d.relative:>10.3g} {d.outside:>9.2%}  {verdict}")
        return "\n".join(lines)


def verify(kernel: Kernel, cases: Mapping[str, Mapping[str, Any]], raises: bool = True) -> Report:
    """Compares every stage on every case (arguments by name; none are changed). Raises `VerifyError` naming the first
    bad stage unless `raises` is False."""
    native = _Native()
    runs = [_Case(kernel, name, arguments, native) for name, arguments in cases.items()]
    rows = [row for run in runs for row in run.rows()]
    report = Report(kernel.name, tuple(rows))
    bad = report.first_bad
    if raises and bad is not None:
        raise VerifyError(f"{_explain(kernel, bad)}\n\n{report}")
    return report


def _explain(kernel: Kernel, bad: Row) -> str:
    where = f"kernel {kernel.name!r}, case {bad.case!r}: stage {bad.stage!r}"
    if bad.error:
        return f"{where} does not run: {bad.error}"
    assert bad.difference is not None
    d = bad.difference
    return (
        f"{where} is the first that differs from the reference: {bad.worst} has {d.outside:.2%} of its elements "
        f"outside the tolerance, the largest error is {d.absolute:.3g} ({d.relative:.3g} relative). Print that stage "
        "and the one before it to see what changed, or correct reference or tolerance if the first stage differs"
    )


def clone(arguments: Mapping[str, Any], device: str | None = None) -> dict[str, Any]:
    """Arguments with tensors of their own, strides kept; `device`: where, if not where they are."""
    out = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device or value.device)
            value = copy.copy_(value)
        out[name] = value
    return out


def tolerances(kernel: Kernel, dtypes: list[torch.dtype]) -> tuple[Tolerance, ...]:
    """One per compared tensor. Raises `VerifyError` if the kernel declares another number."""
    declared, count = kernel.tolerance, len(dtypes)
    if declared is None:
        return tuple(map(default_tolerance, dtypes))
    if isinstance(declared, Tolerance):
        return (declared,) * count
    if len(declared) != count:
        raise VerifyError(
            f"kernel {kernel.name!r} declares {len(declared)} tolerances for {count} compared tensors (what it "
            "returns, then its InOut tensors); give one for all, or one each"
        )
    return tuple(declared)


Runner = Callable[[dict[str, Any]], tuple[Tensor, ...]]


class _Native:
    """The C++ of a report's cases: compiled together when the first is run, code that is the same once."""

    def __init__(self) -> None:
        self.items: list[tuple[KernelIR, frozenset[str]]] = []
        self.made: dict[int, CpuExecutable | LoweringError] = {}

    def add(self, bound: KernelIR, strided: frozenset[str]) -> int:
        """Asks for a kernel; the number is for `get`."""
        if (bound, strided) not in self.items:
            self.items.append((bound, strided))
        return self.items.index((bound, strided))

    def get(self, number: int) -> CpuExecutable:
        """Compiles all that are asked for. Raises `LoweringError` if this one does not compile."""
        if number not in self.made:
            for strided in {s for _, s in self.items}:
                self._compile([n for n, item in enumerate(self.items) if item[1] == strided], strided)
        found = self.made[number]
        if isinstance(found, LoweringError):
            raise found
        return found

    def _compile(self, numbers: list[int], strided: frozenset[str]) -> None:
        from tilery.tile.targets.cpu.executable import compile_many

        try:
            made = compile_many([(self.items[n][0], {}, None) for n in numbers], strided, OPTIMISE)
            self.made.update(zip(numbers, made))
        except LoweringError as error:
            if len(numbers) == 1:
                self.made[numbers[0]] = error
                return
            for n in numbers:  # one by one, so that the error is told of the case that has it
                self._compile([n], strided)


class _Case:
    """One case of a kernel. Sizes that no tile has are rounded for the schedules as a launch rounds them, so that what
    is verified is what runs."""

    def __init__(self, kernel: Kernel, name: str, arguments: Mapping[str, Any], native: _Native) -> None:
        self.kernel, self.name, self.native = kernel, name, native
        self.bound = kernel.signature.bind((), dict(arguments))
        self.env = kernel.signature.bind_dims(self.bound)
        self.ir = kernel.trace(kernel.signature.specialise(self.bound))
        self.rounded = bucket(self.env, tuple(d.name for d in self.ir.tile_dims))
        tensors = {n: v for n, v in self.bound.items() if isinstance(v, Tensor)}
        self.device = next((t.device.type for t in tensors.values()), "cpu")
        self.lowered = {target: self.lower(target) for target in ("cpu", "triton")}
        self.number = native.add(
            self.lowered["cpu"].kernel, frozenset(n for n, t in tensors.items() if not t.is_contiguous())
        )

    def lower(self, target: str, size: int | None = None) -> Lowered:
        """With the kernel's own schedule, or with blocks of one size."""
        schedule = self.kernel.schedule_for(self.rounded, target)
        if size is not None:
            schedule = replace(schedule or Schedule(), blocks=dict.fromkeys(block_labels(self.ir), size))
        return lower(self.ir, self.rounded, target, schedule)

    def rows(self) -> Iterator[Row]:
        """Compares one stage after the other."""
        kernel, ir = self.kernel, self.ir
        inout = [p.value.name for p in ir.params if isinstance(p.value.type, TensorType) and p.inout]
        names = [v.name for v in ir.returns] + inout

        def execute(run: Runner, where: str | None = "cpu") -> list[Tensor]:
            own = clone(self.bound, where)
            out = run(own)
            return [*out, *(own[n] for n in inout)]

        if kernel.reference is not None:
            wanted = execute(lambda own: _tuple(kernel.reference(**own)), None)  # type: ignore[misc]
            _check_reference(kernel, names, wanted, ir)
        else:  # the traced IR is the reference
            wanted = execute(lambda own: interpret.run(ir, own, self.env))
        limits = tolerances(kernel, [t.dtype for t in wanted])
        for stage, run in self.stages():
            if isinstance(run, str):
                yield Row(self.name, stage, "", None, note=run)
                continue
            try:
                got = execute(run, None if stage == ON_GPU else "cpu")
            except Exception as error:
                yield Row(self.name, stage, "", None, error=f"{type(error).__name__}: {error}")
                continue
            found = [(n, t.compare(a, b)) for n, t, a, b in zip(names, limits, got, wanted)]
            worst = max(found, key=lambda f: (not f[1].ok, f[1].outside, f[1].absolute))
            yield Row(self.name, stage, worst[0], worst[1])

    def stages(self) -> Iterator[tuple[str, Runner | str]]:
        """(name, how to run it, or why not) of every stage."""

        def interpreted(stage: KernelIR) -> Runner:
            return lambda own: interpret.run(stage, own, self.env)

        yield "trace", interpreted(self.ir)
        seen = [replace(self.ir, stage="")]
        for size in (None, *(SMALL if block_labels(self.ir) else ())):
            for target in ("cpu", "triton"):
                suffix = "" if size is None else f", blocks of {size}"
                lowered = self.lowered[target] if size is None else self.lower(target, size)
                for name, stage in lowered.stages[1:] if size is None else lowered.stages[-1:]:
                    plain = replace(stage, stage="")
                    if plain not in seen:
                        seen.append(plain)
                        yield f"{target}: {name}{suffix}", interpreted(stage)
                if size is None and target == "triton":
                    yield "triton: emitted", _emitted(lowered, self.env)
        yield "cpu: compiled", lambda own: self.native.get(self.number)(own, self.env)
        if self.device == "cuda":
            yield ON_GPU, lambda own: _tuple(self.kernel(**own))


def _tuple(out: Any) -> tuple[Tensor, ...]:
    return () if out is None else out if isinstance(out, tuple) else (out,)


def _check_reference(kernel: Kernel, names: list[str], wanted: list[Tensor], ir: KernelIR) -> None:
    count = len(ir.returns)
    if len(wanted) != len(names):
        raise VerifyError(
            f"the reference of kernel {kernel.name!r} returns {len(wanted) - len(names) + count} tensors, the kernel "
            f"{count}: {', '.join(names[:count]) or 'none'}"
        )
    for value, tensor in zip(ir.returns, wanted):
        if tensor.dtype != value.tensor.dtype.torch or tensor.dim() != len(value.tensor.dims):
            raise VerifyError(
                f"the reference of kernel {kernel.name!r} gives {tensor.dtype} {list(tensor.shape)} for "
                f"{value.name!r}, the kernel {value.type}"
            )


def _emitted(lowered: Lowered, env: Mapping[str, int]) -> Runner | str:
    if importlib.util.find_spec("triton") is None:
        return "not run: triton is not installed"

    def run(own: dict[str, Any]) -> tuple[Tensor, ...]:
        from tilery.tile.targets.triton import run_interpreted

        return run_interpreted(lowered, own, env)

    return run
