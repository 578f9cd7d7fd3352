"""The launch itself: a small C extension, built once, that calls the CUDA driver for a kernel of any signature.

Triton generates and compiles one launcher per signature and looks up every pointer; this one takes addresses as
integers and a string that says what each argument is. It needs the C compiler and headers that Triton needs anyway.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

from tilery.tile.cache import root
from tilery.tile.errors import LaunchError

SOURCE = Path(__file__).with_name("launch.c")
FLAGS = ("-O2", "-shared", "-fPIC", "-ldl")


def cache_folder() -> Path:
    """Where binaries are kept, beside all that is compiled. With the cache off it is a folder of this process, because
    Triton reads functions from files.
    """
    off = os.environ.get("TILERY_CACHE_DIR") == ""
    return (Path(_own_folder()) if off else root()) / "triton"


@functools.cache
def _own_folder() -> str:
    folder = tempfile.mkdtemp(prefix="tilery-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def load() -> ModuleType:
    """The extension, built if need be. Raises `LaunchError` with the compiler's reason."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX") or ".so"
    key = hashlib.sha256(SOURCE.read_bytes() + f"{suffix} {FLAGS}".encode()).hexdigest()[:24]
    path = cache_folder() / f"launch-{key}{suffix}"
    if not path.is_file():
        _compile(path)
    loader = importlib.machinery.ExtensionFileLoader("tilery_launch", str(path))
    spec = importlib.util.spec_from_file_location("tilery_launch", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _compile(path: Path) -> None:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if compiler is None:
        raise LaunchError("no C compiler (gcc or clang) found; Triton kernels need one once: install it or set CC")
    found = importlib.util.find_spec("triton")
    if found is None or not found.submodule_search_locations:
        raise LaunchError("the package triton is not installed; install triton to run on a GPU, or use the CPU target")
    headers = Path(found.submodule_search_locations[0]) / "backends" / "nvidia" / "include"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / "launch.so"
        include = (f"-I{sysconfig.get_path('include')}", f"-I{headers}")
        command = [compiler, str(SOURCE), "-o", str(built), *include, *FLAGS]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        if done.returncode:
            raise LaunchError(f"{compiler} cannot build the launcher: {done.stderr.strip()[:500]}")
        os.replace(built, path)  # atomic: a process building beside this one does no harm
