"""A sequence of C calls, recorded once and replayed by one call: the CPU's counterpart of a CUDA graph.

A small step is a hundred calls of a few microseconds each, and calling from Python takes longer than that. Code that
runs within `Recording` runs as always, and the address and arguments of every C function it reaches are noted: kernels'
(by way of `Kernel.__call__`), and others' whose callers tell `Recording.add`. `Recording.tape` then gives a `Tape`,
whose `run` makes the same calls with the same arguments.

So a tape computes what the code computed, on what now stands in the memory that existed before. Memory made meanwhile
(`torch.empty` and kernels' outputs) becomes the tape's, where buffers that are not needed at the same time share it.
Python must do nothing else with numbers: a torch operator that is neither an allocation nor a view raises
`NotRecordable`, and so does reading a number from a tensor.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
from contextvars import Token
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tilery.tile.executables import NativeCode
from tilery.tile.graph import RECORDER, CallRecorder
from tilery.tile.plans import Call, unpack
from tilery.tile.targets.cpu import build

if TYPE_CHECKING:
    from tilery.tile.kernel import Kernel

ALIGNMENT = 64
"""Bytes; a cache line."""
ALLOCATIONS = frozenset({"empty", "empty_like", "empty_strided", "new_empty"})
QUESTIONS = frozenset(
    {
        "__get__", "__len__", "data_ptr", "dim", "element_size", "is_contiguous", "is_floating_point", "numel", "size",
        "storage_offset", "stride",
    }
)  # fmt: skip
"""Functions of tensors that ask for no number of theirs."""
VIEWS = frozenset(
    {
        "__get__", "__getitem__", "as_strided", "bfloat16", "chunk", "contiguous", "detach", "double", "expand",
        "expand_as", "flatten", "float", "half", "int", "long", "movedim", "narrow", "permute", "reshape", "select",
        "split", "squeeze", "swapaxes", "t", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as",
    }
)  # fmt: skip
"""Functions that compute nothing where their result has the memory of an argument. Others may write to it: `|=` does,
and so does whatever takes `inplace=True`."""


class NotRecordable(Exception):
    """The code did something that a tape cannot repeat; the message says what."""


class _Entry(ctypes.Structure):
    _fields_ = (("call", ctypes.c_void_p), ("arguments", ctypes.c_void_p))


@functools.cache
def _library() -> ctypes.CDLL:
    library = build.build(Path(__file__).with_name("tape.cpp").read_text(), "tape")
    library.tile_tape_run.restype = None
    library.tile_tape_run.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    return library


def address_of(function: Any) -> int:
    """Of a C function."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


class Arena:
    """Memory that tapes share, because only one of them runs at a time. Tapes keep what they were given when it grows,
    so it grows to twice its size: all of it together is less than four times what the largest tape needs."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int) -> Tensor:
        """At least `size` bytes, aligned."""
        if len(self.memory) < size + ALIGNMENT:
            self.memory = torch.empty(max(size + ALIGNMENT, 2 * len(self.memory)), dtype=torch.uint8, device="cpu")
        return self.memory[-self.memory.data_ptr() % ALIGNMENT :]


@dataclass(frozen=True)
class _Call:
    function: int
    arguments: list[int]
    pointers: Sequence[int]
    """Which of the arguments are addresses."""


@dataclass(frozen=True)
class _Launch:
    code: NativeCode
    call: Call
    shapes: tuple[tuple[int, ...], ...]
    """Of all outputs, those not returned included."""
    returned: tuple[int, ...]
    """Which outputs, in order."""


class Tape:
    """Recorded calls. `outputs`: what the recorded code returned, for the caller to copy before anything shares its
    memory again. All other memory the calls touch belongs to the caller, who keeps it alive."""

    def __init__(self, calls: Sequence[_Call], outputs: tuple[Tensor, ...], memory: Tensor) -> None:
        self.outputs = outputs
        self._memory = memory
        flat = [value for call in calls for value in call.arguments]
        self._arguments = (ctypes.c_int64 * len(flat))(*flat)
        entries, at = [], ctypes.addressof(self._arguments)
        for call in calls:
            entries.append(_Entry(call.function, at))
            at += 8 * len(call.arguments)
        self._entries = (_Entry * len(calls))(*entries)
        self._run, self._where = _library().tile_tape_run, ctypes.addressof(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def run(self) -> None:
        self._run(self._where, len(self._entries))


class Recording(TorchFunctionMode):
    """Runs what is done within it and notes the C calls. Not for several threads at once."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[_Call] = []
        self._buffers: dict[int, Tensor] = {}
        self._launches: dict[Any, _Launch] = {}
        self._token: Token[CallRecorder | None] | None = None

    def __enter__(self) -> Recording:
        self._token = RECORDER.set(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        assert self._token is not None
        RECORDER.reset(self._token)

    # --- what the recorded code does ------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result, name = func(*args, **kwargs), getattr(func, "__name__", str(func))
        if name in QUESTIONS and not isinstance(result, Tensor):
            return result
        made = [result] if isinstance(result, Tensor) else _tensors(result)
        if name in ALLOCATIONS and "out" not in kwargs:
            self._keep(result)
        elif made:
            given = {t.untyped_storage().data_ptr() for t in _tensors((*args, *kwargs.values()))}
            if name not in VIEWS or any(t.untyped_storage().data_ptr() not in given for t in made):
                raise NotRecordable(f"torch's {name} computes")
        else:
            raise NotRecordable(f"torch's {name} reads or writes numbers")
        return result

    def call(self, kernel: Kernel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A kernel's call."""
        with torch._C.DisableTorchFunction():
            if not kwargs.keys().isdisjoint(("out", "sanitize")):
                raise NotRecordable(f"{kernel.name} is called with options")
            bound = kernel.signature.bind(args, kwargs)
            launch = self._launch(kernel, bound)
            tensors: list[Tensor | None] = [bound[name] for name in launch.call.tensors]
            outputs = []
            for spec, shape in zip(launch.call.interface.outputs, launch.shapes):
                outputs.append(self._keep(torch.empty(shape, dtype=spec.dtype.torch, device="cpu")))
                if spec.init is not None:
                    self._fill(outputs[-1], spec.init)
            tensors += outputs
            addresses = [t.data_ptr() for t in tensors if t is not None]
            self.add(launch.code.replay, *launch.code.arguments(launch.call, addresses, bound))
            return unpack(tuple(outputs[n] for n in launch.returned))

    def _launch(self, kernel: Kernel, bound: Mapping[str, Any]) -> _Launch:
        """Compiled code for a call, worked out once for all layers of a model."""
        key = (kernel, *(_kind(value) for value in bound.values()))
        found = self._launches.get(key)
        if found is None:
            signature = kernel.signature
            env = signature.bind_dims(bound)
            code, call = kernel.launcher.prepare(bound, signature.specialise(bound), env, torch.device("cpu"))
            if not isinstance(code, NativeCode):
                raise NotRecordable(f"{kernel.name} is not compiled")
            outputs = call.interface.outputs
            shapes = tuple(tuple(d.evaluate(env) for d in spec.dims) for spec in outputs)
            returned = tuple(outputs.index(o) for o in call.interface.returned)
            found = self._launches[key] = _Launch(code, call, shapes, returned)
        return found

    def add(self, function: int, arguments: list[int], pointers: Sequence[int]) -> None:
        """Calls a C function by its address, with an array of 8-byte arguments; the `pointers` among them are addresses
        of memory."""
        call = _Call(function, arguments, pointers)
        self._calls.append(call)
        packed = (ctypes.c_int64 * len(arguments))(*arguments)
        entry = _Entry(function, ctypes.addressof(packed))
        _library().tile_tape_run(ctypes.byref(entry), 1)

    def _fill(self, tensor: Tensor, value: float | int) -> None:
        if value != 0:
            raise NotRecordable(f"a kernel wants memory full of {value}")
        arguments = [tensor.data_ptr(), tensor.numel() * tensor.element_size(), 0]
        self.add(address_of(_library().tile_tape_fill), arguments, (0,))

    def _keep(self, made: Tensor) -> Tensor:
        if made.device.type != "cpu":
            raise NotRecordable(f"memory is allocated on {made.device}")
        self._buffers[made.data_ptr()] = made
        return made

    # --- what comes of it -----------------------------------------------------------------------------------------

    def tape(self, outputs: Sequence[Tensor], arena: Arena) -> Tape:
        """The calls, in memory of `arena`; `outputs` are tensors that the recorded code made."""
        bases = sorted(self._buffers)
        uses = [[self._base(bases, call.arguments[n]) for n in call.pointers] for call in self._calls]
        last = {base: number for number, found in enumerate(uses) for base in found if base is not None}
        last |= {base: len(uses) for t in outputs if (base := self._base(bases, t.data_ptr())) is not None}
        offsets, size = self._place(uses, last)
        memory = arena.reserve(size)
        start = memory.data_ptr()

        def moved(address: int, base: int | None) -> int:
            return address if base is None else start + offsets[base] + address - base

        calls = []
        for call, found in zip(self._calls, uses):
            arguments = list(call.arguments)
            for n, base in zip(call.pointers, found):
                arguments[n] = moved(arguments[n], base)
            calls.append(_Call(call.function, arguments, call.pointers))
        return Tape(calls, tuple(self._view(t, bases, offsets, memory) for t in outputs), memory)

    def _base(self, bases: Sequence[int], address: int) -> int | None:
        """The buffer of this recording that an address lies in."""
        at = bisect.bisect_right(bases, address) - 1
        if at < 0:
            return None
        buffer = self._buffers[bases[at]]
        return bases[at] if address < bases[at] + buffer.numel() * buffer.element_size() else None

    def _place(self, uses: Sequence[Sequence[int | None]], last: Mapping[int, int]) -> tuple[dict[int, int], int]:
        """Where each buffer lies in the arena, from its first use to its `last`: the first gap that holds it."""
        offsets: dict[int, int] = {}
        live: list[tuple[int, int, int]] = []  # offset, end, last use
        size = 0
        for number, found in enumerate(uses):
            for base in found:
                if base is None or base in offsets:
                    continue
                buffer = self._buffers[base]
                bytes_ = -(-buffer.numel() * buffer.element_size() // ALIGNMENT) * ALIGNMENT
                live = sorted(row for row in live if row[2] >= number)
                at = 0
                for begin, end, _ in live:
                    if at + bytes_ <= begin:
                        break
                    at = max(at, end)
                offsets[base] = at
                live.append((at, at + bytes_, last[base]))
                size = max(size, at + bytes_)
        return offsets, size

    def _view(self, tensor: Tensor, bases: Sequence[int], offsets: Mapping[int, int], memory: Tensor) -> Tensor:
        base = self._base(bases, tensor.data_ptr())
        if base is None or base not in offsets:
            raise NotRecordable("an output is not what a recorded call wrote")
        begin = offsets[base] + tensor.data_ptr() - base
        reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
        flat = memory[begin : begin + reach * tensor.element_size()].view(tensor.dtype)
        return flat.as_strided(tensor.shape, tensor.stride())


def _kind(value: Any) -> Any:
    """What compiled code and its launch may depend on in an argument."""
    return (*value.shape, *value.stride(), value.dtype) if isinstance(value, Tensor) else (type(value), value)


def _tensors(values: Any) -> list[Tensor]:
    """The tensors among some values, lists of them included."""
    if isinstance(values, Tensor):
        return [values]
    return [t for value in values for t in _tensors(value)] if isinstance(values, (list, tuple)) else []
