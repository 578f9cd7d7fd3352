"""From a call to a running binary: what happens when the dispatcher meets a key for the first time.

Two tables. `executables`: compiled code, by dtypes and statics, sizes that shape tiles, schedule, device and memory
facts. `plans`: a launch of one executable for exact shapes, which is all that a warm call needs. A default schedule is
chosen for sizes rounded up to powers of two, so a kernel has few binaries however its dynamic sizes vary.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tilery.tile import cache, dispatch
from tilery.tile.errors import LaunchError
from tilery.tile.lowering import lower
from tilery.tile.plans import Call, Executable, Interface, Plan, make_plan, unpack
from tilery.tile.signature import Specialisation

if TYPE_CHECKING:
    from tilery.tile.kernel import Kernel


def bucket(env: Mapping[str, int], exact: tuple[str, ...]) -> dict[str, int]:
    """The sizes a schedule is chosen for: those that do not shape tiles rounded up to powers of two."""
    return {n: v if n in exact or v < 2 else 1 << (v - 1).bit_length() for n, v in env.items()}


class Launcher:
    """The launches of one kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.plans: dict[Any, Plan] = {}
        self.executables: dict[Any, Executable] = {}
        self.interfaces: dict[Specialisation, Interface] = {}
        self.dispatch = dispatch.build(kernel.signature, self.plans, self.missed)
        self._lock = threading.RLock()
        self._fingerprint = ""

    # --- the slow path of a call --------------------------------------------------------------------------------

    def missed(self, values: tuple[Any, ...], out: Any, sanitize: bool, key: Any) -> Any:
        """A call whose key has no plan. Raises `LaunchError` for arguments that do not fit the signature."""
        signature = self.kernel.signature
        given = {p.name: v for p, v in zip(signature.parameters, values) if v is not dispatch.MISSING}
        bound = signature.bind((), given)
        spec = signature.specialise(bound)
        for name, value in spec.statics:
            if getattr(value, "__hash__", None) is None:
                raise LaunchError(
                    f"{self.kernel.name}: the static value {name}={value!r} must be hashable: a tuple, say"
                )
        tensors = {p.name: bound[p.name] for p in signature.parameters if p.spec is not None}
        present = {n: t for n, t in tensors.items() if t is not None}
        refuse_gradients(self.kernel.name, present)
        if torch._C._len_torch_dispatch_stack() or any(type(t) not in dispatch.PLAIN for t in present.values()):
            return self._dispatched(bound, spec, out)
        env = signature.bind_dims(bound)
        device = device_of(self.kernel.name, present)
        if sanitize:
            return self._sanitized(bound, spec, env, out)
        plan = self.plan(bound, spec, env, device)
        if key is not None:
            if len(self.plans) >= dispatch.LIMIT:
                self.plans.clear()
            self.plans[key] = plan
        runtime = [bound[p.name] for p in signature.parameters if p.kind != "static"]
        return plan(*runtime, *(0 if t is None else t.data_ptr() for t in tensors.values()), out)

    def _dispatched(self, bound: Mapping[str, Any], spec: Specialisation, out: Any) -> Any:
        """Through the registered operator, so that fake and functional tensors and modes see it."""
        from tilery.tile import torchop

        if out is not None:
            raise LaunchError(
                f"{self.kernel.name}: out= does not work on {_strange(bound)}; take what the call returns"
            )
        return torchop.call(self.kernel, spec, bound)

    def _sanitized(self, bound: Mapping[str, Any], spec: Specialisation, env: Mapping[str, int], out: Any) -> Any:
        from tilery.tile import sanitize

        report = sanitize.run(self.kernel.trace(spec), bound, env)
        if out is None:
            return unpack(report.outputs)
        for given, made in zip(out if isinstance(out, tuple) else (out,), report.outputs):
            given.copy_(made)
        return out

    # --- plans and executables ------------------------------------------------------------------------------------

    def plan(self, bound: Mapping[str, Any], spec: Specialisation, env: dict[str, int], device: torch.device) -> Plan:
        """A launch for exactly these shapes."""
        return make_plan(*self.prepare(bound, spec, env, device))

    def prepare(
        self, bound: Mapping[str, Any], spec: Specialisation, env: dict[str, int], device: torch.device
    ) -> tuple[Executable, Call]:
        """Compiled code for these arguments, and what a launch of it must know."""
        interface = self.interface(spec)
        present = {n: t for n, t in bound.items() if isinstance(t, Tensor)}
        for name in interface.viewed:
            if not present[name].is_contiguous():
                raise LaunchError(
                    f"{self.kernel.name}: {name} must be contiguous, since the kernel views its memory as other "
                    f"elements; got strides {list(present[name].stride())}: pass {name}.contiguous()"
                )
        parameters = self.kernel.signature.parameters
        executable = self.executable(bound, spec, env, device, interface, present)
        runtime = tuple(p.name for p in parameters if p.kind != "static")
        tensors = {p.name: bound[p.name] for p in parameters if p.spec is not None}
        return executable, Call(self.kernel.name, interface, runtime, tensors, env, device)

    def executable(
        self, bound: Mapping[str, Any], spec: Specialisation, env: Mapping[str, int], device: torch.device,
        interface: Interface, tensors: Mapping[str, Tensor],
    ) -> Executable:  # fmt: skip
        """Compiled code for these arguments: from memory, disk or a compilation."""
        rounded = bucket(env, interface.tile_dims)
        facts = facts_of(tensors, env, interface, device)
        key = (spec, tuple(rounded.items()), device, facts)
        found = self.executables.get(key)
        if found is None:
            with self._lock:
                found = self.executables.get(key)
                if found is None:
                    compile_for = self._for_cuda if device.type == "cuda" else self._for_cpu
                    found = self.executables[key] = compile_for(spec, rounded, facts, bound, env)
        return found

    def _name(self, kind: str, spec: Specialisation, rounded: Mapping[str, int], *facts: Any) -> str:
        """The key of compiled code on disk: everything it depends on."""
        schedule = self.kernel.schedule
        declared = cache.fingerprint(schedule) if callable(schedule) else schedule and schedule.to_json()
        sizes = tuple(rounded.items())
        name = self.kernel.full_name
        return cache.digest(kind, cache.versions(), name, self.fingerprint(), spec, sizes, declared, *facts)

    def _for_cpu(
        self, spec: Specialisation, rounded: Mapping[str, int], facts: Facts, bound: Mapping[str, Any],
        env: Mapping[str, int],
    ) -> Executable:  # fmt: skip
        from tilery.tile.executables import NativeCode, compile_native
        from tilery.tile.targets.cpu import build

        name = self._name("cpu", spec, rounded, facts)
        record = cache.read(name) if build.compiler() is not None else None
        if record is not None:
            try:
                return NativeCode(record)
            except Exception:
                pass  # an entry that does not fit counts as absent
        schedule = self.kernel.schedule_for(rounded, "cpu")
        code: Any = compile_native(self.kernel.trace(spec), rounded, schedule, frozenset(facts.strided))
        if code.record is not None:
            cache.write(name, code.record)
        return code

    def _for_cuda(
        self, spec: Specialisation, rounded: Mapping[str, int], facts: Facts, bound: Mapping[str, Any],
        env: Mapping[str, int],
    ) -> Executable:  # fmt: skip
        from tilery.tile.executables import TritonCode
        from tilery.tile.targets.triton import compile_kernel, find_cached, spec_of
        from tilery.tile.targets.triton.launch import current_arch

        arch = current_arch()
        name = self._name("triton", spec, rounded, facts, arch)
        found = find_cached(name) if cache.folder() is not None else None
        if found is None:
            ir = self.kernel.trace(spec)
            lowered = lower(ir, rounded, "triton", self.kernel.schedule_for(rounded, "triton"))
            memory = spec_of(lowered.kernel, bound, env)
            found = compile_kernel(lowered.kernel, lowered.schedule, memory, arch, name)
        return TritonCode(found)

    def fingerprint(self) -> str:
        """The hash of the kernel's source."""
        if not self._fingerprint:
            self._fingerprint = cache.fingerprint(self.kernel.function)
        return self._fingerprint

    def interface(self, spec: Specialisation) -> Interface:
        """From memory, disk or a trace."""
        found = self.interfaces.get(spec)
        if found is None:
            key = cache.digest("interface", cache.versions(), self.kernel.full_name, self.fingerprint(), spec)
            record = cache.read(key)
            try:
                found = None if record is None else Interface.from_record(record, self.kernel.signature)
            except Exception:
                found = None  # an entry that does not fit counts as absent
            if found is None:
                found = Interface.of(self.kernel.trace(spec))
                cache.write(key, found.to_record())
            self.interfaces[spec] = found
        return found


@dataclass(frozen=True)
class Facts:
    """What compiled code may rely on besides sizes: tensors that are strided, that have 2^31 bytes ("x") or elements
    ("x*") or more, or are not on a multiple of 16 bytes, and (CUDA) dimensions and strides that are multiples of 16."""

    strided: tuple[str, ...] = ()
    far: tuple[str, ...] = ()
    unaligned: tuple[str, ...] = ()
    divisible: tuple[str, ...] = ()


def facts_of(
    tensors: Mapping[str, Tensor], env: Mapping[str, int], interface: Interface, device: torch.device
) -> Facts:
    """The facts of a call."""
    strided = tuple(n for n, t in tensors.items() if not t.is_contiguous())
    if device.type == "cpu":
        return Facts(strided)
    reach = {n: (_reach(t), t.element_size()) for n, t in tensors.items()}
    reach |= {o.name: (math.prod(d.evaluate(env) for d in o.dims), o.dtype.bytes) for o in interface.outputs}
    far = [n for n, (count, size) in reach.items() if count * size >= FAR]
    far += [f"{n}*" for n, (count, size) in reach.items() if count >= FAR]
    divisible = [n for n, v in env.items() if v % 16 == 0]
    divisible += [f"{n}.{a}" for n in strided for a, s in enumerate(tensors[n].stride()[:-1]) if s % 16 == 0]
    unaligned = tuple(n for n, t in tensors.items() if t.data_ptr() % 16)
    return Facts(strided, tuple(far), unaligned, tuple(divisible))


FAR = 2**31


def _reach(tensor: Tensor) -> int:
    """Elements from a tensor's start to its end."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
    return 1 + last if tensor.numel() else 0


def device_of(name: str, tensors: Mapping[str, Tensor]) -> torch.device:
    """The one device of all tensors. Raises `LaunchError`."""
    first = ""
    for n, t in tensors.items():
        if t.device.type not in ("cpu", "cuda"):
            raise LaunchError(f"{name}: {n} is on {t.device}; kernels run on cpu and cuda tensors: move it")
        if not first:
            first = n
        elif t.device != tensors[first].device:
            raise LaunchError(
                f"{name}: {n} is on {t.device} and {first} on {tensors[first].device}; move all tensors to one device"
            )
    return tensors[first].device if first else torch.device("cpu")


def refuse_gradients(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises `LaunchError` if autograd would need to see the kernel."""
    if torch.is_grad_enabled():
        for n, t in tensors.items():
            if t.requires_grad:
                raise LaunchError(
                    f"{name}: {n} requires grad, and kernels have no gradient; call it under torch.no_grad() or "
                    f"torch.inference_mode(), or pass {n}.detach()"
                )


def _strange(bound: Mapping[str, Any]) -> str:
    kinds = sorted(
        {type(v).__name__ for v in bound.values() if isinstance(v, Tensor) and type(v) not in dispatch.PLAIN}
    )
    return ", ".join(kinds) or "tensors under a dispatch mode"
