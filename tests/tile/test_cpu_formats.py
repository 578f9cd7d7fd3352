"""The number formats and elementary functions of generated C++, against torch: every bit pattern, and wide samples."""

import ctypes

import numpy as np
import pytest
import torch

from tilery.tile.targets.cpu import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")

FORMATS = {
    "bf16": (torch.bfloat16, torch.uint16, float("inf")),
    "f16": (torch.float16, torch.uint16, float("inf")),
    "e4m3": (torch.float8_e4m3fn, torch.uint8, 448.0),
    "e5m2": (torch.float8_e5m2, torch.uint8, 57344.0),
}
FUNCTIONS = {
    "exp": (torch.exp, -110.0, 95.0, 2e-7), "exp2": (torch.exp2, -155.0, 130.0, 2e-7),
    "log": (torch.log, 0.0, 1e38, 2e-7), "log2": (torch.log2, 0.0, 1e38, 3e-7),
    "sigmoid": (torch.sigmoid, -100.0, 100.0, 3e-7), "tanh": (torch.tanh, -12.0, 12.0, 3e-7),
}  # fmt: skip


@pytest.fixture(scope="module")
def library():
    """One library with a loop per conversion and function."""
    text = '#include "tile.h"\n'
    for name, (_, kind, _) in FORMATS.items():
        bits = "uint16_t" if kind == torch.uint16 else "uint8_t"
        text += (
            f'extern "C" void decode_{name}(const {bits} *x, float *y, int64_t n) {{\n'
            f"#pragma omp simd\n for (int64_t i = 0; i < n; i++) y[i] = value_{name}(x[i]);\n}}\n"
            f'extern "C" void encode_{name}(const float *x, {bits} *y, int64_t n) {{\n'
            f"#pragma omp simd\n for (int64_t i = 0; i < n; i++) y[i] = bits_{name}(x[i]);\n}}\n"
            f'extern "C" void round_{name}(const float *x, float *y, int64_t n) {{\n'
            f"#pragma omp simd\n for (int64_t i = 0; i < n; i++) y[i] = round_{name}(x[i]);\n}}\n"
        ).replace(f"void round_{name}", f"void rounded_{name}")
    for name in FUNCTIONS:
        text += (
            f'extern "C" void f_{name}(const float *x, float *y, int64_t n) {{\n'
            f"#pragma omp simd\n for (int64_t i = 0; i < n; i++) y[i] = t_{name}(x[i]);\n}}\n"
        )
    return build.build(text, "formats", "-O2")


def call(library, name, x, out):
    getattr(library, name)(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(x.numel()))
    return out


@pytest.mark.parametrize("name", FORMATS)
def test_every_bit_pattern_decodes(library, name):
    dtype, kind, _ = FORMATS[name]
    count = 65536 if kind == torch.uint16 else 256
    bits = torch.arange(count, dtype=torch.int32).to(kind)
    got = call(library, f"decode_{name}", bits, torch.empty(count))
    torch.testing.assert_close(got, bits.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", FORMATS)
def test_encoding_rounds_to_nearest_even_and_saturates(library, name):
    """All representable values, the points halfway between neighbours, their neighbours, and random bit patterns."""
    dtype, kind, limit = FORMATS[name]
    count = 65536 if kind == torch.uint16 else 256
    values = torch.arange(count, dtype=torch.int32).to(kind).view(dtype).float()
    finite = values[values.isfinite()].double().sort().values.unique()
    middle = ((finite[1:] + finite[:-1]) / 2).float()
    generator = torch.Generator().manual_seed(0)
    wild = (
        torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=generator, dtype=torch.int64)
        .to(torch.int32)
        .view(torch.float32)
    )
    special = torch.tensor(
        [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-45, 3.4e38, 65519.0, 65520.0]
    )
    up, down = torch.tensor(float("inf")), torch.tensor(-float("inf"))
    x = torch.cat([values, middle, torch.nextafter(middle, up), torch.nextafter(middle, down), wild, special])
    wanted = x.clamp(-limit, limit).to(dtype)
    got = call(library, f"encode_{name}", x, torch.empty(x.shape, dtype=kind))
    nan = x.isnan()
    assert bool(got.view(dtype).float()[nan].isnan().all())
    same = got[~nan].to(torch.int32) == wanted.view(kind)[~nan].to(torch.int32)
    assert bool(same.all()), x[~nan][~same][:5]
    rounded = call(library, f"rounded_{name}", x, torch.empty_like(x))
    torch.testing.assert_close(rounded, wanted.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementary_functions_are_accurate(library, name):
    function, low, high, tolerance = FUNCTIONS[name]
    x = torch.linspace(low, high, 200_003)
    if low == 0.0:
        x = torch.cat([torch.logspace(-44, 38, 100_000), torch.linspace(0.5, 2.0, 100_000)])
    x = torch.cat([x, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1.0, 1.0])])
    wanted = function(x.double()).float()
    got = call(library, f"f_{name}", x, torch.empty_like(x))
    assert torch.equal(got.isnan(), wanted.isnan())
    infinite = wanted.isinf()
    assert torch.equal(got[infinite], wanted[infinite])
    ok = wanted.isfinite()
    error = (got[ok].double() - wanted[ok].double()).abs()
    normal = wanted[ok].abs() > 1.2e-38
    relative = error[normal] / wanted[ok].double().abs()[normal]
    assert relative.max() < tolerance, (float(relative.max()), float(x[ok][normal][relative.argmax()]))
    tiny = 1.2e-38 if name == "sigmoid" else 3e-45  # the quotient 1 / inf is 0
    assert bool((error[~normal] < tiny).all())


def test_rounding_matches_numpy_for_f16(library):
    x = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    got = call(library, "encode_f16", torch.from_numpy(x), torch.empty(5000, dtype=torch.uint16))
    assert (got.numpy() == x.astype(np.float16).view(np.uint16)).all()
