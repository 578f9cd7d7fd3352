"""Compiled kernels on disk: a process that finds an entry launches without tracing or lowering.

An entry is one JSON file named by the hash of everything its content depends on: the kernel's source and that of the
functions it calls, closure and static values, schedule, target, the versions of this package, torch and triton. A file
is written aside and renamed, so that processes never see half of one; a file that cannot be read counts as absent and
is written again. `TILERY_CACHE_DIR` names the folder (default: ~/.cache/tilery); an empty value turns these entries off
(compiled code itself is then still kept in the default folder, found by its source).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import tempfile
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from tilery.tile import plugins

FORMAT = 1
_PACKAGE = Path(__file__).resolve().parent


def root() -> Path:
    """The folder of everything compiled: `TILERY_CACHE_DIR`, normally ~/.cache/tilery (or under XDG_CACHE_HOME)."""
    chosen = os.environ.get("TILERY_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tilery"


def folder() -> Path | None:
    """Where entries lie; None: the cache is off."""
    return None if os.environ.get("TILERY_CACHE_DIR") == "" else root() / "kernels"


def digest(*parts: Any) -> str:
    """A hash of values by their text."""
    text = json.dumps([str(part) for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read(key: str) -> dict[str, Any] | None:
    """The entry of a key, or None if there is none that can be read."""
    place = folder()
    if place is None:
        return None
    try:
        entry = json.loads((place / f"{key}.json").read_bytes())
        return entry["content"] if entry["key"] == key and isinstance(entry["content"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(key: str, content: dict[str, Any]) -> None:
    """Stores an entry; a folder that cannot be written costs the next process time, not this one its result."""
    place = folder()
    if place is None:
        return
    try:
        place.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=place, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            json.dump({"key": key, "content": content}, file)
        os.replace(name, place / f"{key}.json")
    except OSError:
        return


@functools.cache
def versions() -> str:
    """What compiled code depends on beside the kernel: versions, this package's own sources, plug-ins."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return f"{FORMAT} torch {torch.__version__} triton {triton} {_sources()} {plugins.state()}"


def _sources() -> str:
    """The state of the tile package's files: names, sizes and times, not contents, which would cost milliseconds."""
    state = []
    pending = [str(_PACKAGE)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.name.endswith((".py", ".h", ".cpp")):
                    stat = entry.stat()
                    state.append((entry.path, stat.st_size, stat.st_mtime_ns))
                elif entry.is_dir() and not entry.name.startswith("_"):
                    pending.append(entry.path)
    return digest(*sorted(state))


def fingerprint(function: Callable[..., Any]) -> str:
    """A hash of a function's source, and of everything it refers to: helper functions (their sources too), closure
    values, globals. A value without a stable text counts by its type."""
    parts: list[str] = []
    _describe(function, parts, set())
    return digest(*parts)


def _describe(value: Any, parts: list[str], seen: set[int]) -> None:
    if isinstance(value, types.FunctionType):
        if id(value) in seen:
            return
        seen.add(id(value))
        code = value.__code__
        if code.co_filename.startswith(str(_PACKAGE) + os.sep):
            parts.append(f"own {value.__module__}.{value.__qualname__}")  # `versions` covers these
            return
        try:
            parts.append(inspect.getsource(value))
        except (OSError, TypeError):
            parts.append(code.co_code.hex() + repr(code.co_consts))
        parts.append(repr(value.__annotations__) if value.__annotations__ else "")
        parts.append(_text(value.__defaults__))
        for name, cell in zip(code.co_freevars, value.__closure__ or ()):
            parts.append(name)
            try:
                _describe(cell.cell_contents, parts, seen)
            except ValueError:  # a cell not yet filled
                parts.append("unbound")
        names = _names(code)
        for name in names:
            if name in value.__globals__:
                parts.append(name)
                _reference(value.__globals__[name], names, parts, seen)
        return
    inner = getattr(value, "function", None) or getattr(value, "__wrapped__", None)
    if isinstance(inner, types.FunctionType):
        _describe(inner, parts, seen)
        return
    if isinstance(value, (list, tuple)):
        for item in value:
            _describe(item, parts, seen)
        return
    parts.append(_text(value))


def _reference(value: Any, attributes: Iterable[str], parts: list[str], seen: set[int]) -> None:
    """A global and, for a module, those of its attributes that the code names."""
    if isinstance(value, types.ModuleType):
        if value.__name__.startswith("tilery.tile") or value.__name__.split(".")[0] in ("torch", "numpy", "math"):
            parts.append(value.__name__)
            return
        for name in attributes:
            if hasattr(value, name):
                parts.append(f"{value.__name__}.{name}")
                _describe(getattr(value, name), parts, seen)
        return
    _describe(value, parts, seen)


def _names(code: types.CodeType) -> dict[str, None]:
    """Names that code looks up, nested code included: globals and attributes alike."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(_names(constant))
    return names


def _text(value: Any) -> str:
    """A text that is the same in every process."""
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text
