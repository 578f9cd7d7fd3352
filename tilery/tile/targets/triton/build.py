"""Source to binary: Triton's compiler for a given architecture, with or without a GPU, and a cache of the results.

A binary is found by its code, signature, options, Triton's version and the architecture; finding one imports neither
triton nor the emitted file. `report` says what the binary needs: registers, spills, shared memory, instructions.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tilery.tile.errors import LaunchError, LoweringError
from tilery.tile.targets.triton.emit import Emitted
from tilery.tile.targets.triton.native import cache_folder
from tilery.tile.targets.triton.plan import Plan

HOPPER = 90
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*(?:\.[A-Z0-9_]+)*)", re.M)


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: `symbol` in `cubin`, bytes of dynamic shared memory, Triton's scratch per program."""

    key: str
    plan: Plan
    symbol: str
    shared: int
    scratch: int
    cubin: bytes
    folder: Path


@dataclass(frozen=True)
class BinaryReport:
    """What a binary needs of the device. `spills`: bytes of local memory per thread; `instructions`: count by opcode
    (the first part of its name), `variants` by full name, of which `LDG.E.128` and the like tell the width of loads.
    """

    registers: int
    spills: int
    shared: int
    cubin_bytes: int
    instructions: dict[str, int]
    variants: dict[str, int]

    def count(self, *opcodes: str) -> int:
        """How many instructions have one of these opcodes."""
        return sum(self.instructions.get(name, 0) for name in opcodes)

    def loads(self) -> dict[int, int]:
        """Global loads by width in bits."""
        widths: Counter[int] = Counter()
        for name, number in self.variants.items():
            parts = name.split(".")
            if parts[0] in ("LDG", "LDGSTS"):
                widths[next((int(p) for p in parts if p in ("64", "128")), 32)] += number
        return dict(widths)

    def __str__(self) -> str:
        top = ", ".join(f"{k} {v}" for k, v in Counter(self.instructions).most_common(6))
        return f"{self.registers} registers, {self.spills} B spilled, {self.shared} B shared; {top}"


@functools.cache
def triton_version() -> str:
    """The installed Triton's version. Raises `LaunchError` without one."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        raise LaunchError(
            "the package triton is not installed; install triton to compile for a GPU, or use the CPU target"
        ) from None


def key_of(emitted: Emitted, arch: int) -> str:
    """The name of a binary in the cache: the whole plan counts, the comments of the source do not."""
    parts = (emitted.code, emitted.plan.to_json(), triton_version(), str(arch))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def build(emitted: Emitted, arch: int = HOPPER) -> Binary:
    """The binary, from the cache or compiled. Raises `LoweringError` with the compiler's message."""
    key = key_of(emitted, arch)
    found = cached(key)
    return found if found is not None else _compile(emitted, key, arch)


def cached(key: str) -> Binary | None:
    """The binary of that name, if the cache has it."""
    folder = cache_folder() / key
    try:
        facts = json.loads((folder / "binary.json").read_text())
        cubin = (folder / "kernel.cubin").read_bytes()
        plan = Plan.from_json((folder / "plan.json").read_text())
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return Binary(key, plan, facts["symbol"], facts["shared"], facts["scratch"], cubin, folder)


def load_source(path: Path, name: str) -> ModuleType:
    """The module of an emitted file; Triton reads functions from real files."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(emitted: Emitted, key: str, arch: int) -> Binary:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    plan = emitted.plan
    root = cache_folder()
    root.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=root, prefix=".new-"))
    try:
        (work / "kernel.py").write_text(emitted.source)
        function = getattr(load_source(work / "kernel.py", f"tilery_kernel_{key}"), plan.name)
        if not hasattr(function, "cache_key"):
            raise LaunchError("triton was imported with TRITON_INTERPRET=1, so it cannot compile; unset it and restart")
        source = ASTSource(fn=function, signature=plan.signature, constexprs={}, attrs=plan.attributes)
        try:
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=plan.options)
        except Exception as error:
            kept = root / f"failed-{key}.py"
            shutil.copyfile(work / "kernel.py", kept)
            raise LoweringError(
                f"Triton cannot compile {plan.name!r}: {_reason(error)}\n    the emitted source is {kept}; try a "
                "smaller block or fewer stages in the schedule"
            ) from error
        facts: dict[str, Any] = {
            "symbol": compiled.metadata.name, "shared": compiled.metadata.shared,
            "scratch": getattr(compiled.metadata, "global_scratch_size", 0) or 0, "arch": arch,
        }  # fmt: skip
        (work / "kernel.cubin").write_bytes(compiled.asm["cubin"])
        (work / "kernel.ptx").write_text(compiled.asm["ptx"])
        (work / "plan.json").write_text(plan.to_json())
        (work / "binary.json").write_text(json.dumps(facts))
        if facts["scratch"]:
            raise LoweringError(f"{plan.name!r} needs global scratch memory, which this target does not give")
        try:
            os.rename(work, root / key)
        except OSError:  # another process was first
            if cached(key) is None:
                shutil.rmtree(root / key, ignore_errors=True)
                os.rename(work, root / key)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Binary(key, plan, facts["symbol"], facts["shared"], 0, compiled.asm["cubin"], root / key)


def _reason(error: BaseException) -> str:
    """The first lines that say something of Triton's nested errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    return "\n    ".join(text.splitlines()[:12])


def report(emitted: Emitted, arch: int = HOPPER) -> BinaryReport:
    """Compiles and says what the binary needs; works without a GPU."""
    return report_of(build(emitted, arch))


def report_of(binary: Binary) -> BinaryReport:
    """What a binary needs, by the disassembler that Triton brings; kept in the cache."""
    kept = binary.folder / "report.json"
    try:
        return BinaryReport(**json.loads(kept.read_text()))
    except (OSError, ValueError, TypeError):
        pass
    found = importlib.util.find_spec("triton")
    if found is None or not found.submodule_search_locations:
        raise LaunchError("the package triton is not installed; its disassembler reads binaries")
    tools = Path(found.submodule_search_locations[0]) / "backends" / "nvidia" / "bin"
    path = str(binary.folder / "kernel.cubin")
    usage = _run([str(tools / "cuobjdump"), "--dump-resource-usage", path])
    sass = _run([str(tools / "nvdisasm"), path])
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise LoweringError(f"cuobjdump tells no resource usage of {path}: {usage.strip()[:200]}")
    variants = Counter(_INSTRUCTION.findall(sass))
    opcodes: Counter[str] = Counter()
    for name, number in variants.items():
        opcodes[name.split(".")[0]] += number
    result = BinaryReport(
        int(match.group(1)), int(match.group(2)), binary.shared, len(binary.cubin), dict(opcodes), dict(variants)
    )
    temporary = kept.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(vars(result)))
    os.replace(temporary, kept)
    return result


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise LoweringError(f"{Path(command[0]).name} failed: {done.stderr.strip()[:300]}")
    return done.stdout
