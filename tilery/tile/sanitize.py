"""Runs a kernel under watch: accesses outside tensors, races between programs, unwritten outputs, new NaN and inf.

The interpreter runs the traced IR with the smallest blocks (every index of the grid is its own program), so that what
is found does not depend on a schedule. Memory is watched by the byte, so views of other dtypes and tensors that share
storage are seen as what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tilery.tile import interpret
from tilery.tile.errors import Loc, SanitizeError
from tilery.tile.ir import Kernel, Op, TensorType, Value, walk

NOBODY, SEVERAL = -1, -2


@dataclass(frozen=True)
class Tap:
    """A value that `tile.tap(name, value)` saw in one program of the grid."""

    program: tuple[int, ...]
    name: str
    value: Tensor


@dataclass
class SanitizeReport:
    """What a clean run did. `outputs`: what the kernel returned."""

    programs: int = 0
    loads: int = 0
    stores: int = 0
    taps: list[Tap] = field(default_factory=list)
    outputs: tuple[Tensor, ...] = ()

    def __str__(self) -> str:
        taps = f", {len(self.taps)} tapped values" if self.taps else ""
        return f"clean: {self.programs} programs, {self.loads} loads, {self.stores} stores{taps}"


def run(kernel: Kernel, arguments: Mapping[str, Any], env: Mapping[str, int], nonfinite: bool = True) -> SanitizeReport:
    """Runs `kernel` (stage "trace") on `arguments`, whose InOut tensors change. Raises `SanitizeError` at the first
    fault. `nonfinite=False` does not look for NaN and inf."""
    single = [label for op in walk(kernel.body) if op.name == "parallel" for kind, label in op.attr("axes")
              if kind == "block"]  # fmt: skip
    kernel = replace(kernel, blocks=tuple((label, 1) for label in single))
    watch = _Watch(kernel, arguments, env, nonfinite)
    outputs = interpret.run(kernel, arguments, env, watch)
    watch.unwritten()
    watch.report.outputs = outputs
    return watch.report


class _Storage:
    """The bytes of one allocation: who wrote each, who read it, whether the write was atomic."""

    def __init__(self, size: int, initialised: bool) -> None:
        self.writer = torch.full((size,), NOBODY, dtype=torch.int32)
        self.reader = torch.full((size,), NOBODY, dtype=torch.int32)
        self.atomic = torch.zeros(size, dtype=torch.bool)
        self.initialised = initialised


@dataclass(frozen=True)
class _Origin:
    """Where a NaN or inf came from: `op` None if it was given (an argument or a literal)."""

    op: Op | None


GIVEN = _Origin(None)


class _Watch(interpret.Monitor):
    def __init__(
        self, kernel: Kernel, arguments: Mapping[str, Any], env: Mapping[str, int], nonfinite: bool
    ) -> None:  # fmt: skip
        self.kernel, self.env, self.nonfinite = kernel, env, nonfinite
        self.report = SanitizeReport()
        self.programs: list[tuple[int, ...]] = []
        self.current = NOBODY
        self.roots: dict[int, Value] = {}
        self.storage: dict[int, _Storage] = {}
        self.origins: dict[tuple[int, str], tuple[_Origin, Tensor]] = {}  # (value, NaN or inf) -> source, where
        self.turns: dict[int, int] = {}
        self.merges: dict[int, list[Any]] = {}  # a value that control flow merges -> what flows into it
        by_pointer: dict[int, _Storage] = {}
        for p in kernel.params:
            if isinstance(p.value.type, TensorType):
                tensor = arguments[p.value.name]
                store = tensor.untyped_storage()
                key = store.data_ptr() or id(store)
                self.roots[p.value.id] = p.value
                self.storage[p.value.id] = by_pointer.setdefault(key, _Storage(store.nbytes(), True))
        for out in kernel.outputs:
            kind = out.value.tensor
            count = 1
            for dim in kind.dims:
                count *= dim.evaluate(env)
            self.roots[out.value.id] = out.value
            self.storage[out.value.id] = _Storage(count * kind.dtype.bytes, out.init is not None)
        for op in walk(kernel.body):
            if op.name == "view":
                self.roots[op.result.id] = self.roots[op.tensor.id]
            elif op.name == "for":
                (region,) = op.regions
                for param, init, back in zip(region.params[1:], op.operands[3:], region.yields):
                    self.merges[param.id] = [back, init]
                for result, init, back in zip(op.results, op.operands[3:], region.yields):
                    self.merges[result.id] = [back, init]
            elif op.name == "if":
                for number, result in enumerate(op.results):
                    self.merges[result.id] = [region.yields[number] for region in op.regions]

    # --- memory -------------------------------------------------------------------------------------------------

    def program(self, indices: tuple[int, ...]) -> None:
        self.current = len(self.programs)
        self.programs.append(indices)
        self.report.programs += 1

    def _bytes(self, op: Op, offsets: Tensor, mask: Tensor) -> tuple[_Storage, Value, Tensor]:
        root = self.roots[op.tensor.id]
        width = op.tensor.tensor.dtype.bytes
        places = offsets[mask].reshape(-1, 1).cpu() * width + torch.arange(width)
        return self.storage[root.id], root, places.reshape(-1)

    def _who(self, program: int) -> str:
        return "several programs" if program == SEVERAL else f"program {self.programs[program]}"

    def _element(self, root: Value, place: int) -> str:
        """The index of a byte in a contiguous tensor, for the message."""
        kind = root.tensor
        rest, index = place // kind.dtype.bytes, []
        for dim in reversed(kind.dims):
            size = max(1, dim.evaluate(self.env))
            index.append(rest % size)
            rest //= size
        return f"element {index[::-1]} of {root.name!r}"

    def load(self, op: Op, offsets: Tensor, mask: Tensor) -> None:
        self.report.loads += 1
        storage, root, places = self._bytes(op, offsets, mask)
        writer = storage.writer[places]
        foreign = (writer != NOBODY) & (writer != self.current)
        if bool(foreign.any()):
            at = int(foreign.nonzero()[0])
            raise SanitizeError(
                f"{self._who(self.current)} reads {self._element(root, int(places[at]))}, which "
                f"{self._who(int(writer[at]))} writes; programs run in any order, so the value is not defined. Use two "
                "kernels, or let one program do both",
                op.loc,
            )
        if not storage.initialised and bool((writer == NOBODY).any()):
            at = int((writer == NOBODY).nonzero()[0])
            raise SanitizeError(
                f"{self._element(root, int(places[at]))} is read before it is written; write it first, or give "
                "tile.empty an init",
                op.loc,
            )
        reader = storage.reader[places]
        storage.reader[places] = torch.where((reader == NOBODY) | (reader == self.current), self.current, SEVERAL).int()

    def store(self, op: Op, offsets: Tensor, mask: Tensor) -> None:
        self.report.stores += 1
        storage, root, places = self._bytes(op, offsets, mask)
        if places.unique().numel() != places.numel():
            raise SanitizeError(
                f"one store writes elements of {root.name!r} more than once; which value stays is not defined. Make "
                "the indices distinct, mask the duplicates, or use an atomic",
                op.loc,
            )
        self._written(op, storage, root, places, atomic=False)
        self._finite(op, mask)

    def atomic(self, op: Op, offsets: Tensor, mask: Tensor) -> None:
        """An atomic changes storage elements `offsets` where `mask` holds."""
        self.report.stores += 1
        storage, root, places = self._bytes(op, offsets, mask)
        self._written(op, storage, root, places, atomic=True)

    def _written(self, op: Op, storage: _Storage, root: Value, places: Tensor, atomic: bool) -> None:
        writer = storage.writer[places]
        clash = (writer != NOBODY) & (writer != self.current)
        if atomic:
            clash &= ~storage.atomic[places]
        if bool(clash.any()):
            at = int(clash.nonzero()[0])
            raise SanitizeError(
                f"{self._who(int(writer[at]))} and {self._who(self.current)} both write "
                f"{self._element(root, int(places[at]))}; programs run in any order, so which value stays is not "
                "defined. Give each program its own elements, or use an atomic",
                op.loc,
            )
        reader = storage.reader[places]
        foreign = (reader != NOBODY) & (reader != self.current)
        if bool(foreign.any()):
            at = int(foreign.nonzero()[0])
            raise SanitizeError(
                f"{self._who(self.current)} writes {self._element(root, int(places[at]))}, which "
                f"{self._who(int(reader[at]))} reads; programs run in any order, so the value read is not defined. Use "
                "two kernels, or write to an output of its own",
                op.loc,
            )
        storage.writer[places] = torch.where(atomic & (writer != NOBODY), SEVERAL, self.current).int()
        storage.atomic[places] = atomic

    def unwritten(self) -> None:
        """Raises for a returned output with elements that no program wrote."""
        returned = {value.id for value in self.kernel.returns}
        for out in self.kernel.outputs:
            if out.init is not None or out.value.id not in returned:
                continue
            missing = (self.storage[out.value.id].writer == NOBODY).nonzero()
            if missing.numel():
                count = missing.numel() // out.value.tensor.dtype.bytes
                raise SanitizeError(
                    f"{count} elements of output {out.value.name!r} are never written, the first is "
                    f"{self._element(out.value, int(missing[0]))}; write them, or give tile.empty an init",
                    self._last_store(out.value),
                )

    def _last_store(self, root: Value) -> Loc | None:
        found = None
        for op in walk(self.kernel.body):
            if op.name in ("store", "atomic") and self.roots[op.tensor.id].id == root.id:
                found = op.loc
        return found

    # --- values -------------------------------------------------------------------------------------------------

    def tap(self, name: str, value: Tensor) -> None:
        where = self.programs[self.current] if self.programs else ()
        self.report.taps.append(Tap(where, name, value.clone()))

    def _origin(self, operand: Any, kind: str, depth: int = 0) -> tuple[_Origin, Tensor] | None:
        """Where the NaN or inf in an operand came from and which elements have it; None: it has none."""
        if not isinstance(operand, Value):
            bad = operand != operand if kind == "NaN" else operand in (float("inf"), float("-inf"))
            return (GIVEN, torch.ones((), dtype=torch.bool)) if bad else None
        if (operand.id, kind) in self.origins:
            return self.origins[operand.id, kind]
        if depth < 8:
            for source in self.merges.get(operand.id, ()):
                found = self._origin(source, kind, depth + 1)
                if found is not None:
                    return found
        return None

    def result(self, op: Op, value: Tensor) -> None:
        turn = self.turns.get(id(op), 0)  # results of one operation come in order
        self.turns[id(op)] = (turn + 1) % len(op.results)
        if not self.nonfinite or not value.is_floating_point():
            return
        result = op.results[turn]
        plain = value.float() if value.element_size() == 1 else value
        for kind, found in (("NaN", plain.isnan()), ("inf", plain.isinf())):
            if not bool(found.any()):
                self.origins.pop((result.id, kind), None)
                continue
            origin = GIVEN
            if op.name not in ("load", "atomic"):
                sources = self.merges.get(result.id, op.operands)
                known = next((o for s in sources if (o := self._origin(s, kind)) is not None), None)
                origin = known[0] if known else _Origin(op)  # inf - inf is NaN: an infinity that was given is no excuse
            self.origins[result.id, kind] = (origin, found)

    def _finite(self, op: Op, mask: Tensor) -> None:
        """Raises if a store writes a NaN or inf that the kernel made itself."""
        if not self.nonfinite or not isinstance(op.stored, Value):
            return
        for kind in ("NaN", "inf"):
            known = self._origin(op.stored, kind)
            if known is not None and known[0].op is not None and bool((known[1] & mask).any()):
                source = known[0].op
                where = f" at {source.loc}" if source.loc and source.loc != op.loc else ""
                line = f" ({source.loc.text()})" if where and source.loc and source.loc.text() else ""
                raise SanitizeError(
                    f"{self._who(self.current)} stores {kind} in {self.roots[op.tensor.id].name!r}; it first appears "
                    f"in the result of {source.name!r}{where}{line}, from operands without {kind}. Guard that "
                    "operation, or mask the elements",
                    op.loc,
                )
