"""Compiling the Hopper kernels for sm_90a without a GPU, to check registers, spills and tensor-core instructions.

Each kernel module exports `variants()`: the configurations its host functions choose, as signatures. `build` compiles
one with the assembler that the compiler brings along and reads the machine code back.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OPCODES = ("HGMMA", "QGMMA", "IGMMA", "UTMALDG", "LDGSTS", "BAR", "LDL", "STL")


@dataclass(frozen=True)
class Variant:
    """One kernel configuration, as it is compiled.

    signature: argument name -> type ("*bf16", "i32", "fp32", "tensordesc<bf16[64,64],LAYOUT>", as Triton spells them;
    ":16" appended to an integer says that it is divisible by 16; pointers always are). Names in `constexprs` need no
    entry. `options`: further compiler options, such as `maxnreg`.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Built:
    """What the machine code says: registers a thread at launch, bytes of shared memory and of stack, opcode counts.

    `spills` counts loads and stores of local memory. `setmaxnreg` lists the register counts that warps switch to.
    """

    name: str
    registers: int
    stack: int
    shared: int
    counts: Mapping[str, int]
    setmaxnreg: tuple[int, ...]
    ptx: str
    sass: str

    @property
    def spills(self) -> int:
        return self.counts["LDL"] + self.counts["STL"]


def build(variant: Variant) -> Built:
    """Compiles `variant` for sm_90a; needs Triton, but no GPU. Raises what the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    signature: dict[str, str] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, name in enumerate(variant.fn.arg_names):
        kind = "constexpr" if name in variant.constexprs else variant.signature[name]
        if kind.startswith("*") or kind.endswith(":16"):
            attrs[(position,)] = [["tt.divisibility", 16]]
        signature[name] = kind.removesuffix(":16")
    source = GluonASTSource(fn=variant.fn, signature=signature, constexprs=dict(variant.constexprs), attrs=attrs)
    options = {"num_warps": variant.num_warps, **variant.options}
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        sass = _run(tools / "nvdisasm", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"no resource usage in {usage!r}")
    ptx = kernel.asm["ptx"]
    return Built(
        name=variant.name,
        registers=int(found[1]),
        stack=int(found[2]),
        shared=kernel.metadata.shared,
        counts={op: len(re.findall(rf"\b{op}\b", sass)) for op in OPCODES},
        setmaxnreg=tuple(int(count) for count in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx)),
        ptx=ptx,
        sass=sass,
    )


def _run(*command: Any) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout
