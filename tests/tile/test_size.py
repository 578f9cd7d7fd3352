"""Symbolic sizes: exact arithmetic, a normal form, bounds, and a printed form that parses back."""

import ast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilery.tile.errors import LaunchError, TraceError
from tilery.tile.size import Dim, Size, as_size, cdiv, parse_size

T, H, K = Dim("T"), Dim("H", multiple_of=128), Dim("K", min=1, max=64, multiple_of=4)
DIMS = {d.name: d for d in (T, H, K)}


def sizes() -> st.SearchStrategy[Size]:
    leaves = st.one_of(st.integers(-300, 300).map(as_size), st.sampled_from([T, H, K]).map(as_size))

    def grow(inner: st.SearchStrategy[Size]) -> st.SearchStrategy[Size]:
        pairs = st.tuples(inner, inner)
        return st.one_of(
            pairs.map(lambda p: p[0] + p[1]),
            pairs.map(lambda p: p[0] - p[1]),
            pairs.map(lambda p: p[0] * p[1]),
            st.tuples(inner, st.sampled_from([1, 2, 3, 4, 16, 128, 384])).map(lambda p: p[0] // p[1]),
            st.tuples(inner, st.sampled_from([1, 2, 5, 64])).map(lambda p: p[0] % p[1]),
        )

    return st.recursive(leaves, grow, max_leaves=6)


environments = st.fixed_dictionaries(
    {
        "T": st.integers(0, 500),
        "H": st.integers(0, 9).map(lambda n: 128 * n),
        "K": st.integers(1, 16).map(lambda n: 4 * n),
    }
)


@settings(max_examples=200)
@given(a=sizes(), b=sizes(), env=environments, divisor=st.sampled_from([1, 2, 3, 64, 128]))
def test_arithmetic_is_exact(a: Size, b: Size, env: dict[str, int], divisor: int) -> None:
    x, y = a.evaluate(env), b.evaluate(env)
    assert (a + b).evaluate(env) == x + y
    assert (a - b).evaluate(env) == x - y
    assert (a * b).evaluate(env) == x * y
    assert (a // divisor).evaluate(env) == x // divisor
    assert (a % divisor).evaluate(env) == x % divisor
    assert cdiv(a, divisor).evaluate(env) == -(-x // divisor)
    assert a.factor == 0 or x % a.factor == 0
    assert a.bind(env).const == x


@settings(max_examples=200)
@given(a=sizes(), b=sizes(), c=sizes())
def test_equal_sizes_compare_equal(a: Size, b: Size, c: Size) -> None:
    assert a + b == b + a
    assert (a + b) * c == a * c + b * c
    assert a - a == Size()
    assert (a * 128) // 128 == a
    assert hash(a * b) == hash(b * a)


@settings(max_examples=300)
@given(a=sizes())
def test_the_printed_form_parses_back(a: Size) -> None:
    assert parse_size(ast.parse(str(a), mode="eval").body, DIMS) == a


def test_known_divisors_divide() -> None:
    assert H.size == H // 128 * 128
    assert T.size != (T // 128) * 128
    assert (H + 4) // 128 == H // 128
    assert Size() == H % 64
    assert (3 * H + 256).factor == 128
    assert str(H // 128) == "(H // 128)"
    assert str(2 * H - 1) == "2 * H + -1"
    assert (as_size(1) - T, K + 2, 2 * H, H * T) == (1 - T, 2 + K, H * 2, T * H)
    assert as_size(0).const == 0
    assert T.size.const is None


def test_checks() -> None:
    K.check(64, "k: x.shape[0]")
    for value, message in (
        (0, "k: x.shape[0]: dimension K must be at least 1 and at most 64, got 0"),
        (68, "k: x.shape[0]: dimension K must be at least 1 and at most 64, got 68"),
        (6, "k: x.shape[0]: dimension K must be a multiple of 4, got 6"),
    ):
        with pytest.raises(LaunchError) as caught:
            K.check(value, "k: x.shape[0]")
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dim("two words"), "a Dim's name must be a Python identifier, got 'two words'"),
        (lambda: Dim("lambda"), "a Dim's name must be a Python identifier, got 'lambda'"),
        (lambda: Dim("A", multiple_of=0), "Dim 'A': multiple_of must be at least 1, got 0"),
        (lambda: T // 0, "a size can only be divided by a positive Python int, got 0"),
        (lambda: T // 1.5, "a size can only be divided by a positive Python int, got 1.5"),
        (lambda: T + 1.5, "expected a size (an int, a Dim or arithmetic of them), got float 1.5"),
        (lambda: as_size(True), "expected a size (an int, a Dim or arithmetic of them), got bool True"),
        (lambda: parse_size(ast.parse("Q + 1", mode="eval").body, DIMS), "not a size: Q"),
        (lambda: parse_size(ast.parse("T // H", mode="eval").body, DIMS), "not a size: T // H"),
        (lambda: parse_size(ast.parse("T // 0", mode="eval").body, DIMS), "not a size: T // 0"),
    ],
)
def test_errors(make, message: str) -> None:
    with pytest.raises(TraceError) as caught:
        make()
    assert caught.value.message == message
