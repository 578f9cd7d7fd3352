"""Products: every code of e4m3, the order of nibbles, GPUs without e4m3."""

import pytest
import torch

from tests.ops.kernels.support import close, gen
from tilery.ops.kernels import products
from tilery.tile import bf16
from tilery.tile.errors import LaunchError


def test_bytes_are_the_numbers_of_e4m3():
    """All 254 codes that are numbers, times one: exact."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = 0
    a = codes.view(2, 1, 128)
    b = torch.eye(128).to(torch.float8_e4m3fn).view(torch.uint8).view(128, 1, 128)
    for kind in (torch.uint8, torch.float8_e4m3fn):
        out = torch.zeros(2, 128)
        products.fp8_gemm.interpret(a.view(kind), torch.ones(2, 1), b.view(kind), torch.ones(1, 1), out)
        assert torch.equal(out.flatten(), codes.view(torch.float8_e4m3fn).float())


def test_a_byte_holds_inputs_64_apart():
    q = torch.randint(0, 16, (3, 2, 128), generator=gen())
    packed = products.pack_int4(q)
    assert torch.equal(products.unpack_int4(packed, torch.zeros(3, 2, dtype=torch.uint8)), q)
    assert int(packed[1, 0, 5]) == int(q[1, 0, 5]) + 16 * int(q[1, 0, 69])
    out = torch.zeros(128, 3)
    a = torch.eye(128).bfloat16().view(128, 1, 128)
    zero = torch.full((3, 1), 3, dtype=torch.uint8)
    products.int4_gemm.interpret(a, None, packed[:, :1].contiguous(), torch.full((3, 1), 0.5), zero, out, bf16)
    assert torch.equal(out.T, (q[:, 0] - 3) * 0.5)


@pytest.mark.parametrize("case", ["ragged", "one_row_of_bytes"])
def test_f32_results_are_close(case):
    """Far closer than the tolerance, which bf16 needs."""
    given = products.fp8_gemm.arguments(case)
    rows, columns = given["out"].shape
    got, wanted = torch.zeros(rows, columns), torch.zeros(rows, columns)
    products.fp8_gemm.interpret(**{**given, "out": got})
    products.fp8_gemm.reference(**{**given, "out": wanted})
    close(got, wanted)


def test_operands_must_agree():
    given = products.int8_gemm.arguments("int8_one_row")
    with pytest.raises(LaunchError, match=r"b_scale.shape\[0\] is N = 71, but b.shape\[0\] says N = 72"):
        products.int8_gemm.interpret(**{**given, "b_scale": given["b_scale"][:71]})


@pytest.mark.parametrize(("kernel", "bench"), [("fp8_gemm", "fp8_16"), ("int4_gemm", "w4a8_16")])
def test_bytes_compile_where_e4m3_does_not(kernel, bench):
    """For compute capability 8.0, whose Triton has no e4m3."""
    pytest.importorskip("triton")
    from tilery.tile.binaries import arguments_of
    from tilery.tile.lowering import lower
    from tilery.tile.targets.triton import emit, report, spec_of

    chosen = getattr(products, kernel)
    given = arguments_of(chosen, bench)
    given |= {
        name: x.view(torch.uint8) for name, x in given.items() if getattr(x, "dtype", None) == torch.float8_e4m3fn
    }
    key, env = chosen.specialise(given)
    lowered = lower(chosen.trace(key), env, "triton", chosen.schedule_for(env, "triton"))
    found = report(emit(lowered.kernel, lowered.schedule, spec_of(lowered.kernel, given, env)), 80)
    assert found.spills == 0
    assert found.count("HMMA") > 0
