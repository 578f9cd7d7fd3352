"""The text of every kernel of the operators, kept: shows what a change of the emitter or of a kernel does to it.

    python -m tilery.tile.targets.ascend.golden           writes the texts and the table of docs/tile/ascend.md
    python -m tilery.tile.targets.ascend.golden --check   fails if one of them is out of date
    python -m tilery.tile.targets.ascend.golden --run     runs every expressed case in plain Triton's interpreter

A kernel's text is that of the first of its cases that the target expresses. At the sizes of its benchmarks a kernel is
lowered too, and the table says what that takes of a core's memory.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tilery.tile import registry
from tilery.tile.binaries import arguments_of
from tilery.tile.errors import LoweringError
from tilery.tile.lowering import Lowered, lower
from tilery.tile.targets.ascend.capabilities import A2, KIB
from tilery.tile.targets.ascend.emit import emit_lowered, run_interpreted
from tilery.tile.targets.ascend.linalg import GOLDEN
from tilery.tile.targets.ascend.memory import footprint
from tilery.tile.targets.triton.plan import spec_of

if TYPE_CHECKING:
    from tilery.tile.kernel import Kernel

PACKAGE = "tilery.ops.kernels"
PAGE = Path(__file__).resolve().parents[4] / "docs" / "tile" / "ascend.md"
BEGIN, END = "<!-- kernels: written by tilery.tile.targets.ascend.golden -->", "<!-- end of kernels -->"


@dataclass(frozen=True)
class Result:
    """One kernel: `text` of `case`, why other cases are not expressed (reason: cases), and KiB of the unified buffer at
    the sizes of its benchmarks (None: not expressed).
    """

    kernel: str
    module: str
    text: str
    case: str
    expressed: tuple[str, ...]
    refused: dict[str, tuple[str, ...]]
    benches: dict[str, int | None]


def lowered(kernel: Kernel, case: str) -> tuple[Lowered, str]:
    """A case lowered for "ascend", and its text. Raises `LoweringError`."""
    arguments = kernel.signature.bind((), kernel.arguments(case))
    key, env = kernel.specialise(arguments)
    low = lower(kernel.trace(key), env, "ascend", kernel.schedule_for(env, "ascend"))
    return low, emit_lowered(low, spec_of(low.kernel, arguments, env)).source


def differences(kernel: Kernel, case: str) -> list[str]:
    """Runs a case's text in plain Triton's interpreter: which tensors differ from the reference by more than they may.
    Raises `LoweringError` for a case that is not expressed, `VerifyError` for a text that does not run."""
    from tilery.tile.verify import clone, tolerances

    assert kernel.reference is not None
    low, _ = lowered(kernel, case)
    arguments = kernel.signature.bind((), kernel.arguments(case))
    _, env = kernel.specialise(arguments)
    ours, theirs = clone(arguments), clone(arguments)
    got = run_interpreted(low, ours, env)
    wanted = kernel.reference(**theirs)
    wanted = () if wanted is None else wanted if isinstance(wanted, tuple) else (wanted,)
    pairs = [(v.name, a, b) for v, a, b in zip(low.kernel.returns, got, wanted, strict=True)]
    pairs += [(p.value.name, ours[p.value.name], theirs[p.value.name]) for p in low.kernel.params if p.inout]
    limits = tolerances(kernel, [b.dtype for _, _, b in pairs])
    return [name for limit, (name, a, b) in zip(limits, pairs, strict=True) if not limit.compare(a, b).ok]


def result_of(kernel: Kernel) -> Result:
    """Every case of a kernel, tried."""
    text = first = ""
    expressed: list[str] = []
    refused: dict[str, tuple[str, ...]] = {}
    for case in kernel.cases:
        try:
            source = lowered(kernel, case)[1]
        except LoweringError as error:
            line = error.loc.text() if error.loc is not None else ""
            reason = f"{error.message.removeprefix('ascend: ')}" + (f" (`{line}`)" if line else "")
            refused[reason] = (*refused.get(reason, ()), case)
            continue
        expressed.append(case)
        if not text:
            text, first = source, case
    module = kernel.full_name.removeprefix(PACKAGE + ".").rpartition(".")[0]
    benches = {name: unified_kib(kernel, name) for name in kernel.benches} if text else {}
    return Result(kernel.name, module, text, first, tuple(expressed), refused, benches)


def unified_kib(kernel: Kernel, bench: str) -> int | None:
    """KiB of the unified buffer that a kernel takes at a benchmark's sizes; None if it is not expressed there."""
    arguments = arguments_of(kernel, bench)
    key, env = kernel.specialise(arguments)
    try:
        low = lower(kernel.trace(key), env, "ascend", kernel.schedule_for(env, "ascend"))
    except LoweringError:
        return None
    return -(-footprint(low.kernel, A2).unified // KIB)


def results() -> Iterator[Result]:
    """All kernels of the operators, by module and name."""
    registry.discover(PACKAGE)
    for kernel in registry.kernels(PACKAGE + "."):
        yield result_of(kernel)


def table(found: list[Result]) -> str:
    """Markdown: which kernels are expressed, and why the others are not."""
    whole = sum(not r.refused for r in found)
    part = sum(bool(r.refused and r.text) for r in found)
    rest = len(found) - whole - part
    lines = [
        f"{len(found)} kernels: {whole} are expressed, {part} in some of their formats, {rest} not.",
        "",
        "| kernel | module | expressed | KiB at the benchmarks' sizes | what is not expressed, and why |",
        "|---|---|---|---|---|",
    ]
    for r in found:
        state = "no" if not r.text else "yes" if not r.refused else "partly"
        why = "; ".join(f"{', '.join(cases)}: {reason}" for reason, cases in r.refused.items())
        if not r.text and len(r.refused) == 1:
            why = next(iter(r.refused))
        sizes = ", ".join(f"{name}: {'no' if need is None else need}" for name, need in r.benches.items())
        lines.append(f"| `{r.kernel}` | {r.module} | {state} | {sizes} | {_cell(why)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def page(text: str, found: list[Result]) -> str:
    """The page with its table brought up to date. Raises `ValueError` if it has lost the marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} needs the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{after}"


def stale(found: list[Result]) -> list[str]:
    """What is out of date: files by name."""
    wanted = {f"{r.kernel}.txt": r.text for r in found if r.text}
    wrong = [name for name, text in wanted.items() if not _same(GOLDEN / name, text)]
    wrong += [path.name for path in GOLDEN.glob("*.txt") if path.name not in wanted]
    written = PAGE.read_text()
    return wrong + ([PAGE.name] if page(written, found) != written else [])


def _same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text() == text


def write(found: list[Result]) -> None:
    """Writes the texts, removes those of kernels that are gone, and the page's table."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    wanted = {f"{r.kernel}.txt": r.text for r in found if r.text}
    for path in GOLDEN.glob("*.txt"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (GOLDEN / name).write_text(text)
    PAGE.write_text(page(PAGE.read_text(), found))


def main(arguments: list[str]) -> int:
    found = list(results())
    if "--run" in arguments:
        cases = [(registry.find(r.kernel, PACKAGE + "."), case) for r in found for case in r.expressed]
        wrong = [f"{kernel.name}, {case}: {name}" for kernel, case in cases for name in differences(kernel, case)]
        print("\n".join([*wrong, f"{len(cases)} cases run, {len(wrong)} tensors differ from the reference"]))
        return 1 if wrong else 0
    if "--check" in arguments:
        wrong = stale(found)
        for name in wrong:
            print(f"out of date: {name}; run python -m tilery.tile.targets.ascend.golden", file=sys.stderr)
        return 1 if wrong else 0
    write(found)
    print(f"{sum(bool(r.text) for r in found)} texts of {len(found)} kernels in {GOLDEN}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
