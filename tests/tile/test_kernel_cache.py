"""The cache on disk: what a key depends on, that a hit traces nothing, and entries that cannot be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tilery import tile
from tilery.tile import Dim, Tensor, cache, f32
from tilery.tile.schedule import Schedule

T = Dim("T")
ROOT = Path(__file__).resolve().parent.parent.parent
SCALE = 2.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TILERY_CACHE_DIR", str(tmp_path))
    return tmp_path


def helper(v):
    return v * SCALE


def make(extra: float = 1.0, schedule: Schedule | None = None):
    @tile.kernel(schedule=schedule)
    def cached(x: Tensor[T, f32]):
        y = tile.empty([T], f32)
        for t in tile.parallel(tile.blocks(T, "row")):
            y[t] = helper(x[t]) + extra
        return y

    return cached


def entries(folder: Path) -> set[str]:
    return {p.name for p in (folder / "kernels").glob("*.json")}


def no_trace(kernel) -> None:
    def refuse(key):
        raise AssertionError("the kernel was traced")

    kernel.trace = refuse


def test_a_hit_traces_nothing_and_every_input_is_in_the_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(4.0)
    assert make()(x).tolist() == [1, 3, 5, 7]
    known = entries(folder)
    assert len(known) == 2
    again = make()
    no_trace(again)
    assert again(x).tolist() == [1, 3, 5, 7]
    assert again(torch.arange(3.0)).tolist() == [1, 3, 5]  # the same power of two
    assert entries(folder) == known
    assert make(2.0)(x).tolist() == [2, 4, 6, 8]  # a closure value
    assert len(entries(folder)) == 4
    assert make(schedule=Schedule({"row": 1}))(x).tolist() == [1, 3, 5, 7]
    assert len(entries(folder)) == 5
    monkeypatch.setitem(globals(), "SCALE", 3.0)  # a global of a helper
    assert make()(x).tolist() == [1, 4, 7, 10]
    assert len(entries(folder)) == 7


def test_bad_entries_are_replaced(folder: Path) -> None:
    x = torch.arange(4.0)
    make()(x)
    good = {p: p.read_bytes() for p in (folder / "kernels").glob("*.json")}
    for spoil in (b"", b"{", b'{"key": "x", "content": {}}', b"[1]"):
        for path in good:
            path.write_bytes(spoil)
        assert make()(x).tolist() == [1, 3, 5, 7]
        assert {p: p.read_bytes() for p in good} == good
    for path in good:  # well-formed, but not what was written
        entry = json.loads(good[path])
        entry["content"] = {"surprise": 1}
        path.write_text(json.dumps(entry))
    assert make()(x).tolist() == [1, 3, 5, 7]
    assert {p: p.read_bytes() for p in good} == good


def test_a_folder_that_cannot_be_written_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(cache, "folder", lambda: blocked / "kernels")
    cache.write("k", {})
    assert cache.read("k") is None
    assert make()(torch.arange(4.0)).tolist() == [1, 3, 5, 7]


def test_an_empty_name_turns_entries_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILERY_CACHE_DIR", "")
    assert cache.folder() is None
    cache.write("k", {"a": 1})
    assert cache.read("k") is None
    monkeypatch.delenv("TILERY_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.folder() == Path.home() / ".cache" / "tilery" / "kernels"


def test_processes_side_by_side(folder: Path) -> None:
    code = "import torch\nfrom tests.tile.runtime_kernels import clear\nx = torch.ones(3)\nclear(x)\nprint(x.tolist())"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE) for _ in range(3)]
    assert [p.communicate(timeout=120)[0] for p in started] == [b"[0.0, 0.0, 0.0]\n"] * 3
    assert not list((folder / "kernels").glob("*.tmp"))


def test_fingerprints_do_not_depend_on_the_process() -> None:
    code = "from tests.tile.runtime_kernels import norm, scale\nfrom tilery.tile import cache\n" \
           "print(*(cache.fingerprint(k.function) for k in (norm, scale)))"  # fmt: skip
    found = set()
    for seed in ("1", "2"):
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        found.add(subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, check=True).stdout)
    assert len(found) == 1


def test_an_interface_survives_json() -> None:
    from tests.tile.runtime_kernels import scale
    from tilery.tile.plans import Interface

    bound = scale.signature.bind((torch.ones(2), None, 1), {})
    interface = Interface.of(scale.trace(scale.signature.specialise(bound)))
    record = json.loads(json.dumps(interface.to_record()))
    assert Interface.from_record(record, scale.signature) == interface
