"""The C++ kernels: where there are none, operators say why and torch runs; results do not depend on the batch."""

import subprocess
import sys

import pytest
import torch

from tilery.ops import native, registry
from tilery.ops.native import build

NATIVE = registry.select().chosen["linear"] == "native"
needs_native = pytest.mark.skipif(not NATIVE, reason="no C++ compiler here, or the CPU multiplies bf16 natively")


@pytest.fixture(autouse=True)
def _fresh():
    build.load.cache_clear()
    yield
    build.load.cache_clear()


def reason():
    (info,) = [info for info in registry.list_operators() if info.name == "mla_decode"]
    (row,) = [row for row in info.implementations if row.name == "native"]
    return row.available, row.reason


def test_switched_off(monkeypatch):
    monkeypatch.setenv(build.DISABLE, "1")
    with pytest.raises(build.BuildError, match="switched off by TILERY_NO_NATIVE"):
        build.load()


@needs_native
def test_without_a_compiler_torch_runs(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert reason() == (
        False,
        "no C++ compiler found (g++, c++, clang++); install one for a several times faster decode",
    )
    assert registry.select().chosen["mla_decode"] == "batched-gather"


@needs_native
def test_a_failing_compiler_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", ("--no-such-flag",))
    available, text = reason()
    assert not available
    assert "failed" in text
    assert "no-such-flag" in text
    assert list((tmp_path / "tilery").iterdir()) == []


@needs_native
def test_an_unwritable_cache_is_reported(monkeypatch, tmp_path):
    (tmp_path / "tilery").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    available, text = reason()
    assert not available
    assert "is not writable" in text


@needs_native
def test_built_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load()
    (library,) = (tmp_path / "tilery").iterdir()
    stamp = library.stat().st_mtime_ns
    build.load.cache_clear()
    build.load()
    assert library.stat().st_mtime_ns == stamp


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_does_not_feel_its_batch(dtype):
    """Bit for bit: alone, in company, with one thread or two."""
    ops = registry.select()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(7, 200, generator=draw)
    weight = torch.randn(300, 200, generator=draw).to(dtype)
    gate_up, down = torch.randn(8, 96, 200, generator=draw).to(dtype), torch.randn(200, 384, generator=draw).to(dtype)
    weights, ids = ops.route_grouped(torch.randn(7, 8, generator=draw), torch.zeros(8), 3, 2, 2, True, 2.5)
    cache = torch.randn(256, 192, generator=draw).to(dtype)
    q, slots = torch.randn(7, 5, 192, generator=draw), torch.randint(0, 256, (7, 90), generator=draw)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            native.set_threads(ops, threads)
            whole = (
                ops.linear(x, weight),
                ops.experts_swiglu(x, weights, ids, gate_up, down),
                ops.mla_decode(q, cache, slots, 128, 0.1),
            )
            for t in range(7):
                row = slice(t, t + 1)
                alone = (
                    ops.linear(x[row], weight),
                    ops.experts_swiglu(x[row], weights[row], ids[row], gate_up, down),
                    ops.mla_decode(q[row], cache, slots[row], 128, 0.1),
                )
                assert all(torch.equal(a, b[row]) for a, b in zip(alone, whole))
    finally:
        native.set_threads(ops, before)


def test_the_model_runs_without_native_kernels():
    code = (
        "from tilery import LLM, SamplingParams\n"
        "llm = LLM(progress=False)\n"
        "assert 'native' not in llm.core.runner.ops.chosen.values()\n"
        "out = llm.generate('It was', SamplingParams(temperature=0, max_tokens=4), progress=False)\n"
        "assert len(out[0].outputs[0].token_ids) == 4\n"
    )
    import os

    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, build.DISABLE: "1"}, timeout=120)
