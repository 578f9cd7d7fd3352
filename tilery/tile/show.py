"""A kernel as text at any stage: IR, the code a target emits, machine code."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilery.tile import plugins
from tilery.tile.errors import LaunchError, LoweringError
from tilery.tile.lowering import Lowered, lower
from tilery.tile.signature import Specialisation

if TYPE_CHECKING:
    from tilery.tile.kernel import Kernel

CODE = ("cpu", "triton", "ascend", "ptx", "sass")
"""Stages that are a target's code; all others are IR."""


def text_of(
    kernel: Kernel, stage: str, case: str | None = None, known: Mapping[str, Any] | None = None,
    target: str | None = None,
) -> str:  # fmt: skip
    """A stage for the sizes of a declared case (the first one if neither is given) or for described ones (`known`:
    dimensions and static values by name). `target`: whose lowering; None takes the one that has the stage.

    Raises `LaunchError` for what does not fit the kernel, `LoweringError` for a stage that does not exist.
    """
    arguments = None
    if known:
        key, env = kernel.assume(**known)
    else:
        name = case or next(iter(kernel.cases), None)
        if name is None:
            raise LaunchError(f"{kernel.name} declares no case: give its dimensions, {_wanted(kernel)}")
        arguments = kernel.signature.bind((), kernel.arguments(name))
        key, env = kernel.specialise(arguments)
    missing = [d.name for d in kernel.trace(key).tile_dims if d.name not in env]
    if missing and stage != "trace":
        raise LaunchError(f"{kernel.name}: {missing[0]} shapes tiles and needs a value: {_wanted(kernel)}")
    if stage in CODE:
        return _code(kernel, stage, key, env, arguments)
    ir = kernel.trace(key)
    if stage == "trace":
        return str(ir)
    if stage in plugins.load().targets:
        return lowered(kernel, stage, key, env).source
    low = lowered(kernel, target or "cpu", key, env)
    if target is None and stage not in dict(low.stages):
        padded = lowered(kernel, "triton", key, env)
        low = padded if stage in dict(padded.stages) else low
    return str(low.stage(stage))


def source_of(low: Lowered) -> str:
    """What a target emits for contiguous, aligned tensors. Raises `LoweringError`."""
    if low.target == "cpu":
        from tilery.tile.targets.cpu.source import emit

        return emit(low.kernel, f"k_{low.kernel.name}").text
    if low.target == "triton":
        from tilery.tile.targets.triton import Spec
        from tilery.tile.targets.triton import emit as emit_triton

        return emit_triton(low.kernel, low.schedule, Spec()).source
    if low.target == "ascend":
        from tilery.tile.targets.ascend import emit_lowered

        return emit_lowered(low).source
    found = plugins.load().targets.get(low.target)
    if found is None:
        raise LoweringError(f"the target {low.target!r} emits no text")
    return plugins.emit(found, low)


def _wanted(kernel: Kernel) -> str:
    return ", ".join(f"{d.name}={max(64, d.multiple_of)}" for d in kernel.signature.dims)


def lowered(kernel: Kernel, target: str, key: Specialisation, env: Mapping[str, int]) -> Lowered:
    """The lowering with the kernel's own schedule."""
    return lower(kernel.trace(key), env, target, kernel.schedule_for(env, target))


def _code(
    kernel: Kernel, stage: str, key: Specialisation, env: Mapping[str, int], arguments: Mapping[str, Any] | None
) -> str:  # fmt: skip
    if stage == "cpu":
        from tilery.tile.targets.cpu.source import HEADER, emit

        bound = lowered(kernel, "cpu", key, env).kernel
        return f"{HEADER}\n{emit(bound, f'k_{bound.name}').text}"
    from tilery.tile.targets.triton import Spec, spec_of
    from tilery.tile.targets.triton import emit as emit_triton
    from tilery.tile.targets.triton.build import build

    low = lowered(kernel, "ascend" if stage == "ascend" else "triton", key, env)
    if arguments is not None:
        memory = spec_of(low.kernel, arguments, env)
    else:
        memory = Spec(divisible=frozenset(n for n, v in env.items() if v % 16 == 0))
    if stage == "ascend":
        from tilery.tile.targets.ascend import emit_lowered

        return emit_lowered(low, memory).source
    emitted = emit_triton(low.kernel, low.schedule, memory)
    if stage == "triton":
        return emitted.source
    found = importlib.util.find_spec("triton")
    if found is None or not found.submodule_search_locations:
        raise LaunchError(f"{stage} needs the package triton, which is not installed; cpu and triton sources do not")
    binary = build(emitted)
    tools = Path(found.submodule_search_locations[0]) / "backends" / "nvidia" / "bin"
    path = str(binary.folder / "kernel.cubin")
    if stage == "sass":
        return _run([str(tools / "nvdisasm"), "-c", path])
    ptx = binary.folder / "kernel.ptx"
    return ptx.read_text() if ptx.is_file() else _ptx(emitted, binary.key, binary.folder / "kernel.py")


def _ptx(emitted: Any, key: str, source: Path) -> str:
    """Compiles again: the cache keeps binaries, not what they were assembled from."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tilery.tile.targets.triton.build import HOPPER, load_source

    plan = emitted.plan
    function = getattr(load_source(source, f"tilery_kernel_{key}"), plan.name)
    made = ASTSource(fn=function, signature=plan.signature, constexprs={}, attrs=plan.attributes)
    return str(triton.compile(made, target=GPUTarget("cuda", HOPPER, 32), options=plan.options).asm["ptx"])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise LaunchError(f"{Path(command[0]).name} failed: {done.stderr.strip()[:300]}")
    return done.stdout
