"""The pages of docs/tile run: the Python of a page, from top to bottom, is one module."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tilery.tile import registry
from tilery.tile.ops import OPS

PAGES = sorted((Path(__file__).resolve().parents[2] / "docs" / "tile").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


def python_of(page: str) -> str:
    """The Python blocks of a page, each on the lines that it has there."""
    lines = [""] * (page.count("\n") + 1)
    for block in BLOCK.finditer(page):
        first = page.count("\n", 0, block.start(1))
        code = block.group(1).splitlines()
        lines[first : first + len(code)] = code
    return "\n".join(lines).rstrip() + "\n"


@pytest.fixture
def _as_it_was() -> Iterator[None]:
    """A page's operations and kernels are its own."""
    tables = [OPS, registry._KERNELS]
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before):
        table.clear()  # type: ignore[attr-defined]
        table.update(content)  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: p.stem)
@pytest.mark.usefixtures("_as_it_was")
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"docs_tile_{page.stem}.py"
    path.write_text(python_of(page.read_text()))  # a file, since kernels are read from their source
    torch.manual_seed(0)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_every_page_is_linked_and_links_to_what_exists() -> None:
    start = PAGES[0].parent / "README.md"
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)[^)]*\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
        assert page == start or f"({page.name})" in start.read_text(), page.name


def test_lines_stay_where_they_are() -> None:
    assert python_of("a\n```python\nx = 1\n```\n\n```bash\nls\n```\n```python\ny = 2\n```\n") == (
        "\n\nx = 1\n\n\n\n\n\n\ny = 2\n"
    )
