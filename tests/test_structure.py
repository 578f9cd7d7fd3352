"""The repository's shape, enforced: import directions, light imports, sizes, docstrings, no foreign addresses."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tilery"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

LAYERS = {
    "cli": 7,
    "server": 6,
    "proxy": 6,
    "engine": 5,
    "models": 4,
    "parallel": 3,
    "adapters": 3,
    "ops": 2,
    "tile": 1,
    "observe": 0,
}
"""A module may import from its own folder and from folders with a lower number."""

FACADE = {"tilery.engine.messages", "tilery.engine.llm"}
"""What `tilery/__init__.py` shows to the user."""

LIGHT = [
    "tilery",
    "tilery.cli.main",
    "tilery.engine.client",
    "tilery.engine.config",
    "tilery.engine.messages",
    "tilery.engine.output",
    "tilery.engine.tokenizer",
    "tilery.observe",
    "tilery.server",
]
"""Modules that must not load torch: the API process and the command line stay small and start fast."""

LONGEST = 600


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[tuple[int, str]]:
    """(line, module) of every import of this package in a file: inside functions and `if TYPE_CHECKING` too."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found: set[tuple[int, str]] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(node.lineno, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            if origin == "tilery":
                found |= {(node.lineno, f"tilery.{alias.name}") for alias in node.names}
            else:
                found.add((node.lineno, origin))
    return {(line, name) for line, name in found if name.split(".")[0] == "tilery"}


def layer(module: str) -> str | None:
    """The folder below `tilery`, or None for the package itself and the names that it exports."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else None


def violations(path: Path) -> list[str]:
    own = layer(module_name(path))
    wrong = []
    for line, name in sorted(imported(path)):
        other = layer(name)
        if own is None:
            allowed = name in FACADE
        else:
            allowed = other in (own, None) or LAYERS[str(other)] < LAYERS[own]
        if not allowed:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    return wrong


def test_folders_are_layers() -> None:
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in SOURCES if path.parent != PACKAGE}
    assert folders <= set(LAYERS), "a new folder needs a place in LAYERS and in ARCHITECTURE.md"


def test_imports_point_downwards() -> None:
    wrong = [violation for path in SOURCES for violation in violations(path)]
    assert not wrong, "\n".join(["imports must point downwards (see ARCHITECTURE.md):", *wrong])


@pytest.mark.parametrize(
    ("own", "text", "bad"),
    [
        ("engine/x.py", "import tilery.server.app", True),
        ("engine/x.py", "def f():\n    from tilery.server import run", True),
        ("engine/x.py", "if TYPE_CHECKING:\n    from ..cli import main", True),
        ("observe/x.py", "from tilery.ops import registry", True),
        ("server/x.py", "from tilery import proxy", True),
        ("engine/x.py", "from . import y\nfrom ..ops import registry\nimport tilery.observe.metrics", False),
        ("engine/x.py", "from tilery import __version__", False),
        ("cli/bench/x.py", "from tilery.cli.errors import CliError", False),
        ("__init__.py", "from tilery.ops import registry", True),
    ],
)
def test_the_import_check_itself(
    own: str, text: str, bad: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tilery" / own
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert bool(violations(path)) is bad


def exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("module", [module for module in LIGHT if exists(module)])
def test_light_modules_load_no_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "False", f"import {module} loads torch"


def test_no_file_is_too_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES + TESTS}
    long = [f"{path.relative_to(ROOT)}: {count}" for path, count in lengths.items() if count > LONGEST]
    assert not long, f"over {LONGEST} lines: {long}"


def test_every_module_says_what_it_is_for() -> None:
    """Packages, modules whose names do not begin with an underscore, and test files have a docstring."""
    silent = [
        str(path.relative_to(ROOT))
        for path in SOURCES + [path for path in TESTS if path.name.startswith("test_")]
        if (path.name == "__init__.py" or not path.name.startswith("_"))
        and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent


def test_every_folder_is_a_package() -> None:
    assert not [str(path) for path in SOURCES if not (path.parent / "__init__.py").is_file()]


OWN = re.compile(r"^(127\.\d+\.\d+\.\d+|0\.0\.0\.0|\[::1?\]|[\w-]*)$")
"""Loopback, and names without a dot, which are no public address."""
RESERVED = re.compile(r"(^|\.)(invalid|example|test|example\.(com|org|net))$")
"""Names that RFC 2606 keeps from ever being anybody's address."""


def foreign_hosts(text: str) -> list[str]:
    hosts = re.findall(r"\b(?:https?|wss?|tcp|ftp)://(\[[^\]]*\]|[\w.-]*)", text)
    return [host for host in hosts if not OWN.match(host) and not RESERVED.search(host)]


def test_tests_speak_to_nobody_else() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {host}"
        for path in TESTS
        if path != Path(__file__).resolve()
        for host in foreign_hosts(path.read_text(encoding="utf-8"))
    ]
    assert not found, "tests may name loopback and reserved example addresses only"


def test_the_address_check_itself() -> None:
    assert foreign_hosts("http://127.0.0.1:8000 https://a.example.com/x http://[::1]:1 tcp://127.0.0.1:*") == []
    assert foreign_hosts("see https://tilery.dev/x and http://10.0.0.1/") == ["tilery.dev", "10.0.0.1"]
