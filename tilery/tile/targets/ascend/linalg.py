"""Lowers texts of the Ascend target to linalg with triton-ascend: a compile check, in an environment of its own.

    python -m tilery.tile.targets.ascend.linalg                       every golden text
    python -m tilery.tile.targets.ascend.linalg FILE... --out FOLDER  these, and keeps the linalg of each

triton-ascend replaces the package triton, so it cannot share an environment with the Triton target. The command stops
before the binary, which needs CANN and, to run, an NPU. Written for triton-ascend 3.2.0.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tilery.tile.targets.ascend.emit import SIGNATURE

GOLDEN = Path(__file__).resolve().parents[4] / "tests" / "tile" / "golden" / "ascend"
DEVICE = "Ascend910B2"
MISSING = (
    "triton-ascend is not installed in this environment, so nothing was lowered. It replaces the package triton, so "
    "give it an environment of its own:\n"
    "    python3.11 -m venv ascend\n"
    "    ascend/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu\n"
    "    ascend/bin/pip install 'numpy<2.4' triton-ascend==3.2.0 msgspec pybind11 attrs scipy decorator pyyaml\n"
    "    ascend/bin/python -m tilery.tile.targets.ascend.linalg"
)


def installed() -> str | None:
    """The version of triton-ascend in this environment."""
    try:
        return importlib.metadata.version("triton-ascend")
    except importlib.metadata.PackageNotFoundError:
        return None


def signature_of(text: str) -> dict[str, str]:
    """Triton's types of a text's parameters. Raises `ValueError` for a text that does not say them."""
    for line in text.splitlines():
        if line.startswith(SIGNATURE):
            return dict(json.loads(line.removeprefix(SIGNATURE)))
    raise ValueError(f"no line begins with {SIGNATURE!r}: not a text of the Ascend target")


def to_linalg(text: str, folder: Path, device: str = DEVICE) -> str:
    """The linalg of one text, by triton-ascend's own passes; `folder` takes the module that Triton reads."""
    import triton
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource, make_backend

    signature = signature_of(text)
    name = text.rpartition("\ndef ")[2].partition("(")[0]
    path = folder / f"{name}_ascend.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name)
    target = GPUTarget("npu", device, 0)
    backend: Any = make_backend(target)
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(function, signature)
    made: Any = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options)
    metadata = {"hash": triton.__version__, "target": target, **options.__dict__}
    for stage in ("ttir", "ttadapter"):
        made = stages[stage](made, metadata)
    return str(made)


def main(arguments: list[str] | None = None) -> int:
    """0 if every text was lowered, 1 if some were not, 2 without triton-ascend."""
    parser = argparse.ArgumentParser(prog="python -m tilery.tile.targets.ascend.linalg", description=__doc__)
    parser.add_argument("texts", nargs="*", type=Path, help=f"files; all of {GOLDEN.name}'s golden texts by default")
    parser.add_argument("--out", type=Path, help="a folder for the linalg of each")
    options = parser.parse_args(arguments)
    version = installed()
    if version is None:
        print(MISSING, file=sys.stderr)
        return 2
    texts = options.texts or sorted(GOLDEN.glob("*.txt"))
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for path in texts:
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    result = to_linalg(path.read_text(), Path(folder))
            except Exception as error:
                failed += 1
                print(f"{path.stem}: {type(error).__name__}: {_reason(error)}", flush=True)
                continue
            print(f"{path.stem}: ok, {len(result.splitlines())} lines of linalg", flush=True)
            if options.out is not None:
                options.out.mkdir(parents=True, exist_ok=True)
                (options.out / f"{path.stem}.mlir").write_text(result)
    print(f"{len(texts) - failed} of {len(texts)} texts lowered to linalg by triton-ascend {version}")
    return 1 if failed else 0


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "error:" in line]
    return (told or lines or ["no message"])[0][:300]


if __name__ == "__main__":
    sys.exit(main())
