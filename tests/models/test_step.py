"""A step's layout: every number of every chunk where the model looks for it."""

import random

import pytest

from tilery.models.step import DECODE_TOKENS, Chunk, build_step, order_chunks


@pytest.mark.parametrize("seed", range(20))
def test_layout_of_random_chunks(seed):
    draw = random.Random(seed)
    block_size = draw.choice([1, 4, 16, 64])
    ids = iter(draw.sample(range(10_000), 5_000))
    chunks = []
    for _ in range(draw.randint(1, 6)):
        start, length = draw.choice([0, draw.randint(0, 90)]), draw.choice([1, 2, DECODE_TOKENS, 9, 40])
        blocks = [next(ids) for _ in range(-(-(start + length) // block_size) + draw.choice([0, 0, 2]))]
        chunks.append(Chunk([draw.randrange(99) for _ in range(length)], start, blocks))
    chunks = [chunks[i] for i in order_chunks(chunks)]
    step = build_step(chunks, block_size)

    def slots(chunk, stop, start=0):
        return [chunk.blocks[p // block_size] * block_size + p % block_size for p in range(start, stop)]

    assert step.token_ids.tolist() == [token for chunk in chunks for token in chunk.token_ids]
    assert step.positions.tolist() == [p for chunk in chunks for p in range(chunk.start, chunk.stop)]
    assert step.slots.tolist() == [s for chunk in chunks for s in slots(chunk, chunk.stop, chunk.start)]
    rows = [(chunk, stop) for chunk in chunks if chunk.decodes for stop in range(chunk.start + 1, chunk.stop + 1)]
    assert (step.decode is None) == (not rows)
    if step.decode is not None:
        longest = max(stop for _, stop in rows)
        assert (step.decode.count, step.decode.max_len) == (len(rows), longest)
        assert step.decode.lens.tolist() == [stop for _, stop in rows]
        width = -(-longest // block_size) * block_size
        assert step.decode.slots.tolist() == [slots(chunk, stop) + [-1] * (width - stop) for chunk, stop in rows]
    row = len(rows)
    prefills = [chunk for chunk in chunks if not chunk.decodes]
    assert len(step.prefills) == len(prefills)
    for segment, chunk in zip(step.prefills, prefills):
        assert (segment.start, segment.stop) == (row, row + len(chunk.token_ids))
        assert segment.slots.tolist() == slots(chunk, chunk.stop)
        row = segment.stop
