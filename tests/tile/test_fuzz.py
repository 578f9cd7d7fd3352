"""Random kernels: every stage, every block size, the generated C++ and Triton give the bits that the language means."""

import importlib.util

import pytest
import torch

from tests.tile import fuzz
from tests.tile.cpu_compare import run_both, specialised
from tilery.tile import interpret
from tilery.tile.lowering import lower
from tilery.tile.schedule import Schedule, block_labels
from tilery.tile.targets.cpu.executable import compile_many

SEEDS = [*range(100, 112)]


def run(stage, arguments, env):
    own = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    out = stage(own, env)
    return [*out, own["z"], own["h"]]


def equal(got, wanted):
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) if a.is_floating_point() else torch.equal(a, b)
               for a, b in zip(got, wanted, strict=True))  # fmt: skip


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    made = fuzz.kernels(tmp_path_factory.mktemp("fuzz"), SEEDS)
    return [specialised(k, **fuzz.arguments(k, seed)) for k, seed in zip(made, SEEDS)]


@pytest.mark.parametrize("at", range(len(SEEDS)))
def test_stages_mean_the_same(calls, at):
    ir, arguments, env = calls[at]
    wanted = run(lambda a, e: interpret.run(ir, a, e), arguments, env)
    for size in (None, 4, 1):
        for target in ("cpu", "triton"):
            schedule = Schedule(blocks=dict.fromkeys(block_labels(ir), size)) if size else None
            kernel = lower(ir, env, target, schedule).kernel
            got = run(lambda a, e, k=kernel: interpret.run(k, a, e), arguments, env)
            assert equal(got, wanted), (target, size)


def test_cpp_means_the_same(calls):
    made = compile_many([(ir, env, None) for ir, _, env in calls], optimise="-O1")
    for (ir, arguments, env), executable in zip(calls, made):
        got, wanted = run_both(ir, arguments, env, executable)
        assert equal(got, wanted), ir.name


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("at", range(0, len(SEEDS), 3))
def test_triton_means_the_same(calls, at):
    from tilery.tile.targets.triton.interp import run_interpreted

    ir, arguments, env = calls[at]
    wanted = run(lambda a, e: interpret.run(ir, a, e), arguments, env)
    lowered = lower(ir, env, "triton")
    assert equal(run(lambda a, e: run_interpreted(lowered, a, e), arguments, env), wanted)
