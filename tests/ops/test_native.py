"""The C++ products: where there are none, operators say why and torch runs; FP8 weights stay FP8; results do not depend
on the batch."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tilery.ops import native, registry
from tilery.ops.moe import experts_swiglu
from tilery.ops.native import build
from tilery.ops.quant import BlockWeight, dequantize_blocks, stack_rows
from tilery.tile.targets.cpu import tape

NATIVE = registry.select().chosen["linear"] == "native"
needs_native = pytest.mark.skipif(not NATIVE, reason="no C++ compiler here, or the CPU multiplies bf16 natively")


@pytest.fixture(autouse=True)
def _fresh():
    build.load.cache_clear()
    yield
    build.load.cache_clear()


def reason():
    (info,) = [info for info in registry.list_operators() if info.name == "linear"]
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
    assert registry.select().chosen["linear"] == "reference"


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
    gate_up, down = torch.randn(8, 96, 200, generator=draw).to(dtype), torch.randn(8, 200, 48, generator=draw).to(dtype)
    shared = (gate_up[0], down[0])
    weights, ids = ops.route_grouped(torch.randn(7, 8, generator=draw), torch.zeros(8), 3, 2, 2, True, 2.5)
    cache = torch.randn(256, 192, generator=draw).to(dtype)
    q, slots = torch.randn(7, 5, 192, generator=draw), torch.randint(0, 256, (7, 90), generator=draw)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            native.set_threads(ops, threads)
            whole = (
                ops.linear(x, weight),
                ops.experts_swiglu(x, weights, ids, gate_up, down, shared),
                ops.mla_decode(q, cache, slots, 128, 0.1),
            )
            for t in range(7):
                row = slice(t, t + 1)
                alone = (
                    ops.linear(x[row], weight),
                    ops.experts_swiglu(x[row], weights[row], ids[row], gate_up, down, shared),
                    ops.mla_decode(q[row], cache, slots[row], 128, 0.1),
                )
                assert all(torch.equal(a, b[row]) for a, b in zip(alone, whole))
    finally:
        native.set_threads(ops, before)


def block_weight(draw, *shape):
    """FP8 numbers of all magnitudes, denormals included, with scales that differ by row and block."""
    values = (torch.randn(shape, generator=draw) * torch.logspace(-3, 2, shape[-1])).clamp(-448, 448)
    scale = torch.rand(*shape[:-1], -(-shape[-1] // 128), generator=draw) + 0.01
    return BlockWeight(values.to(torch.float8_e4m3fn), scale)


@needs_native
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 32, 40])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 256), (13, 300), (1, 5), (200, 131)])
def test_products_of_fp8_weights(tokens, outputs, inputs):
    """As exact as those of the dequantised weights: sums of fp32, in another order."""
    ops = registry.select()
    draw = torch.Generator().manual_seed(tokens * outputs)
    x, weight = torch.randn(tokens, inputs, generator=draw), block_weight(draw, outputs, inputs)

    def close(got, x, weight):
        expected, size = x.double() @ weight.double(), x.double().abs() @ weight.double().abs()
        assert ((got.double() - expected).abs() <= 2e-6 * size + 1e-30).all()

    close(ops.linear(x, weight), x, weight.float().T)
    heads = block_weight(draw, 3, outputs + 4, inputs)[:, 4:]
    assert not heads.values.is_contiguous()
    x = torch.randn(tokens, 3, inputs, generator=draw)
    got = ops.heads_linear(x, heads)
    for n in range(3):
        close(got[:, n], x[:, n], heads.float()[n].T)
    x, out = torch.randn(tokens, 3, outputs, generator=draw), torch.zeros(tokens, 3, inputs + 1)
    ops.heads_absorb(x, heads, out[:, :, :inputs])
    for n in range(3):
        close(out[:, n, :inputs], x[:, n], heads.float()[n])


@needs_native
@pytest.mark.parametrize("tokens", [1, 6, 40])
@pytest.mark.parametrize("width", [128, 40])
def test_experts_of_fp8_weights(tokens, width):
    draw = torch.Generator().manual_seed(tokens)
    x, weights = torch.randn(tokens, 256, generator=draw), torch.rand(tokens, 2, generator=draw)
    ids = torch.rand(tokens, 5, generator=draw).topk(2, dim=1).indices.int()
    gate_up, down = block_weight(draw, 5, 2 * width, 256), block_weight(draw, 5, 256, width)
    gate_up.scale.mul_(0.01)
    shared = (gate_up[1], down[1])
    expected = experts_swiglu(x, weights, ids, gate_up, down, shared)
    got = registry.select().experts_swiglu(x, weights, ids, gate_up, down, shared)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@needs_native
def test_recorded_calls_compute_the_same():
    """Every C function by way of its entry for recorded calls, on numbers that changed since."""
    ops, draw = registry.select(), torch.Generator().manual_seed(0)
    x, q, weights = torch.randn(5, 256), torch.randn(5, 3, 64), torch.rand(5, 2)
    matrix, heads = block_weight(draw, 64, 256), block_weight(draw, 3, 64, 256)
    gate_up, down = block_weight(draw, 5, 96, 256), block_weight(draw, 5, 256, 48)
    ids, rows = torch.tensor([[1, 3]] * 5, dtype=torch.int32), torch.randn(70, 64)
    slots, head_weights = torch.arange(70).repeat(5, 1), torch.rand(5, 3)

    def everything():
        wide = torch.empty(5, 3, 256)
        ops.heads_absorb(q, heads, wide)
        return (
            ops.linear(x, matrix),
            wide,
            ops.heads_linear(wide, heads),
            ops.experts_swiglu(x, weights, ids, gate_up, down, (gate_up[0], down[0])),
            ops.select_decode(q, head_weights, rows, slots, 20),
            native._wide(matrix, x),
        )

    recording = tape.Recording()
    with recording:
        outputs = everything()
    assert all(torch.equal(a, b) for a, b in zip(outputs, everything()))
    made = recording.tape(outputs, tape.Arena())
    assert len(made) == len(outputs)
    for tensor in (x, q, weights, rows, head_weights):
        tensor.copy_(torch.rand(tensor.shape, generator=draw))
    made.run()
    assert all(torch.equal(a, b) for a, b in zip(made.outputs, everything()))


def test_torchs_threads_are_right_in_every_thread():
    ops, before = registry.select(), torch.get_num_threads()
    small = 1 if ops.narrow_weights else 2
    seen = []

    def step(decoding):
        native.set_threads(ops, 2, decoding)
        seen.append(torch.get_num_threads())

    with ThreadPoolExecutor(1) as other:
        other.submit(step, 1).result()  # the other thread decodes, this one prefills, and so does the other one then
        step(None)
        other.submit(step, None).result()
        torch.set_num_threads(3)  # somebody else's doing
        step(None)
    torch.set_num_threads(before)
    assert seen == [small, 2, 2, 2]


def test_block_weights_behave_like_matrices():
    draw = torch.Generator().manual_seed(0)
    values, scale = torch.randn(200, 300, generator=draw).to(torch.float8_e4m3fn), torch.rand(2, 3, generator=draw)
    weight = BlockWeight.of(values, scale)
    wide = dequantize_blocks(values, scale)
    assert torch.equal(weight.float(), wide)
    assert torch.equal(stack_rows([weight, weight]).float(), torch.cat((wide, wide)))
    assert torch.equal(stack_rows([weight, wide]), torch.cat((wide, wide)))
    assert torch.equal(weight.unflatten(0, (4, 50))[:, 7:].float(), wide.unflatten(0, (4, 50))[:, 7:])
    many = weight.new_empty(2, 200, 300)
    many[0], many[1] = weight, weight
    assert torch.equal(many[1].float(), wide)


def test_the_model_runs_without_native_kernels():
    code = (
        "from tilery import LLM, SamplingParams\n"
        "llm = LLM(progress=False)\n"
        "assert not {'native', 'tile'} & set(llm.core.runner.ops.chosen.values())\n"
        "out = llm.generate('It was', SamplingParams(temperature=0, max_tokens=4), progress=False)\n"
        "assert len(out[0].outputs[0].token_ids) == 4\n"
    )
    import os

    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, build.DISABLE: "1"}, timeout=120)
