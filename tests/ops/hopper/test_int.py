"""INT8 and INT4 products: packing, machine code, and on a GPU the numbers against float64."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton.experimental.gluon", reason="needs Triton 3.6 with Gluon")

from tilery.ops.hopper import int4_gemm, int8_gemm
from tilery.ops.hopper.int4_gemm import Int4Weight, pack_int4, unpack_int4
from tilery.ops.hopper.variant import Variant, build
from tilery.ops.quant import E4M3

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)

ERROR = 1e-3
"""Relative L2 error that is allowed against float64 of the same quantised inputs, before the result is rounded."""


def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8, seed: int = 0) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_int4(
    *shape: int,
    asymmetric: bool = False,
    activations: torch.dtype = torch.bfloat16,
    scale: torch.dtype = torch.bfloat16,
) -> tuple[Int4Weight, Tensor]:
    """A random weight, packed, and its values in float64."""
    q = integers(0, 15, *shape) if asymmetric else integers(-8, 7, *shape)
    groups = (*shape[:-1], shape[-1] // 128)
    scales = (torch.rand(groups, generator=torch.Generator().manual_seed(1)) * 0.02 + 0.001).to(scale)
    zero = integers(0, 15, *groups, seed=2) if asymmetric else None
    values = q.double().unflatten(-1, (-1, 128)) - (0 if zero is None else zero.double()[..., None])
    return pack_int4(q, scales, zero, activations), (values * scales.double()[..., None]).flatten(-2)


def activations(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random activations, their scales (ones for bf16), and their values in float64."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*shape, generator=generator).to(dtype)
    scale = torch.ones(*shape[:-1], shape[-1] // 128)
    if dtype == E4M3:
        scale = torch.exp2(torch.randint(-3, 3, scale.shape, generator=generator).float())
    return x, scale, (x.double().unflatten(-1, (-1, 128)) * scale.double()[..., None]).flatten(-2)


def nans(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"), device="cuda")


def error(got: Tensor, expected: Tensor) -> float:
    expected = expected.to(got.device)
    return ((got.double() - expected).norm() / expected.norm()).item()


# ---- packing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 128), (200, 256), (8, 384), (3, 264, 256), (2, 512, 128)])
@pytest.mark.parametrize(
    ("asymmetric", "dtype"), [(False, torch.bfloat16), (True, torch.bfloat16), (False, E4M3)], ids=str
)
def test_packing_keeps_the_weights(shape: tuple[int, ...], asymmetric: bool, dtype: torch.dtype) -> None:
    q = integers(0, 15, *shape) if asymmetric else integers(-8, 7, *shape)
    scale = torch.rand(*shape[:-1], shape[-1] // 128)
    zero = integers(0, 15, *scale.shape) if asymmetric else None
    weight = pack_int4(q, scale, zero, dtype)
    assert weight.packed.numel() * 8 == weight.rows * shape[-1] * (shape[0] if len(shape) == 3 else 1)
    got_q, got_scale, got_zero = unpack_int4(weight)
    if weight.zero is not None:  # 128 + zero, of the outputs that there are
        rows = weight.zero.view(-1, shape[-1] // 128, weight.rows)[..., : shape[-2]]
        assert rows.min() >= 128
        assert rows.max() <= 143
    assert torch.equal(got_q, q)
    assert torch.equal(got_scale, scale)
    assert got_zero is None if zero is None else torch.equal(got_zero, zero)


def widen(word: int, dtype: torch.dtype) -> list[float]:
    """What the kernel's instructions make of a word of a symmetric weight, in the order of its registers."""
    if dtype == E4M3:
        pairs = [((word >> 3) & 0x01010101, word & 0x07070707), ((word >> 7) & 0x01010101, (word >> 4) & 0x07070707)]
        registers = torch.tensor([sign * 0x81 + magnitude for sign, magnitude in pairs], dtype=torch.uint32)
        return (registers.view(torch.uint8).view(E4M3).float() * 512).tolist()
    registers = torch.tensor([(word >> s) & 0x000F000F | 0x43004300 for s in (0, 4, 8, 12)], dtype=torch.uint32)
    return (registers.view(torch.uint16).view(torch.bfloat16).float() - 136).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3], ids=str)
def test_words_lie_as_the_tensor_cores_want_them(dtype: torch.dtype) -> None:
    """The register operand of wgmma: thread t of warp w holds rows 16 w + t / 4 and 8 below, and of each block of
    inputs (16 bf16 or 32 e4m3) the (t % 4)-th 32 bits of either half."""
    q = integers(-8, 7, 64, 128)
    words = pack_int4(q, torch.ones(64, 1), None, dtype).packed.view(torch.uint32).flatten()[:1024].tolist()
    width = 4 if dtype == E4M3 else 2
    for warp, thread in [(0, 0), (0, 1), (1, 5), (2, 18), (3, 31)]:
        got: dict[tuple[int, int], float] = {}
        for load in range(2):  # 16 bytes each; the second holds the next 32 inputs
            for j in range(4):
                values = widen(words[warp * 256 + load * 128 + thread * 4 + j], dtype)
                for high in range(2):
                    for i in range(4):
                        row, column = (j & 1, (j >> 1) * 16) if dtype == E4M3 else (i >> 1, (j & 1) * 8 + (j >> 1) * 16)
                        column += load * 32 + high * 64 + thread % 4 * width + (i if dtype == E4M3 else i & 1)
                        got[16 * warp + thread // 4 + 8 * row, column] = values[high * 4 + i]
        assert len(got) == 64
        assert all(value == q[place].item() for place, value in got.items())


@pytest.mark.parametrize(
    ("q", "scale", "zero", "dtype", "message"),
    [
        (integers(0, 7, 8, 100), torch.ones(8, 1), None, torch.bfloat16, "I of 128"),
        (integers(0, 7, 12, 128), torch.ones(12, 1), None, torch.bfloat16, "O a multiple of 8"),
        (integers(0, 15, 8, 128), torch.ones(8, 1), None, torch.bfloat16, "in -8 .. 7"),
        (integers(-8, 7, 8, 128), torch.ones(8, 1), torch.zeros(8, 1), torch.bfloat16, "in 0 .. 15"),
        (integers(0, 7, 8, 128), torch.ones(8, 2), None, torch.bfloat16, "scale must be"),
        (integers(0, 7, 8, 128), torch.ones(8, 1).half(), None, torch.bfloat16, "scale must be"),
        (integers(0, 7, 8, 128), torch.ones(8, 1), torch.full((8, 1), 16), torch.bfloat16, "zero must be"),
        (integers(0, 7, 8, 128), torch.ones(8, 1), torch.zeros(8, 1), E4M3, "not supported"),
    ],
)
def test_packing_refuses(q: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        pack_int4(q, scale, zero, dtype)


# ---- choices and arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [1, 17, 33, 64, 112, 192, 384, 2020])
@pytest.mark.parametrize("blocks", [1, 12, 56, 128])
@pytest.mark.parametrize("slots", [132, 264])
def test_every_program_gets_work(tiles: int, blocks: int, slots: int) -> None:
    programs = int8_gemm.share(tiles, blocks, slots)
    assert 1 <= programs <= min(slots, tiles * blocks)
    waves = -(-tiles * blocks // programs)
    assert waves * programs <= 2 * tiles * blocks


@pytest.mark.parametrize(("m", "n"), [(129, 512), (4096, 2112), (4096, 24576), (4096, 7168)])
def test_wide_tiles_fit_shared_memory(m: int, n: int) -> None:
    config = int8_gemm.choose(m, n, 7168)
    assert not config.swapped
    staged = config.stages * (config.rows + config.columns) * 128 + config.rows * config.columns * 2
    assert staged < 232_448


@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 32, 33, 64])
@pytest.mark.parametrize("n", [8, 4096, 24576])
def test_a_stage_has_one_reader(m: int, n: int) -> None:
    """Warpgroups take units in turn: a ring whose length is no multiple would hand a stage from one to another."""
    config = int4_gemm.choose(m, n)
    assert config.tokens >= m
    assert config.stages % int4_gemm.WAYS == 0


def test_host_functions_refuse_what_does_not_fit() -> None:
    a, b = integers(-127, 127, 4, 128), integers(-127, 127, 16, 128)
    ones = torch.ones(16)
    with pytest.raises(ValueError, match="does not fit"):
        int8_gemm.int8_gemm(a, ones[:4], b, ones)  # not on a GPU
    with pytest.raises(ValueError, match="K a multiple of 128"):
        int8_gemm.int8_gemm(a[:, :100].contiguous(), ones[:4], b, ones)
    with pytest.raises(ValueError, match="M a positive multiple of 128"):
        int8_gemm.int8_grouped_gemm(a, ones[:4], b[None], ones[None], torch.zeros(1, dtype=torch.int32))
    weight, _ = make_int4(16, 128)
    with pytest.raises(ValueError, match="must lie at a multiple"):
        int4_gemm.w4a16_gemm(torch.zeros(4, 128, dtype=torch.bfloat16), weight)  # not on a GPU
    with pytest.raises(ValueError, match="the last 128"):
        int4_gemm.w4a16_gemm(torch.zeros(4, 256, dtype=torch.bfloat16), weight)
    with pytest.raises(ValueError, match="packed for"):
        int4_gemm.w4a8_gemm(torch.zeros(4, 128).to(E4M3), torch.ones(4, 1), weight)


# ---- machine code --------------------------------------------------------------------------------------------------

VARIANTS = {variant.name: variant for variant in [*int8_gemm.variants(), *int4_gemm.variants()]}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_machine_code(variant: Variant) -> None:
    """No spills, the right tensor-core instruction as often as the tile needs it, and loads by TMA."""
    built = build(variant)
    assert built.spills == 0
    assert built.stack == 0
    assert built.shared <= 232_448
    assert built.counts["UTMALDG"] >= 2
    found = {op: len(re.findall(rf"\b{op}\b", built.sass)) for op in ("IGMMA", "QGMMA", "HGMMA")}
    wanted = {"int8": "IGMMA", "w4a8": "QGMMA", "w4a16": "HGMMA"}[variant.name.split("-")[0]]
    assert found[wanted] >= 4
    assert sum(found.values()) == found[wanted]
    if wanted != "IGMMA":
        # nibbles become operands in registers: two 16-byte loads a thread and unit, no byte permutations but a few
        assert len(re.findall(r"\bLDS\.128\b", built.sass)) >= 4
        assert len(re.findall(r"\bPRMT\b", built.sass)) < 32


# ---- numbers -------------------------------------------------------------------------------------------------------


@hopper
@pytest.mark.parametrize("m", [1, 7, 16, 64, 65, 128, 129, 300])
@pytest.mark.parametrize(("n", "k"), [(2112, 7168), (264, 256), (24576, 1536)])
def test_int8(m: int, n: int, k: int) -> None:
    a, b = integers(-127, 127, m, k).cuda(), integers(-127, 127, n, k, seed=1).cuda()
    a_scale, b_scale = torch.rand(m, device="cuda") + 0.1, torch.rand(n, device="cuda") + 0.1
    out = int8_gemm.int8_gemm(a, a_scale, b, b_scale, nans(m, n))
    assert error(out, (a.double() @ b.double().T) * a_scale.double()[:, None] * b_scale.double()) < 1e-6
    assert torch.equal(int8_gemm.int8_gemm(a, a_scale, b, b_scale), out.bfloat16())


@hopper
def test_int8_groups() -> None:
    e, n, k = 6, 264, 384
    a, b = integers(-127, 127, 5 * 128, k).cuda(), integers(-127, 127, e, n, k, seed=1).cuda()
    a_scale, b_scale = torch.rand(640, device="cuda") + 0.1, torch.rand(e, n, device="cuda") + 0.1
    groups = [0, 0, -1, 5, 3]
    out = int8_gemm.int8_grouped_gemm(
        a, a_scale, b, b_scale, torch.tensor(groups, dtype=torch.int32, device="cuda"), nans(640, n)
    )
    for i, group in enumerate(groups):
        rows = slice(128 * i, 128 * i + 128)
        if group < 0:
            assert out[rows].isnan().all()
            continue
        expected = (a[rows].double() @ b[group].double().T) * a_scale[rows].double()[:, None] * b_scale[group].double()
        assert error(out[rows], expected) < 1e-6


@hopper
@pytest.mark.parametrize("expected", [None, 6, 20, 40])
def test_int8_masked_groups(expected: int | None) -> None:
    counts = [3, 0, 80, 33, 17]
    e, room, n, k = len(counts), 80, 264, 384
    a, b = integers(-127, 127, e, room, k).cuda(), integers(-127, 127, e, n, k, seed=1).cuda()
    a_scale, b_scale = torch.rand(e, room, device="cuda") + 0.1, torch.rand(e, n, device="cuda") + 0.1
    device_counts = torch.tensor(counts, dtype=torch.int32, device="cuda")
    out = int8_gemm.int8_grouped_gemm_masked(a, a_scale, b, b_scale, device_counts, nans(e, room, n), expected)
    for i, count in enumerate(counts):
        assert out[i, count:].isnan().all()
        if count:
            exact = (a[i].double() @ b[i].double().T) * a_scale[i].double()[:, None] * b_scale[i].double()
            assert error(out[i, :count], exact[:count]) < 1e-6


@hopper
@pytest.mark.parametrize(
    ("m", "n", "k", "scale"),
    [
        *[(m, 264, 256, torch.float32) for m in (1, 7, 16, 32, 64, 100)],
        *[(m, 2112, 7168, torch.bfloat16) for m in (1, 16, 64)],
        *[(m, 8960, 640, torch.bfloat16) for m in (1, 16, 32, 64)],  # programs begin and end within tiles, oddly
        (8, 24576, 1536, torch.bfloat16),
        (16, 24576, 1536, torch.float32),
    ],
)
@pytest.mark.parametrize("kind", ["w4a16", "w4a16-asymmetric", "w4a8"])
def test_int4(m: int, n: int, k: int, scale: torch.dtype, kind: str) -> None:
    dtype = E4M3 if kind == "w4a8" else torch.bfloat16
    weight, values = make_int4(n, k, asymmetric="asymmetric" in kind, activations=dtype, scale=scale)
    weight = to_gpu(weight)
    x, x_scale, x_values = activations(dtype, m, k)
    exact = x_values.cuda() @ values.cuda().T

    def product(out: Tensor | None = None) -> Tensor:
        if dtype == E4M3:
            return int4_gemm.w4a8_gemm(x.cuda(), x_scale.cuda(), weight, out)
        return int4_gemm.w4a16_gemm(x.cuda(), weight, out)

    out = product(nans(m, n))
    assert error(out, exact) < ERROR
    assert torch.equal(out, product(nans(m, n))), "not deterministic"
    assert torch.equal(out.bfloat16(), product())


def to_gpu(weight: Int4Weight) -> Int4Weight:
    zero = None if weight.zero is None else weight.zero.cuda()
    return Int4Weight(weight.packed.cuda(), weight.scale.cuda(), zero, weight.shape, weight.activations)


@hopper
@pytest.mark.parametrize("expected", [None, 6, 20, 40])
@pytest.mark.parametrize("kind", ["w4a16", "w4a16-asymmetric", "w4a8"])
def test_int4_masked_groups(expected: int | None, kind: str) -> None:
    counts = [3, 0, 80, 33, 17]
    e, room, n, k = len(counts), 80, 520, 384
    dtype = E4M3 if kind == "w4a8" else torch.bfloat16
    weight, values = make_int4(e, n, k, asymmetric="asymmetric" in kind, activations=dtype)
    x, x_scale, x_values = activations(dtype, e, room, k)
    device_counts = torch.tensor(counts, dtype=torch.int32, device="cuda")
    out = nans(e, room, n)
    if dtype == E4M3:
        int4_gemm.w4a8_grouped_gemm_masked(x.cuda(), x_scale.cuda(), to_gpu(weight), device_counts, out, expected)
    else:
        int4_gemm.w4a16_grouped_gemm_masked(x.cuda(), to_gpu(weight), device_counts, out, expected)
    for i, count in enumerate(counts):
        assert out[i, count:].isnan().all()
        if count:
            assert error(out[i, :count], x_values[i, :count] @ values[i].T) < ERROR


@hopper
def test_graphs_replay() -> None:
    """Products that follow one another at once, as in a decode step, many times: the numbers stay the same."""
    weights = [to_gpu(make_int4(n, 1024)[0]) for n in (264, 2112, 24576)]
    x = activations(torch.bfloat16, 16, 1024)[0].cuda()
    b = integers(-127, 127, 2112, 1024).cuda()
    a, scale = b[:16].contiguous(), torch.rand(2112, device="cuda")

    def step() -> list[Tensor]:
        products = [int4_gemm.w4a16_gemm(x, weight) for weight in weights]
        return [*products, int8_gemm.int8_gemm(a, scale[:16], b, scale)]

    expected = [product.clone() for product in step()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            got = step()
    for _ in range(50):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(expected, got))
