"""Recorded C calls: replays compute anew on what the memory now holds; what a tape cannot repeat is refused."""

import pytest
import torch

from tilery import tile
from tilery.tile import Dim, InOut, Static, Tensor, f32, i32
from tilery.tile.targets.cpu import build
from tilery.tile.targets.cpu.tape import Arena, NotRecordable, Recording

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
T, H, B = Dim("T"), Dim("H"), Dim("B")
FIRST, ONES, BITS = torch.tensor([0]), torch.ones(2, 16), torch.tensor([5])


@tile.kernel
def scaled(x: Tensor[T, H, f32], factor: float, more: int = 0):
    y = tile.empty([T, H], f32)
    for t in tile.parallel(tile.blocks(T, "row")):
        y[t, :] = x[t, :] * factor + more
    return y


@tile.kernel
def both(x: Tensor[T, H, f32], y: Tensor[T, H, f32]):
    total, product = tile.empty([T, H], f32), tile.empty([T, H], f32)
    for t in tile.parallel(tile.blocks(T, "row")):
        total[t, :] = x[t, :] + y[t, :]
        product[t, :] = x[t, :] * y[t, :]
    return total, product


@tile.kernel
def add_to(rows: InOut[B, H, f32], x: Tensor[T, H, f32], where: Tensor[T, i32]):
    for t in tile.parallel(T):
        rows[where[t], :] = x[t, :]


@tile.kernel
def spread(x: Tensor[T, H, f32], where: Tensor[T, i32], like: Tensor[B, f32], start: Static[float]):
    rows = tile.empty([B, H], f32, init=start)
    for t in tile.parallel(T):
        rows[where[t], :] = x[t, :]
    return rows


def record(run):
    """(what the code returned, its tape), the tape's memory full of NaN."""
    recording = Recording()
    with torch.inference_mode(), recording:
        made = run()
    outputs = made if isinstance(made, tuple) else (made,)
    tape = recording.tape(outputs, Arena())
    tape._memory.fill_(255)
    return outputs, tape


def chain(x, steps=12):
    for number in range(steps):
        x = scaled(x, 0.5, number)
    return x


def test_a_replay_computes_on_new_numbers():
    x = torch.randn(3, 40)
    (first,), tape = record(lambda: chain(x))
    assert torch.equal(first, chain(x))
    x.copy_(torch.randn(3, 40))
    tape.run()
    assert torch.equal(tape.outputs[0], chain(x))
    assert not torch.equal(tape.outputs[0], first)
    assert len(tape) == 12


def test_what_is_not_needed_at_once_shares_memory():
    x = torch.randn(64, 40)
    recording = Recording()
    with recording:
        out = chain(x, 20)
    size = x.numel() * x.element_size()
    arena = Arena()
    recording.tape([out], arena)
    assert size <= len(arena.memory) < 4 * size


def test_several_outputs_views_and_memory_from_outside():
    x, rows, where = torch.randn(4, 48), torch.zeros(9, 16), torch.tensor([7, 2, 5, 0], dtype=torch.int32)

    def run():
        y = torch.empty(4, 48)
        left, right = scaled(x, 2.0)[:, :16], x.view(4, 3, 16)[:, 1]
        total, product = both(left, right)
        add_to(rows, total, where)
        return product, both(product, total)[1][1:3], y

    with pytest.raises(NotRecordable, match="not what a recorded call wrote"):
        record(run)
    _, tape = record(lambda: run()[:2])
    x.copy_(torch.randn(4, 48))
    rows.zero_()
    tape.run()
    total, product = 2 * x[:, :16] + x[:, 16:32], 2 * x[:, :16] * x[:, 16:32]
    assert torch.equal(rows[where.long()], total)
    assert torch.equal(tape.outputs[0], product)
    assert torch.equal(tape.outputs[1], (product * total)[1:3])


def test_a_larger_tape_leaves_the_memory_of_others_alone():
    x, wide, arena = torch.randn(2, 16), torch.randn(200, 16), Arena()
    tapes = []
    for given in (x, wide, x):
        recording = Recording()
        with recording:
            out = chain(given)
        tapes.append((given, recording.tape([out], arena)))
    for given, tape in tapes:
        tape.run()
        assert torch.equal(tape.outputs[0], chain(given))


def test_tapes_that_grow_one_by_one_share_memory():
    arena, kept = Arena(), {}
    for rows in range(1, 200):
        memory = arena.reserve(64 * rows)
        assert len(memory) >= 64 * rows
        kept[memory.untyped_storage().data_ptr()] = memory.untyped_storage().nbytes()
    assert sum(kept.values()) < 4 * (64 * rows + 64)


def test_memory_that_starts_as_zeros_does_so_in_every_replay():
    x, where, like = torch.randn(2, 16), torch.tensor([4, 1], dtype=torch.int32), torch.empty(6)
    (first,), tape = record(lambda: spread(x, where, like, 0.0))
    where.copy_(torch.tensor([0, 3]))
    tape.run()
    assert torch.equal(first[[4, 1]], x)
    assert torch.equal(tape.outputs[0], spread(x, where, like, 0.0))
    with pytest.raises(NotRecordable, match="full of 1"), Recording():
        spread(x, where, like, 1.0)


@pytest.mark.parametrize(
    ("said", "run"),
    [
        ("torch's add computes", lambda x: scaled(x + 1, 2.0)),
        ("torch's cat computes", lambda x: scaled(torch.cat((x, x)), 2.0)),
        ("torch's clone computes", lambda x: scaled(x.clone(), 2.0)),
        ("torch's zeros computes", lambda x: scaled(torch.zeros(2, 16), 2.0)),
        ("torch's mul_ computes", lambda x: scaled(x.mul_(1), 2.0)),
        ("torch's add computes", lambda x: torch.add(x, x, out=torch.empty(2, 16))),
        ("torch's to computes", lambda x: x.to(torch.float64)),
        ("torch's __getitem__ computes", lambda x: scaled(x[FIRST], 2.0)),
        ("torch's __setitem__ reads or writes numbers", lambda x: x.__setitem__(0, 1.0)),
        ("torch's item reads or writes numbers", lambda x: scaled(x, x[0, 0].item())),
        ("torch's tolist reads or writes numbers", lambda x: x.tolist()),
        ("torch's __bool__ reads or writes numbers", lambda x: bool(x[0, 0])),
        ("torch's __ior__ computes", lambda x: scaled(x, 2.0) is x or BITS.__ior__(BITS)),
        ("torch's relu computes", lambda x: torch.nn.functional.relu(x, inplace=True)),
        ("scaled is called with options", lambda x: scaled(x, 2.0, out=torch.empty(2, 16))),
    ],
)  # fmt: skip
def test_what_a_tape_cannot_repeat_is_refused(said, run):
    x = torch.ones(2, 16)
    with pytest.raises(NotRecordable, match=said), Recording():
        run(x)
    assert torch.equal(scaled(x, 2.0), torch.full((2, 16), 2.0))  # nothing is recorded any more


def test_bad_arguments_are_refused_as_ever():
    from tilery.tile.errors import LaunchError

    with pytest.raises(LaunchError, match="argument 'y' is missing"), Recording():
        both(ONES)


def test_without_a_compiler(monkeypatch):
    @tile.kernel
    def doubled(x: Tensor[T, H, f32]):
        y = tile.empty([T, H], f32)
        for t in tile.parallel(tile.blocks(T, "row")):
            y[t, :] = x[t, :] * 2.0
        return y

    monkeypatch.setenv(build.DISABLE, "1")
    with pytest.raises(NotRecordable, match="doubled is not compiled"), Recording():
        doubled(ONES)
