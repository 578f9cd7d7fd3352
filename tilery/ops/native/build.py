"""Compiles kernels.cpp for this machine, once: a shared library in the user's cache folder, found again by content.

The key holds the source, the compiler and its flags, and the processor, so an update of any of them builds anew.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-pthread", "-fPIC", "-shared")
COMPILERS = ("g++", "c++", "clang++")
TIMEOUT_SECONDS = 120
DISABLE = "TILERY_NO_NATIVE"
"""Set to 1 to run without the native kernels (they are optional; results agree to rounding)."""


class BuildError(Exception):
    """Why there are no native kernels here."""


def cache_folder() -> Path:
    """Where built libraries are kept: `$XDG_CACHE_HOME/tilery`, normally ~/.cache/tilery."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tilery"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            keep = ("model name", "flags", "Features")
            return "".join(sorted({line for line in lines if line.startswith(keep)}))
    except OSError:
        return platform.processor()


@functools.cache
def load() -> ctypes.CDLL:
    """The library, built if need be. Raises `BuildError` with the reason and what would help."""
    if os.environ.get(DISABLE, "") not in ("", "0"):
        raise BuildError(f"switched off by {DISABLE}")
    if sys.platform != "linux":
        raise BuildError(f"built on Linux only, this is {sys.platform}")
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise BuildError(
            f"no C++ compiler found ({', '.join(COMPILERS)}); install one for a several times faster decode"
        )
    key = hashlib.sha256()
    for part in (SOURCE.read_bytes(), repr((compiler, FLAGS, _processor())).encode()):
        key.update(part)
    target = cache_folder() / f"kernels-{key.hexdigest()[:24]}.so"
    if not target.is_file():
        _compile(compiler, target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise BuildError(f"the built library does not load: {error}") from None


def _compile(compiler: str, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, suffix=".so")
    except OSError as error:
        raise BuildError(f"the cache folder {target.parent} is not writable: {error}") from None
    os.close(handle)
    try:
        run = subprocess.run(
            [compiler, *FLAGS, str(SOURCE), "-o", name],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        if run.returncode:
            raise BuildError(f"{compiler} failed: {run.stderr.strip().splitlines()[:1]}")
        os.replace(name, target)  # atomic: a process building beside this one does no harm
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler} did not finish: {error}") from None
    finally:
        Path(name).unlink(missing_ok=True)
