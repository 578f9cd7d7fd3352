"""FP8 matrix products on Hopper: what the compiler made of them (any machine with Triton), and numbers (CUDA only)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton's Gluon")

from tilery.ops.hopper import gemm, grouped_gemm
from tilery.ops.hopper.variant import Variant, build
from tilery.ops.quant import E4M3, quantize_blocks, quantize_groups

VARIANTS = gemm.variants() + grouped_gemm.variants()
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 error of a bf16 result before its rounding: what it has beyond rounding the exact result."""
    total = ((out.double() - expected).norm() / expected.norm()).item()
    rounding = ((expected.bfloat16().double() - expected).norm() / expected.norm()).item()
    return float(max(total**2 - rounding**2, 0.0)) ** 0.5


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_machine_code(variant: Variant) -> None:
    built = build(variant)
    assert built.spills == 0
    assert built.stack == 0
    assert built.counts["QGMMA"] >= 4, "the product runs on FP8 tensor cores"
    assert built.counts["HGMMA"] == 0
    assert built.counts["UTMALDG"] >= 3, "operands come by TMA"
    assert built.shared <= 227 * 1024
    assert built.registers <= 255


@pytest.mark.parametrize("m", [1, 8, 9, 33, 64, 65, 128, 129, 4096])
def test_choice_fits_the_workspace(m: int) -> None:
    config = gemm.choose(m, 2112, 7168)
    tokens, outputs = config.tile
    assert config.parts(-(-m // tokens) * -(-2112 // outputs), 132) <= gemm.PARTS
    assert config.stages % config.burst == 0
    assert config.swap == (m <= 64)
    if config.swap:
        assert config.width >= m


def test_scales_are_aligned_without_changing_them() -> None:
    scales = torch.rand(5, 3)
    aligned = gemm.align_scales(scales)
    assert torch.equal(aligned, scales)
    assert aligned.stride(0) == 1
    assert aligned.stride(1) % 4 == 0
    assert gemm.align_scales(aligned) is aligned


def test_reference_is_the_dequantised_product() -> None:
    a, a_scale = quantize_groups(torch.randn(7, 256))
    b, b_scale = quantize_blocks(torch.randn(136, 256))
    expected = torch.empty(7, 136, dtype=torch.float64)
    for row in range(7):
        for column in range(136):
            blocks = (a[row].double() * b[column].double()).view(2, 128).sum(1)
            expected[row, column] = (blocks * a_scale[row].double() * b_scale[column // 128].double()).sum()
    torch.testing.assert_close(gemm.reference(a, a_scale, b, b_scale), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(4, 256)}, "a must be dense e4m3"),
        ({"a": torch.zeros(4, 200).to(E4M3)}, "K a multiple of 128"),
        ({"a_scale": torch.zeros(4, 3)}, r"a_scale must be fp32 \[4, 2\]"),
        ({"b": torch.zeros(12, 256).to(E4M3)}, "N a multiple of 8"),
        ({"b_scale": torch.zeros(2, 2)}, r"b_scale must be dense fp32 \[1, 2\]"),
        ({"out": torch.zeros(4, 16)}, "out must be dense bf16"),
    ],
)
def test_wrong_operands_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    operands = {
        "a": torch.zeros(4, 256).to(E4M3),
        "a_scale": torch.ones(4, 2),
        "b": torch.zeros(16, 256).to(E4M3),
        "b_scale": torch.ones(1, 2),
    }
    with pytest.raises(ValueError, match=message):
        gemm.fp8_gemm(**{**operands, **change})


def test_wrong_groups_are_refused() -> None:
    a, b = torch.zeros(128, 128).to(E4M3), torch.zeros(2, 128, 128).to(E4M3)
    scales, weight_scales = torch.ones(128, 1), torch.ones(2, 1, 1)
    with pytest.raises(ValueError, match="offsets must be int32"):
        grouped_gemm.fp8_gemm_contiguous(a, scales, b, weight_scales, torch.zeros(2, dtype=torch.int32))
    strided = torch.zeros(6, dtype=torch.int32)[::2]
    with pytest.raises(ValueError, match="dense"):
        grouped_gemm.fp8_gemm_contiguous(a, scales, b, weight_scales, strided)
    with pytest.raises(ValueError, match="multiple of 64"):
        grouped_gemm.fp8_gemm_masked(
            a.view(2, 64, 128)[:, :32], scales, b, weight_scales, torch.zeros(2, dtype=torch.int32), 8
        )


def test_scales_expanded_from_one_column_are_copied() -> None:
    one = torch.rand(8, 1)
    aligned = gemm.align_scales(one.expand(8, 3))
    assert aligned.stride() == (1, 8)
    assert torch.equal(aligned, one.expand(8, 3))


def operands(m: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(m + n + k)
    a = torch.randn(m, k, device="cuda", generator=generator) * (1 + torch.rand(m, 1, device="cuda") * 10)
    return (*quantize_groups(a), *quantize_blocks(torch.randn(n, k, device="cuda", generator=generator) * 0.02))


@on_hopper
@pytest.mark.parametrize("m", [1, 3, 8, 17, 32, 64, 65, 100, 129, 250, 1000])
@pytest.mark.parametrize(("n", "k"), [(2112, 7168), (576, 512), (1536, 128), (264, 640)])
def test_product(m: int, n: int, k: int) -> None:
    a, a_scale, b, b_scale = operands(m, n, k)
    out = torch.full((m, n), float("nan"), dtype=torch.bfloat16, device="cuda")
    gemm.fp8_gemm(a, a_scale, b, b_scale, out)
    assert relative_error(out, gemm.reference(a, a_scale, b, b_scale)) < 1e-3
    assert torch.equal(out, gemm.fp8_gemm(a, gemm.align_scales(a_scale), b, b_scale)), "the result is deterministic"


@on_hopper
@pytest.mark.parametrize("counts", [[64, 0, 192, 320], [0, 0, 0, 64], [1024, 128, 64, 0]])
def test_contiguous_groups(counts: list[int]) -> None:
    n, k = 256, 512
    offsets = torch.tensor([0, *counts]).cumsum(0).tolist()
    a, a_scale, _, _ = operands(offsets[-1] + 64, n, k)
    weights = [operands(1, n, k + 0 * g)[2:] for g in range(len(counts))]
    b = torch.stack([(w.float() * (g + 1)).clamp(-448, 448).to(E4M3) for g, (w, _) in enumerate(weights)])
    b_scale = torch.stack([s for _, s in weights])
    out = torch.full((offsets[-1] + 64, n), float("nan"), dtype=torch.bfloat16, device="cuda")
    on_device = torch.tensor(offsets, dtype=torch.int32, device="cuda")
    grouped_gemm.fp8_gemm_contiguous(a, a_scale, b, b_scale, on_device, out)
    expected = grouped_gemm.grouped_reference(a, a_scale, b, b_scale, offsets[:-1], offsets[1:])
    assert relative_error(out[: offsets[-1]], expected[: offsets[-1]]) < 1e-3
    assert out[offsets[-1] :].isnan().all(), "rows of no group stay as they are"


@on_hopper
@pytest.mark.parametrize(
    ("counts", "expected"), [([5, 0, 64, 33], 8), ([20, 31, 7, 64], 20), ([130, 250, 256, 1], 192)]
)
def test_masked_groups(counts: list[int], expected: int) -> None:
    n, k, room = 384, 768, 256
    a, a_scale, _, _ = operands(len(counts) * room, n, k)
    weights = [operands(g + 1, n, k)[2:] for g in range(len(counts))]
    b, b_scale = (torch.stack(each) for each in zip(*weights, strict=True))
    groups = torch.tensor(counts, dtype=torch.int32, device="cuda")
    shaped = a.view(len(counts), room, k), a_scale.view(len(counts), room, -1)
    out = grouped_gemm.fp8_gemm_masked(*shaped, b, b_scale, groups, expected)
    for g, count in enumerate(counts):
        if count:
            exact = gemm.reference(shaped[0][g, :count], shaped[1][g, :count], b[g], b_scale[g])
            assert relative_error(out[g, :count], exact) < 1e-3


@on_hopper
def test_captured_in_a_graph() -> None:
    a, a_scale, b, b_scale = operands(64, 2112, 7168)
    a_scale = gemm.align_scales(a_scale)
    out = torch.empty(64, 2112, dtype=torch.bfloat16, device="cuda")
    expected = gemm.fp8_gemm(a, a_scale, b, b_scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gemm.fp8_gemm(a, a_scale, b, b_scale, out)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)
