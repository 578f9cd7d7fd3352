"""Operations, passes and targets from other packages, found by entry point. `docs/tile/plugins.md` teaches it.

| group                 | an entry point names                       |
|-----------------------|--------------------------------------------|
| `tilery.tile.ops`     | an `OpDef`, or a list of them              |
| `tilery.tile.passes`  | a `Pass`, or a list of them                |
| `tilery.tile.targets` | a `Target`, or a list of them              |

They are loaded once per process, when the first kernel is traced or lowered. One that fails is left out with a
`PluginWarning` that names its distribution. `TILERY_NO_PLUGINS=1` loads none; `TILERY_NO_PLUGINS=NAME,NAME` not those
of these distributions.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tilery.tile.errors import LoweringError, TileError
from tilery.tile.ir import Kernel
from tilery.tile.ops import OPS, OpDef
from tilery.tile.ops import register as register_op
from tilery.tile.printer import canonical

if TYPE_CHECKING:
    from tilery.tile.lowering import Lowered

DISABLE = "TILERY_NO_PLUGINS"
BUILT_IN_TARGETS = ("cpu", "triton", "ascend", "reference")
BUILT_IN_PASSES = ("simplify", "cse", "hoist", "dce", "widen", "bound", "padded")
NAME = re.compile(r"[a-z][a-z0-9_]*")


class PluginWarning(RuntimeWarning):
    """A plug-in was left out."""


@dataclass(frozen=True)
class Pass:
    """`function(kernel)` gives a kernel that means the same. It runs after every run of the pass `after`, or before
    every run of `before` (exactly one of them is given), when lowering for `targets` (empty: for all).
    """

    name: str
    function: Callable[[Kernel], Kernel]
    after: str = ""
    before: str = ""
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_name("pass", self.name)
        if bool(self.after) == bool(self.before):
            raise ValueError(f"the pass {self.name!r} needs a place: give one of after= and before=")


@dataclass(frozen=True)
class Target:
    """`emit(lowered)` gives the target's text. `like`: the built-in target whose stages and default schedule it takes:
    "cpu" ends with the stage "bound" (blocks of any size), "triton" with "padded" (powers of two and masks).
    """

    name: str
    emit: Callable[[Lowered], str]
    like: Literal["cpu", "triton"] = "cpu"
    about: str = ""

    def __post_init__(self) -> None:
        _check_name("target", self.name)
        if self.like not in ("cpu", "triton"):
            raise ValueError(f"the target {self.name!r} must be like 'cpu' or 'triton', got {self.like!r}")


def _check_name(what: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"a {what}'s name must be of small letters, digits and _, got {name!r}")


GROUPS: dict[str, type] = {"tilery.tile.ops": OpDef, "tilery.tile.passes": Pass, "tilery.tile.targets": Target}
Part = OpDef | Pass | Target


@dataclass(frozen=True)
class Plugin:
    """One entry point. `parts`: what it added; `error`: why it is left out."""

    group: str
    name: str
    value: str
    distribution: str
    version: str
    parts: tuple[Part, ...] = ()
    error: str = ""

    def __str__(self) -> str:
        return f"{self.name!r} of {self.distribution} {self.version} ({self.group}, {self.value})"


@dataclass
class Table:
    """What is loaded. `passes`: in an order in which each one's neighbour comes first; `origin`: the plug-in of each
    pass and target, by name."""

    plugins: list[Plugin] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)
    targets: dict[str, Target] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    done: bool = False


_TABLE = Table()
_LOCK = threading.RLock()


# --- finding ----------------------------------------------------------------------------------------------------


def switched_off(distribution: str) -> bool:
    """Whether `TILERY_NO_PLUGINS` says not to load the plug-ins of a distribution."""
    value = os.environ.get(DISABLE, "").strip()
    if value in ("", "0"):
        return False
    return value in ("1", "all") or _plain(distribution) in {_plain(n) for n in value.split(",")}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def found() -> list[tuple[importlib.metadata.EntryPoint, str, str]]:
    """(entry point, distribution, version) of every plug-in that is installed and not switched off, in a fixed order.

    Looks only into what `entry_points.txt` of the folders on `sys.path` mention: `importlib.metadata.entry_points`
    takes tens of milliseconds, which the first launch of a cached kernel does not have.
    """
    items: dict[tuple[str, str], tuple[importlib.metadata.EntryPoint, str, str]] = {}
    seen: set[str] = set()
    for path in _metadata_folders():
        try:
            distribution = importlib.metadata.PathDistribution(path)
            name, version = distribution.metadata["Name"], distribution.version
            entries = [e for e in distribution.entry_points if e.group in GROUPS]
            if not name:
                raise ValueError("METADATA has no Name")
        except Exception as error:  # half an installation
            warnings.warn(f"{path} cannot be read: {type(error).__name__}: {error}", PluginWarning, stacklevel=2)
            continue
        if _plain(name) in seen:  # the first on sys.path is the one that is imported
            continue
        seen.add(_plain(name))
        if not switched_off(name):
            items |= {(e.group, f"{name}:{e.name}"): (e, name, version) for e in entries}
    return [items[key] for key in sorted(items)]


def _metadata_folders() -> Iterator[Path]:
    for folder in dict.fromkeys(sys.path):
        try:
            with os.scandir(folder or ".") as entries:
                names = sorted(e.name for e in entries if e.name.endswith((".dist-info", ".egg-info")))
        except OSError:
            continue
        for name in names:
            path = os.path.join(folder, name)
            try:
                with open(os.path.join(path, "entry_points.txt"), "rb") as file:
                    mentioned = b"[tilery.tile." in file.read()
            except OSError:
                continue
            if mentioned:
                yield Path(path)


@functools.cache
def state() -> str:
    """What compiled kernels depend on: the plug-ins, their versions, and names, sizes and times of their modules'
    files, so that a plug-in under development is compiled anew. Imports none of them."""
    parts = []
    for entry, distribution, version in found():
        parts.append(f"{entry.group} {entry.name} {entry.value} {distribution} {version}")
        try:
            spec = importlib.util.find_spec(entry.module.partition(".")[0])
        except (ImportError, ValueError):
            continue
        for root in (spec and spec.submodule_search_locations) or [spec.origin if spec and spec.origin else ""]:
            files = sorted(Path(root).rglob("*.py")) if os.path.isdir(root) else [Path(root)]
            parts += [f"{f} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files if f.is_file()]
    return "; ".join(parts)


# --- loading ----------------------------------------------------------------------------------------------------


def load() -> Table:
    """Loads all plug-ins, once. Warns (`PluginWarning`) about each one that it leaves out; raises nothing itself."""
    if _TABLE.done:
        return _TABLE
    with _LOCK:
        if not _TABLE.done:
            _TABLE.done = True  # first, since a plug-in may trace a kernel while it is imported
            loaded = [_parts(*item) for item in found()]
            for plugin in _placed(loaded):
                _TABLE.plugins.append(_add(plugin))
            for plugin in _TABLE.plugins:
                if plugin.error:
                    warnings.warn(_complaint(plugin), PluginWarning, stacklevel=3)
    return _TABLE


def _complaint(plugin: Plugin) -> str:
    return (
        f"the plug-in {plugin} is left out: {plugin.error}. Repair or uninstall it, or set "
        f"{DISABLE}={plugin.distribution} to stop loading it"
    )


def _parts(entry: importlib.metadata.EntryPoint, distribution: str, version: str) -> Plugin:
    plugin = Plugin(entry.group, entry.name, entry.value, distribution, version)
    try:
        given = entry.load()
    except Exception as error:  # whatever its import raises
        return _without(plugin, f"{type(error).__name__}: {error}")
    parts = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    kind = GROUPS[entry.group]
    for part in parts:
        if not isinstance(part, kind):
            return _without(plugin, f"expected {kind.__name__} or a list of them, got {type(part).__name__}")
    names = [part.name for part in parts]
    if len(set(names)) != len(names):
        return _without(plugin, f"two of its parts have one name: {', '.join(names)}")
    return Plugin(entry.group, entry.name, entry.value, distribution, version, parts)


def _without(plugin: Plugin, error: str) -> Plugin:
    return Plugin(plugin.group, plugin.name, plugin.value, plugin.distribution, plugin.version, (), error)


def _placed(plugins: Sequence[Plugin]) -> Iterator[Plugin]:
    """The plug-ins in an order in which a pass comes after the plug-in that has its neighbour."""
    waiting = list(plugins)
    known = {*BUILT_IN_PASSES, *(p.name for p in _TABLE.passes)}
    while waiting:
        ready = [p for p in waiting if all(a in known for a in _neighbours(p))]
        for plugin in ready:
            known |= {part.name for part in plugin.parts if isinstance(part, Pass)}
            yield plugin
        waiting = [p for p in waiting if p not in ready]
        if not ready:
            for plugin in waiting:
                name = next(a for a in _neighbours(plugin) if a not in known)
                yield _without(plugin, f"its pass stands beside {name!r}, which is none of {', '.join(sorted(known))}")
            return


def _neighbours(plugin: Plugin) -> list[str]:
    own: set[str] = set()
    out = []
    for part in plugin.parts:
        if isinstance(part, Pass):
            if (part.after or part.before) not in own:
                out.append(part.after or part.before)
            own.add(part.name)
    return out


def _add(plugin: Plugin) -> Plugin:
    """Puts a plug-in's parts into the tables: all of them, or none."""
    try:
        for part in plugin.parts:
            _check_free(part)
    except ValueError as error:
        return _without(plugin, str(error))
    for part in plugin.parts:
        if isinstance(part, OpDef):
            if OPS.get(part.name) is not part:  # its module may have registered it
                register_op(part)
        elif isinstance(part, Pass):
            _TABLE.passes.append(part)
        else:
            _TABLE.targets[part.name] = part
        _TABLE.origin[part.name] = str(plugin)
    return plugin


def _check_free(part: Part) -> None:
    if isinstance(part, OpDef):
        if OPS.get(part.name, part) is not part:
            raise ValueError(f"the operation {part.name!r} exists already")
    elif isinstance(part, Pass):
        if part.name in BUILT_IN_PASSES or part.name == "trace" or part.name in {p.name for p in _TABLE.passes}:
            raise ValueError(f"the pass {part.name!r} exists already")
    elif part.name in BUILT_IN_TARGETS or part.name in _TABLE.targets or part.name in ("ptx", "sass"):
        raise ValueError(f"the target {part.name!r} exists already")


# --- lowering ---------------------------------------------------------------------------------------------------

Step = tuple[str, Callable[[Kernel], Kernel]]


def arrange(steps: Sequence[Step], target: str) -> list[Step]:
    """`steps` with the plug-ins' passes for a target beside the passes they name."""
    out = list(steps)
    for extra in load().passes:
        if extra.targets and target not in extra.targets:
            continue
        own: Step = (extra.name, functools.partial(_run, extra))
        placed: list[Step] = []
        for step in out:
            if step[0] == extra.before:
                placed += [own, step]
            elif step[0] == extra.after:
                placed += [step, own]
            else:
                placed.append(step)
        out = placed
    return out


def _run(extra: Pass, kernel: Kernel) -> Kernel:
    """A plug-in's pass. Raises `LoweringError` with its name and distribution for whatever goes wrong in it."""
    try:
        made = extra.function(kernel)
        if not isinstance(made, Kernel):
            raise TypeError(f"it gave {type(made).__name__} where a Kernel was expected")
        canonical(made)
    except Exception as error:
        told = error.message if isinstance(error, TileError) else f"{type(error).__name__}: {error}"
        loc = error.loc if isinstance(error, TileError) else None
        raise LoweringError(
            f"{kernel.name}: the pass {extra.name!r}, plug-in {_TABLE.origin[extra.name]}, failed: {told}", loc
        ) from error
    return made


def emit(target: Target, lowered: Lowered) -> str:
    """A plug-in target's text. Raises `LoweringError` with its distribution for whatever goes wrong in it."""
    try:
        text = target.emit(lowered)
        if not isinstance(text, str):
            raise TypeError(f"it gave {type(text).__name__} where text was expected")
    except LoweringError:
        raise
    except Exception as error:
        raise LoweringError(
            f"the target {target.name!r}, plug-in {_TABLE.origin[target.name]}, failed on "
            f"{lowered.kernel.name!r}: {type(error).__name__}: {error}"
        ) from error
    return text


def describe() -> list[dict[str, Any]]:
    """One record per plug-in, for tables: distribution, version, kind, what it adds, state."""
    rows = []
    for plugin in load().plugins:
        names = ", ".join(part.name for part in plugin.parts)
        rows.append(
            {
                "distribution": plugin.distribution, "version": plugin.version, "adds": names or plugin.name,
                "kind": plugin.group.rpartition(".")[2], "state": plugin.error or "loaded",
            }
        )  # fmt: skip
    return rows
