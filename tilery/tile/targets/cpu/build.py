"""Compiles generated C++ for this machine, once: a shared library in the user's cache folder, found again by content.

The key holds the source, what it includes, the flags, the compiler's version and the processor, so a change of any of
them builds anew. A library appears under its name in one step, so processes that build at once do no harm.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from tilery.tile.cache import root
from tilery.tile.errors import LoweringError

FLAGS = (
    "-std=c++17", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing", "-fwrapv",
    "-fopenmp-simd", "-pthread", "-fPIC", "-shared", "-w",
)  # fmt: skip
OPTIMISE = "-O3"
COMPILERS = ("g++", "c++", "clang++")
DISABLE = "TILERY_NO_COMPILER"
"""Set to 1 to run without a compiler."""
TIMEOUT_SECONDS = 300
_HERE = Path(__file__).parent


def cache_folder() -> Path:
    """Where built libraries are kept: `$TILERY_CACHE_DIR/cpu`, normally ~/.cache/tilery/cpu."""
    return root() / "cpu"


def compiler() -> str | None:
    """The compiler's path; None if there is none, or it is switched off."""
    return None if os.environ.get(DISABLE, "") not in ("", "0") else _find()


@functools.cache
def _find() -> str | None:
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


@functools.cache
def _machine(path: str) -> str:
    stat = os.stat(path)  # instead of asking for the version, which takes longer than all the rest of a cache hit
    version = f"{os.path.realpath(path)} {stat.st_size} {stat.st_mtime_ns}"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            keep = ("model name", "flags", "Features")
            return version + "".join(sorted({line for line in lines if line.startswith(keep)}))
    except OSError:
        return version + platform.processor()


@functools.cache
def _included() -> str:
    return (_HERE / "tile.h").read_text()


def build(text: str, name: str, optimise: str = OPTIMISE) -> ctypes.CDLL:
    """The library of a source text. Raises `LoweringError` if there is no compiler or it fails."""
    path = compiler()
    if path is None:
        raise LoweringError(f"no C++ compiler: none of {', '.join(COMPILERS)} is on the PATH, or {DISABLE} is set")
    flags = (*FLAGS, optimise)
    key = hashlib.sha256("\0".join((text, _included(), *flags, path, _machine(path))).encode()).hexdigest()[:24]
    target = cache_folder() / f"{name[:60]}-{key}.so"
    if not target.is_file():
        _compile(path, flags, text, target)
    return ctypes.CDLL(str(target))


def _compile(path: str, flags: tuple[str, ...], text: str, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=target.parent))
    except OSError as error:
        raise LoweringError(
            f"the cache folder {target.parent} is not writable: {error}; set TILERY_CACHE_DIR"
        ) from None
    try:
        source, library = folder / (target.stem + ".cpp"), folder / target.name
        source.write_text(text)
        run = subprocess.run(
            [path, *flags, f"-I{_HERE}", str(source), "-o", str(library)],
            capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False,
        )  # fmt: skip
        if run.returncode:
            errors = [line for line in run.stderr.splitlines() if "error" in line] or run.stderr.splitlines()
            raise LoweringError(
                f"{path} does not compile the generated source of {target.stem}: {' | '.join(errors[:3])}"
            )
        os.replace(source, target.with_suffix(".cpp"))  # beside the library, for readers
        os.replace(library, target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LoweringError(f"{path} did not finish: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _pool() -> ctypes.CDLL:
    library = build((_HERE / "pool.cpp").read_text(), "pool")
    library.tile_pool_resize.argtypes = [ctypes.c_int]
    return library


def pool() -> int:
    """The address of the function that shares programs among threads."""
    address = ctypes.cast(_pool().tile_pool_run, ctypes.c_void_p).value
    assert address is not None
    return address


def resize_pool(threads: int) -> None:
    """How many threads share a grid, the caller included."""
    _pool().tile_pool_resize(threads)
