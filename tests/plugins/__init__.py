"""Puts plug-in packages where a Python finds them, without a network or a build backend."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

DEMO = Path(__file__).parent / "tilery_demo_plugin"


def install(package: Path, site: Path) -> None:
    """What `pip install --target site package` does for a package of one or more modules."""
    project = tomllib.loads((package / "pyproject.toml").read_text())
    about = project["project"]
    for module in project["tool"]["setuptools"]["py-modules"]:
        shutil.copy(package / f"{module}.py", site)
    groups = {
        group: [f"{name} = {value}" for name, value in entries.items()]
        for group, entries in about["entry-points"].items()
    }
    register(site, about["name"], about["version"], groups)


def register(site: Path, name: str, version: str, groups: dict[str, list[str]]) -> None:
    """The metadata of an installed distribution with entry points."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    sections = [f"[{group}]\n" + "\n".join(entries) + "\n" for group, entries in groups.items()]
    (folder / "entry_points.txt").write_text("\n".join(sections))
