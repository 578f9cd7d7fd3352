"""The table of operations: up to date, complete, and true."""

import inspect
import re

import pytest

from tilery import tile
from tilery.tile import Dim, Static, Tensor, f32
from tilery.tile.lang import TensorRef, Tile
from tilery.tile.optable import GROUPS, PAGE, State, main, render
from tilery.tile.signature import Specialisation

ROWS = [row for group in GROUPS for row in group.rows]
N = Dim("N")


def test_the_committed_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run python -m tilery.tile.optable"
    assert main(["--check"]) == 0


def test_every_operation_stands_there_once() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names))
    assert len(names) > 150
    for row in ROWS:
        assert row.how


def test_names_that_are_given_exist() -> None:
    """`tile.x`, `tile.lib.x`, `tensor.x` and `x.x` in the last column are attributes of what they say."""
    owners = {"tile": tile, "tile.lib": tile.lib, "tensor": TensorRef, "x": Tile, "y": TensorRef, "kv": TensorRef}
    for row in ROWS:
        if row.state is State.NOT_PLANNED:
            continue
        found = 0
        for code in re.findall(r"`([^`]*)`", row.how):
            for owner, name in re.findall(r"\b(tile\.lib|tile|tensor|x|y|kv)\.(?!lib\b)([a-zA-Z]\w*)", code):
                assert hasattr(owners[owner], name), f"{row.name}: {owner}.{name} does not exist"
                found += 1
        if row.state is State.DONE and not found:
            assert re.search(r"[a-z] ?\S{1,2} ?[a-z]|~a|\[", row.how), row


UNARY = (
    "abs sign reciprocal neg exp exp2 expm1 log log2 log10 log1p sqrt rsqrt cbrt sin cos tan sinh cosh tanh asin acos "
    "atan asinh acosh atanh erf round floor ceil trunc sigmoid"
)


@tile.kernel
def apply(x: Tensor[N, f32], f: Static[object]):
    y = tile.empty([N], f32)
    for n in tile.parallel(tile.blocks(N, "n")):
        y[n] = f(x[n]).to(f32)
    return y


@pytest.mark.parametrize("row", [r for r in ROWS if r.state is State.DONE and r.how == f"`tile.{r.name}`"], ids=str)
def test_functions_that_are_done_trace(row: object) -> None:
    """Each one makes IR; what it computes is tested elsewhere."""
    name = row.name  # type: ignore[attr-defined]
    function = getattr(tile, name)
    arguments = {
        "arange": lambda x: x + tile.sum(function(4)),
        "full": lambda x: function(list(x.shape), 1, f32),
        "zeros": lambda x: function(list(x.shape), f32),
        "where": lambda x: function(x > 0, x, 0),
    }
    one = len([p for p in inspect.signature(function).parameters.values() if p.default is p.empty]) == 1
    body = arguments.get(name, (lambda x: _spread(function(x), x)) if one else (lambda x: function(x, x)))
    apply.trace(Specialisation((("x", f32),), (("f", body),)))


def _spread(value: Tile, like: Tile) -> Tile:
    return value if value.shape else value.broadcast_to(*like.shape)


@pytest.mark.parametrize("name", UNARY.split())
def test_elementwise_functions_are_torchs(name: str) -> None:
    torch = pytest.importorskip("torch")
    x = torch.rand(20) * 0.9 + 0.05
    x = x + 1.0 if name == "acosh" else x
    theirs = {"cbrt": lambda v: v ** (1 / 3)}.get(name) or getattr(torch, name)
    body = getattr(tile, name)
    torch.testing.assert_close(apply.interpret(x, body), theirs(x), rtol=2e-6, atol=2e-6)
