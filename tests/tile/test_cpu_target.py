"""The CPU target as a whole: two real kernels, threads, strides, the cache, life without a compiler, messages."""

import random
import re
import threading

import pytest
import torch

from tests.tile.cpu_compare import close, compare, copied, run_both, specialised
from tests.tile.zoo import CASES
from tilery import tile
from tilery.tile import Dim, InOut, Tensor, bf16, e4m3, f32, i32
from tilery.tile.errors import LaunchError, LoweringError
from tilery.tile.ops import OPS, OpDef
from tilery.tile.schedule import Schedule
from tilery.tile.targets.cpu import CpuExecutable, build, compile_cpu, set_threads

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
T, H = Dim("T"), Dim("H", multiple_of=128)
B, L, P, D, N = Dim("B"), Dim("L"), Dim("P"), Dim("D"), Dim("N")


@tile.kernel
def rms_norm_quant(x: Tensor[T, H, bf16], w: Tensor[H, bf16], eps: float = 1e-6):
    y, s = tile.empty([T, H], e4m3), tile.empty([T, H // 128], f32)
    for t in tile.parallel(tile.blocks(T, "row")):
        v = x[t, :].to(f32)
        v = v * tile.rsqrt(tile.mean(v * v, axis=1, keepdims=True) + eps) * w[:].to(f32)
        g = v.reshape(t.extent, H // 128, 128)
        scale = tile.maximum(tile.max(tile.abs(g), axis=2), 1e-4) / 448.0
        y[t, :] = (g / scale[:, :, None]).to(e4m3).reshape(t.extent, H)
        s[t, :] = scale
    return y, s


@tile.kernel
def attention(
    q: Tensor[B, 8, D, f32], kv: Tensor[P, 64, D, bf16], table: Tensor[B, L, i32], lens: Tensor[B, i32], scale: float
):
    o = tile.empty([B, 8, D], f32)
    for b in tile.parallel(B):
        qt, n = q[b, :, :], lens[b]
        m, total, acc = tile.full([8], float("-inf"), f32), tile.zeros([8], f32), tile.zeros([8, D], f32)
        for j in tile.range(tile.blocks(n, "kv")):
            k = kv[table[b, j // 64], j % 64, :].to(f32)
            s = tile.dot(qt, k.T) * scale
            top = tile.maximum(m, tile.max(s, axis=1))
            p, a = tile.exp(s - top[:, None]), tile.exp(m - top)
            total, acc, m = total * a + tile.sum(p, axis=1), acc * a[:, None] + tile.dot(p, k), top
        if n > 0:
            o[b, :, :] = acc / total[:, None]
        else:
            o[b, :, :] = tile.zeros([8, D], f32)
    return o


@tile.kernel
def axpy(x: Tensor[T, N, f32], y: InOut[T, N, f32], a: float):
    for t in tile.parallel(T):
        y[t, :] = y[t, :] + x[t, :] * a


def attention_arguments(lens):
    count = len(lens)
    kv, table = torch.randn(5 * count, 64, 24).bfloat16(), torch.randperm(5 * count).int().view(count, 5)
    return torch.randn(count, 8, 24), kv, table, torch.tensor(lens, dtype=torch.int32), 0.2


@needs_compiler
def test_rms_norm_quant_and_attention_match_the_interpreter():
    calls = [(rms_norm_quant, (torch.randn(t, 256).bfloat16(), torch.randn(256).bfloat16()), {}) for t in (0, 1, 7, 33)]
    calls += [(attention, attention_arguments(lens), {}) for lens in ([70, 13, 0, 300], [1], [])]
    compare(calls, rtol=1e-4, atol=1e-5, optimise="-O3")


@needs_compiler
def test_attention_matches_plain_torch():
    q, kv, table, lens, scale = attention_arguments([320, 65, 7])
    ir, arguments, env = specialised(attention, q, kv, table, lens, scale)
    (o,) = compile_cpu(ir, env, Schedule(blocks={"kv": 16}))(arguments, env)
    for b, n in enumerate(lens.tolist()):
        k = kv[table[b].long()].reshape(-1, 24)[:n].float()
        close(o[b], torch.softmax(q[b] @ k.T * scale, -1) @ k, rtol=1e-4)


@needs_compiler
def test_fused_chains_are_one_loop_with_the_users_lines():
    @tile.kernel
    def silu(x: Tensor[T, 64, bf16]):
        y = tile.empty([T, 64], bf16)
        for t in tile.parallel(tile.blocks(T, "row")):
            v = x[t, :].to(f32)
            y[t, :] = (v * tile.sigmoid(v)).to(bf16)
        return y

    ir, _, env = specialised(silu, torch.zeros(3, 64, dtype=torch.bfloat16))
    executable = compile_cpu(ir, env)
    body = executable.source.split("_launch")[0]
    assert executable.native
    assert "arena" not in body
    assert body.count("i1 < 64") == 1
    assert re.search(r"// test_cpu_target.py:\d+: y\[t, :\] = \(v \* tile.sigmoid\(v\)\).to\(bf16\)", body)


@needs_compiler
def test_a_grid_shared_by_threads_and_callers_gives_the_same():
    """Many programs, from several Python threads at once; helpers may serve only one caller at a time."""
    set_threads(3)
    x, y = torch.randn(500, 700), torch.randn(500, 700)
    ir, _, env = specialised(axpy, x, y.clone(), 2.0)
    executable = compile_cpu(ir, env, optimise="-O1")
    failures = []

    def work():
        for _ in range(30):
            own = y.clone()
            executable.launch([x, own, 2.0], env)
            if not torch.allclose(own, y + 2.0 * x):
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    set_threads(torch.get_num_threads())
    assert not failures


@needs_compiler
def test_strided_tensors():
    wide = torch.randn(6, 50)
    ir, arguments, env = specialised(axpy, wide[::2, 3:10], torch.zeros(3, 7), 1.5)
    executable = compile_cpu(ir, env, strided=frozenset({"x"}), optimise="-O1")
    assert "stride" in executable.source
    executable.launch(list(arguments.values()), env)
    close(arguments["y"], wide[::2, 3:10] * 1.5)
    plain = compile_cpu(ir, env, optimise="-O1")  # a call by name finds out by itself
    own = {**arguments, "y": torch.zeros(3, 7)}
    plain(own, env)
    close(own["y"], arguments["y"])


@needs_compiler
def test_one_binary_serves_every_dynamic_size():
    ir, _, env = specialised(rms_norm_quant, torch.zeros(1, 128).bfloat16(), torch.zeros(128).bfloat16())
    executable = compile_cpu(ir, env, optimise="-O1")
    for t in (0, 1, 7, 33, 100):
        arguments = {"x": torch.randn(t, 128).bfloat16(), "w": torch.randn(128).bfloat16(), "eps": 1e-6}
        for got, expected in zip(*run_both(ir, arguments, {**env, "T": t}, executable)):
            close(got, expected)


@needs_compiler
def test_compiling_twice_uses_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path)
    text = 'extern "C" int seven() { return 7; }\n'
    assert build.build(text, "seven", "-O0").seven() == 7
    (library,) = tmp_path.glob("seven-*.so")
    stamp = library.stat().st_mtime_ns
    assert build.build(text, "seven", "-O0").seven() == 7
    assert library.stat().st_mtime_ns == stamp
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".cpp", ".so"]
    build.build(text, "seven", "-O1")
    assert len(list(tmp_path.glob("seven-*.so"))) == 2


@needs_compiler
def test_a_source_that_does_not_compile_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path)
    with pytest.raises(LoweringError, match=r"does not compile the generated source of bad-\w+: .*error"):
        build.build("int x = ;\n", "bad")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", CASES)
def test_without_a_compiler_torch_operators_give_the_same(name, monkeypatch):
    monkeypatch.setenv(build.DISABLE, "1")
    rng = random.Random(5)
    kernel, arguments, expected = CASES[name](
        lambda low, high: rng.randint(low, high), torch.Generator().manual_seed(5)
    )
    ir, bound, env = specialised(kernel, **copied(arguments))
    executable = compile_cpu(ir, env)
    assert isinstance(executable, CpuExecutable)
    assert not executable.native
    assert executable.source == ""
    got = executable(bound, env)
    for a, b in zip((*got, *(bound[p.value.name] for p in ir.params if p.inout)), expected):
        close(a, b.to(a.dtype), rtol=1e-4, atol=1e-4)


def test_no_compiler_message(monkeypatch):
    monkeypatch.setenv(build.DISABLE, "1")
    with pytest.raises(
        LoweringError, match="no C\\+\\+ compiler: none of g\\+\\+, c\\+\\+, clang\\+\\+ is on the PATH"
    ):
        build.build("", "nothing")


@needs_compiler
def test_wrong_arguments_are_named():
    ir, arguments, env = specialised(axpy, torch.zeros(2, 7), torch.zeros(2, 7), 1.0)
    executable = compile_cpu(ir, env, optimise="-O1")
    with pytest.raises(LaunchError, match="axpy: argument 'y' is missing; expected x, y, a"):
        executable({"x": arguments["x"], "a": 1.0}, env)
    with pytest.raises(LaunchError, match=r"axpy: x must be a CPU tensor of f32, got torch.float64 on cpu"):
        executable({**arguments, "x": torch.zeros(2, 7, dtype=torch.float64)}, env)
    with pytest.raises(LaunchError, match=r"the last dimension of x must be contiguous; pass x.contiguous\(\)"):
        executable({**arguments, "x": torch.zeros(7, 2).T}, env)


@needs_compiler
def test_an_operation_without_a_cpp_form_is_refused_at_its_line(monkeypatch):
    twice = OpDef("twice_plus", OPS["exp"].infer, lambda x: 2 * x + 1, elementwise=True)
    monkeypatch.setitem(OPS, "twice_plus", twice)

    @tile.kernel
    def use(x: Tensor[T, 8, f32]):
        y = tile.empty([T, 8], f32)
        for t in tile.parallel(T):
            y[t, :] = tile.lang.elementwise("twice_plus", x[t, :])
        return y

    ir, arguments, env = specialised(use, torch.ones(2, 8))
    with pytest.raises(LoweringError, match=r"test_cpu_target.py:\d+: the operation 'twice_plus' has no C\+\+ form"):
        compile_cpu(ir, env)
    monkeypatch.setitem(OPS, "twice_plus", OpDef(**{**vars(twice), "cpp": "(2.0f * {0} + 1.0f)"}))
    (y,) = compile_cpu(ir, env, optimise="-O1")(arguments, env)
    assert bool((y == 3).all())


@needs_compiler
def test_names_that_mean_something_in_cpp_do_no_harm():
    @tile.kernel
    def names(int: Tensor[T, 8, f32], std: Tensor[8, f32], d_T: Tensor[8, f32], i0: float, NULL: float):
        double, t_exp = tile.empty([T, 8], f32), tile.empty([T], f32)
        for tensors in tile.parallel(tile.blocks(T, "first")):
            acc = int[tensors, :] * std[:] + d_T[:]
            i1 = tile.exp(acc)
            acc_ = i1 * i0 + NULL
            bits = tile.sum(acc_ * i1, axis=1)
            double[tensors, :] = acc_ + bits[:, None]
            t_exp[tensors] = bits + tile.max(i1 + acc, axis=1)
        return double, t_exp

    arguments = (torch.randn(5, 8), torch.randn(8), torch.randn(8), 0.5, -1.0)
    compare([(names, arguments, {})], rtol=1e-4)


@needs_compiler
def test_writes_outside_of_the_grid_happen_once():
    @tile.kernel
    def count(total: InOut[2, i32], x: InOut[T, i32]):
        total.atomic_add((0,), 1)
        for t in tile.parallel(T):
            x[t] = x[t] + 1
        total.atomic_add((1,), 2)

    compare([(count, (torch.zeros(2).int(), torch.zeros(t).int()), {}) for t in (0, 1, 40)])
