"""Products with quantised weights: references and plain arithmetic, kernels and references, choice, messages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tilery.ops import products, registry, scheduled_products
from tilery.ops.products import Int4Weight
from tilery.ops.quant import E4M3, quantize_blocks, quantize_groups
from tilery.ops.registry import Platform

REFERENCE = registry.select(overrides={"*": "reference"})
OPS = registry.select()
PRODUCTS = [
    "fp8_gemm", "fp8_grouped_gemm_contiguous", "fp8_grouped_gemm_masked", "int8_gemm", "int8_grouped_gemm",
    "int8_grouped_gemm_masked", "w4a16_gemm", "w4a16_grouped_gemm_masked", "w4a8_gemm", "w4a8_grouped_gemm_masked",
]  # fmt: skip
CUDA = Platform("cuda", "sm_90", True, 1)

tiled = pytest.mark.skipif(OPS.chosen["int8_gemm"] != "tile", reason="no C++ compiler here")


def draw(seed):
    return torch.Generator().manual_seed(seed)


def ints(seed, low, high, *shape, dtype=torch.int8):
    return torch.randint(low, high + 1, shape, generator=draw(seed)).to(dtype)


def fp8_rows(*shape, seed=0):
    values, scale = quantize_groups(torch.randn(shape, generator=draw(seed)).flatten(0, -2))
    return values.view(shape), scale.view(*shape[:-1], shape[-1] // 128)


def fp8_weights(*shape, seed=1):
    x = torch.randn(shape, generator=draw(seed))
    if len(shape) == 2:
        return quantize_blocks(x)
    pairs = [quantize_blocks(matrix) for matrix in x]
    values = torch.stack([b.view(torch.uint8) for b, _ in pairs]).view(E4M3)
    return values, torch.stack([scale for _, scale in pairs])


def int8_operands(a, b):
    scales = (torch.rand(shape[:-1], generator=draw(5)) * 0.02 + 0.001 for shape in (a, b))
    a_scale, b_scale = scales
    return ints(2, -127, 127, *a), a_scale, ints(3, -128, 127, *b), b_scale


def int4(*shape, zero=False, activations=torch.bfloat16, dtype=torch.bfloat16):
    """What `pack_int4` is given."""
    groups = (*shape[:-1], shape[-1] // 128)
    scale = (torch.rand(groups, generator=draw(7)) * 0.02 + 0.001).to(dtype)
    if zero:
        return ints(6, 0, 15, *shape), scale, ints(8, 0, 15, *groups), activations
    return ints(6, -8, 7, *shape), scale, None, activations


def numbers(*dims):
    return torch.tensor(dims, dtype=torch.int32)


def arguments(name, m, n, k=256):
    """Operands of the product `name`: m rows (3 experts of m + 3 at most where there are some), n outputs."""
    counts = numbers(m, 0, m + 3)
    bf16 = torch.randn(3, m + 3, k, generator=draw(4)).bfloat16()
    weights = products.pack_int4
    return {
        "fp8_gemm": lambda: (*fp8_rows(m, k), *fp8_weights(n, k)),
        "fp8_grouped_gemm_contiguous": lambda: (*fp8_rows(192, k), *fp8_weights(3, n, k), numbers(0, 64, 64, 128)),
        "fp8_grouped_gemm_masked": lambda: (*fp8_rows(3, m + 3, k), *fp8_weights(3, n, k), counts, m),
        "int8_gemm": lambda: int8_operands((m, k), (n, k)),
        "int8_grouped_gemm": lambda: (*int8_operands((384, k), (2, n, k)), numbers(1, -1, 0)),
        "int8_grouped_gemm_masked": lambda: (*int8_operands((3, m + 3, k), (3, n, k)), counts),
        "w4a16_gemm": lambda: (bf16[0, :m], weights(*int4(n, k, zero=True))),
        "w4a16_grouped_gemm_masked": lambda: (bf16, weights(*int4(3, n, k, zero=True)), counts),
        "w4a8_gemm": lambda: (*fp8_rows(m, k), weights(*int4(n, k, activations=E4M3))),
        "w4a8_grouped_gemm_masked": lambda: (
            *fp8_rows(3, m + 3, k), weights(*int4(3, n, k, activations=E4M3)), counts
        ),
    }[name]()  # fmt: skip


def written(name, out, m):
    """Which rows of a result the product writes."""
    rows = torch.ones(out.shape[:-1], dtype=torch.bool)
    if name.endswith("masked"):
        rows[0, m:], rows[1] = False, False
    elif name == "fp8_grouped_gemm_contiguous":
        rows[128:] = False
    elif name == "int8_grouped_gemm":
        rows[128:256] = False
    return rows


# ---- references against plain arithmetic -----------------------------------------------------------------------------


def test_fp8_is_the_product_of_what_the_quantisers_mean():
    a, a_scale, b, b_scale = arguments("fp8_gemm", 5, 136)
    out = REFERENCE.fp8_gemm(a, a_scale, b, b_scale, torch.empty(5, 136))
    for m, n in ((0, 0), (4, 127), (2, 128), (4, 135)):
        exact = 0.0
        for k in range(2):
            block = slice(128 * k, 128 * (k + 1))
            sums = sum(float(x) * float(y) for x, y in zip(a[m, block], b[n, block]))
            exact += sums * float(a_scale[m, k]) * float(b_scale[n // 128, k])
        assert float(out[m, n]) == pytest.approx(exact, rel=1e-6)
    assert REFERENCE.fp8_gemm(a, a_scale, b, b_scale).dtype == torch.bfloat16


def test_int8_is_exact():
    a, a_scale, b, b_scale = arguments("int8_gemm", 5, 24)
    out = REFERENCE.int8_gemm(a, a_scale, b, b_scale, torch.empty(5, 24))
    sums = (a.long()[:, None] * b.long()[None]).sum(2)
    torch.testing.assert_close(out.double(), sums * a_scale.double()[:, None] * b_scale.double(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("zero", [False, True])
def test_int4_is_what_was_packed(zero):
    q, scale, zeros, _ = int4(24, 256, zero=zero)
    weight = products.pack_int4(q, scale, zeros)
    exact = torch.empty(24, 256, dtype=torch.float64)
    for n in range(24):
        for i in range(256):
            exact[n, i] = (int(q[n, i]) - (int(zeros[n, i // 128]) if zero else 0)) * float(scale[n, i // 128])
    assert torch.equal(weight.double(), exact)
    a = torch.randn(3, 256, generator=draw(0)).bfloat16()
    out = REFERENCE.w4a16_gemm(a, weight, torch.empty(3, 24))
    torch.testing.assert_close(out.double(), a.double() @ exact.T, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in PRODUCTS if "grouped" in name])
def test_groups_are_products_of_their_own(name):
    given = arguments(name, 5, 24)
    plain = {"fp8": "fp8_gemm", "int8": "int8_gemm", "w4a16": "w4a16_gemm", "w4a8": "w4a8_gemm"}[name.split("_")[0]]
    out = getattr(REFERENCE, name)(*given)

    def part(x, e, rows):
        if isinstance(x, Int4Weight):
            zero = None if x.zero is None else x.zero[e]
            return replace(x, packed=x.packed[e], scale=x.scale[e], zero=zero, shape=x.shape[1:])
        return x[e] if rows is None else x[rows]

    if name.endswith("masked"):
        pieces = [((e, slice(count)), e) for e, count in enumerate((5, 0, 8))]
    elif name.startswith("fp8"):
        pieces = [(slice(0, 64), 0), (slice(64, 128), 2)]
    else:
        pieces = [(slice(0, 128), 1), (slice(256, 384), 0)]
    operands = given[: 2 if "w4a16" in name else 3 if "w4a8" in name else 4]
    activations = 1 if "w4a16" in name else 2
    for rows, e in pieces:
        own = [part(x, e, rows if i < activations else None) for i, x in enumerate(operands)]
        assert torch.equal(out[rows], getattr(REFERENCE, plain)(*own))


# ---- kernels of the tile language against references -----------------------------------------------------------------


@tiled
@pytest.mark.parametrize("name", PRODUCTS)
def test_kernels(name):
    """Few rows, one, none; counts of zero; partial blocks of outputs. In fp32, which hides nothing."""
    aligned = name in ("fp8_grouped_gemm_contiguous", "int8_grouped_gemm")
    for m, n in ((64, 130),) if aligned else ((0, 24), (1, 24), (5, 130)):
        given = arguments(name, m, n)
        shape = getattr(REFERENCE, name)(*given).shape
        exact, poisoned = torch.zeros(shape), torch.full(shape, float("nan"))
        getattr(REFERENCE, name)(*given, out=exact)
        out = getattr(OPS, name)(*given, out=poisoned)
        assert out is poisoned
        rows = written(name, out, m)
        torch.testing.assert_close(out[rows], exact[rows], rtol=1e-5, atol=1e-4)
        assert out[~rows].isnan().all()


@tiled
def test_scales_in_another_layout_and_results_in_bf16():
    a, a_scale, b, b_scale = arguments("fp8_gemm", 5, 24)
    columns = a_scale.T.contiguous().T
    assert columns.stride() == (1, 5)
    out = OPS.fp8_gemm(a, columns, b, b_scale)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, REFERENCE.fp8_gemm(a, a_scale, b, b_scale), rtol=2**-8, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("implementation", ["tile", "hopper"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_on_a_gpu(name, implementation):
    """Both ways there, in bf16, at a room of 64 rows."""
    platform = Platform.detect("cuda")
    if implementation == "hopper" and not platform.isa.startswith("sm_90"):
        pytest.skip("needs a Hopper GPU")
    ops = registry.select(platform, {"*": implementation})
    given = arguments(name, 61, 136, k=512)
    expected = getattr(REFERENCE, name)(*given).float()
    if name[0] == "w":  # the same numbers, packed as the implementation wants them
        plain = next(x for x in given if isinstance(x, Int4Weight))
        q = torch.cat((plain.packed & 15, plain.packed >> 4), dim=-1).flatten(-2).to(torch.int8)
        q = q if plain.zero is not None else q - 8
        own = ops.pack_int4(*(None if x is None else x.cuda() for x in (q, plain.scale, plain.zero)), plain.activations)
        given = tuple(own if x is plain else x for x in given)
    out = getattr(ops, name)(*(x.cuda() if isinstance(x, torch.Tensor) else x for x in given)).float().cpu()
    rows = written(name, out, 61)
    assert float((out[rows] - expected[rows]).norm() / expected[rows].norm()) < 4e-3


# ---- which implementation runs ---------------------------------------------------------------------------------------


def test_choice_on_a_cpu():
    chosen = registry.select(Platform("cpu", "AVX2", True, 1)).chosen
    assert {chosen[name] for name in PRODUCTS} <= {"tile", "reference"}
    assert chosen["pack_int4"] == "reference"
    (info,) = [info for info in registry.list_operators() if info.name == "w4a8_gemm"]
    assert ("hopper", "needs cuda, this is cpu") in [(row.name, row.reason) for row in info.implementations]


def test_choice_on_gpus():
    pytest.importorskip("triton")
    hopper, ampere = (registry.select(replace(CUDA, isa=isa)).chosen for isa in ("sm_90", "sm_80"))
    assert {hopper[name] for name in (*PRODUCTS, "pack_int4")} == {"hopper"}
    assert {ampere[name] for name in PRODUCTS} == {"tile"}
    assert ampere["pack_int4"] == "reference"


@tiled
@pytest.mark.parametrize("name", ["fp8_gemm", "int8_gemm", "w4a16_gemm", "w4a8_gemm"])
def test_what_is_not_for_hopper_goes_to_the_tile_language(name):
    """N = 12 is no multiple of 8; plain INT4 weights are not packed for Hopper."""
    given = arguments(name, 5, 12)
    out = torch.zeros(5, 12, dtype=torch.bfloat16 if name == "fp8_gemm" else torch.float32)
    getattr(scheduled_products, f"{name}_hopper")(*given, out=out)
    torch.testing.assert_close(out.float(), getattr(REFERENCE, name)(*given).float(), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "module", "function"),
    [
        ("fp8_gemm", "gemm", "fp8_gemm"),
        ("fp8_grouped_gemm_contiguous", "grouped_gemm", "fp8_gemm_contiguous"),
        ("fp8_grouped_gemm_masked", "grouped_gemm", "fp8_gemm_masked"),
        ("int8_gemm", "int8_gemm", "int8_gemm"),
        ("int8_grouped_gemm", "int8_gemm", "int8_grouped_gemm"),
        ("int8_grouped_gemm_masked", "int8_gemm", "int8_grouped_gemm_masked"),
        ("w4a16_gemm", "int4_gemm", "w4a16_gemm"),
        ("w4a16_grouped_gemm_masked", "int4_gemm", "w4a16_grouped_gemm_masked"),
        ("w4a8_gemm", "int4_gemm", "w4a8_gemm"),
        ("w4a8_grouped_gemm_masked", "int4_gemm", "w4a8_grouped_gemm_masked"),
    ],
)
def test_what_is_for_hopper_reaches_its_kernels(name, module, function, monkeypatch):
    """With the arguments in the host function's order: they are bound to its signature."""
    pytest.importorskip("triton.experimental.gluon")
    import importlib
    import inspect

    host = importlib.import_module(f"tilery.ops.hopper.{module}")
    signature = inspect.signature(getattr(host, function))
    seen = []
    monkeypatch.setattr(host, function, lambda *given: seen.append(signature.bind(*given).arguments))
    given = arguments(name, 61, 24)  # 64 rows of room
    if name[0] == "w":
        wide = name.endswith("masked")
        kind = E4M3 if "a8" in name else torch.bfloat16
        packed = scheduled_products.pack_int4(*int4(*((3, 24) if wide else (24,)), 256, activations=kind))
        assert not isinstance(packed, Int4Weight)
        given = tuple(packed if isinstance(x, Int4Weight) else x for x in given)
    contract = inspect.signature(getattr(products, name)).bind(*given).arguments
    getattr(scheduled_products, f"{name}_hopper")(*given)
    assert len(seen) == 1
    for key, value in contract.items():
        assert seen[0][key] is value


def test_weights_packed_for_hopper():
    pytest.importorskip("triton.experimental.gluon")
    from tilery.ops.hopper.int4_gemm import unpack_int4

    q, scale, zero, kind = int4(3, 24, 256, zero=True)
    back = unpack_int4(scheduled_products.pack_int4(q, scale, zero, kind))
    assert all(torch.equal(x, y) for x, y in zip(back, (q, scale, zero)))
    for odd in (int4(12, 128), int4(16, 128, zero=True, activations=E4M3)):
        assert isinstance(scheduled_products.pack_int4(*odd), Int4Weight)
    with pytest.raises(ValueError, match="the weight is not in the plain packing: take pack_int4 and the product from"):
        REFERENCE.w4a16_gemm(torch.zeros(1, 256).bfloat16(), scheduled_products.pack_int4(*int4(24, 256)))


# ---- messages --------------------------------------------------------------------------------------------------------


def refused(name, match, *given, **named):
    """By the reference and by the tile language's implementation."""
    for function in {getattr(REFERENCE, name), getattr(scheduled_products, name)}:
        with pytest.raises(ValueError, match=match):
            function(*given, **named)


def test_messages():
    a, a_scale, b, b_scale = arguments("fp8_gemm", 5, 136)
    refused("fp8_gemm", r"^a must be dense float8_e4m3fn \[any, any\], not bfloat16 \[5, 256\]$",
            a.bfloat16(), a_scale, b, b_scale)  # fmt: skip
    refused("fp8_gemm", r"^b must be dense float8_e4m3fn \[any, 256\], not float8_e4m3fn \[136, 128\], not dense$",
            a, a_scale, b[:, :128], b_scale)  # fmt: skip
    refused("fp8_gemm", r"^a_scale must be float32 \[5, 2\], not float32 \[5, 1\]", a, a_scale[:, :1], b, b_scale)
    refused("fp8_gemm", r"^b_scale must be dense float32 \[2, 2\], not float32 \[1, 2\]$", a, a_scale, b, b_scale[:1])
    refused("fp8_gemm", r"^out must be dense bfloat16 or float32 \[5, 136\], not float16 \[5, 136\]$",
            a, a_scale, b, b_scale, out=torch.empty(5, 136).half())  # fmt: skip
    odd = torch.zeros(2, 100).to(torch.int8)
    refused("int8_gemm", r"^the number of inputs must be a positive multiple of 128, not 100$",
            odd, torch.ones(2), odd, torch.ones(2))  # fmt: skip
    refused("fp8_grouped_gemm_masked", r"^b must have experts, \[E, N, K\], not \[136, 256\]$",
            a, a_scale, b, b_scale, numbers(1), 1)  # fmt: skip
    grouped = arguments("int8_grouped_gemm", 5, 24)
    refused("int8_grouped_gemm", r"^groups must be dense int32 \[3\], not int32 \[2\]$", *grouped[:4], grouped[4][:2])
    refused("int8_grouped_gemm", r"^a must be int8 \[M, K\], M a multiple of 128, not \[100, 256\]$",
            grouped[0][:100], *grouped[1:])  # fmt: skip


def test_messages_of_int4():
    weight = products.pack_int4(*int4(24, 256))
    a, a_scale = fp8_rows(5, 256)
    refused("w4a8_gemm", r"^the weight \[24, 256\] is packed for torch.bfloat16, not for torch.float8_e4m3fn in 2 dim",
            a, a_scale, weight)  # fmt: skip
    refused(
        "w4a16_gemm", r"^a must be dense bfloat16 \[any, 256\], not float32 \[1, 128\]$", torch.ones(1, 128), weight
    )
    refused("w4a16_grouped_gemm_masked", r"^the weight \[24, 256\] is packed for .*, not for .* in 3 dimensions$",
            torch.ones(1, 1, 256).bfloat16(), weight, numbers(1))  # fmt: skip
    q, scale, _, _ = int4(24, 256)
    for match, given in (
        (r"^weight_q must be in -8 .. 7$", (q + 8, scale)),
        (r"^weight_q must be in 0 .. 15$", (q, scale, torch.zeros(24, 2, dtype=torch.int8))),
        (r"^zero must be \[24, 2\] in 0 .. 15$", (q + 8, scale, torch.full((24, 2), 16))),
        (r"^scale must be bfloat16 or float32 \[24, 2\], not float16 \[24, 2\]$", (q, scale.half())),
        (r"^weight_q must be integers \[N, K\] or \[E, N, K\], not torch.float32 \[24, 256\]$", (q.float(), scale)),
        (r"^INT4 weights multiply bfloat16 or float8_e4m3fn activations, not torch.float16$",
         (q, scale, None, torch.float16)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            products.pack_int4(*given)
