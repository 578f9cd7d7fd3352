"""Recorded decode steps give the numbers of the plain ones, bit by bit, in hidden states and in the cache."""

import random

import pytest
import torch

from tests.tiny import CONFIG, write_checkpoint
from tilery.models import cache as model_cache
from tilery.models.loader import load_model
from tilery.models.recorded import RecordedDecode
from tilery.models.step import Chunk, build_step
from tilery.ops import native, registry

OPS = registry.select()
pytestmark = pytest.mark.skipif(not native.records(OPS), reason="needs the C++ operators")
BLOCKS = 40
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.uint8}


class Pair:
    """The same steps twice: through `RecordedDecode` and through the model, on caches of their own."""

    def __init__(self, folder, cache="float32", block_size=64):
        self.model = load_model(folder, OPS, torch.float32)
        self.block_size = block_size
        slots = -(-BLOCKS * block_size // 64) * 64
        self.caches = [
            model_cache.allocate(self.model.config, slots, DTYPES[cache], self.model.cache_layers) for _ in range(2)
        ]
        self.recorded = RecordedDecode(self.model, self.caches[0], block_size)

    def fill(self):
        """Rows of random tokens in every block, as earlier requests leave them."""
        draw = random.Random(1)
        with torch.inference_mode():
            for first in range(0, BLOCKS, 4):
                ids = [draw.randrange(CONFIG["vocab_size"]) for _ in range(4 * self.block_size)]
                chunk = Chunk(ids, 0, range(first, first + 4))
                self.model.forward(build_step([chunk], self.block_size), self.caches[0])
            for one, other in zip(*self.caches):
                for source, target in zip(one.groups, other.groups):
                    target.copy_(source)

    def step(self, *chunks):
        """Whether it was replayed; raises if the two differ."""
        before = self.recorded.replayed
        with torch.inference_mode():
            got = self.recorded.forward(chunks)
            plain = self.model.forward(build_step(chunks, self.block_size), self.caches[1])
            if got is None:
                self.model.forward(build_step(chunks, self.block_size), self.caches[0])
            else:
                assert torch.equal(got, plain)
        for one, other in zip(*self.caches):
            for left, right in zip(one.groups, other.groups):
                assert torch.equal(left, right)
        return self.recorded.replayed > before


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    return {
        "fp8": write_checkpoint(folder / "fp8", fp8=True),
        "fp32": write_checkpoint(folder / "fp32"),
        "all rotated": write_checkpoint(folder / "rotated", index_head_dim=CONFIG["qk_rope_head_dim"]),
    }


@pytest.mark.parametrize(
    ("weights", "cache"), [("fp8", "fp8"), ("fp8", "bfloat16"), ("fp32", "float32"), ("fp32", "fp8")]
)
@pytest.mark.parametrize("start", [3, 200])  # dense, and beyond index_topk
def test_replays_equal_the_plain_steps(folders, weights, cache, start):
    pair = Pair(folders[weights], cache)
    pair.fill()
    draw = random.Random(start)
    replayed = []
    for position in range(start, start + 7):
        blocks = draw.sample(range(BLOCKS), BLOCKS)  # other slots each time
        replayed.append(pair.step(Chunk([draw.randrange(CONFIG["vocab_size"])], position, blocks)))
    assert replayed == [False, False, True, True, True, True, True]


def test_rows_of_several_requests_and_of_drafts(folders):
    pair = Pair(folders["fp8"], "fp8")
    pair.fill()
    draw = random.Random(2)
    replayed = 0
    for _ in range(30):
        blocks = iter(draw.sample(range(BLOCKS), BLOCKS))
        chunks = []
        for length in draw.choice([(1, 1, 1), (3, 1), (2, 2, 2, 2), (1, 1)]):
            start = draw.randrange(0, 150)
            own = [next(blocks) for _ in range(-(-(start + length) // 64))]
            chunks.append(Chunk([draw.randrange(CONFIG["vocab_size"]) for _ in range(length)], start, own))
        replayed += pair.step(*chunks)
    assert replayed > 5


def test_the_same_blocks_count_with_sparse_and_dense_attention_apart(folders):
    pair = Pair(folders["fp8"], block_size=48)  # index_topk is 32: both kinds within the first block
    pair.fill()
    for position in (10, 11, 40, 12, 41, 13, 42, 43, 14):
        pair.step(Chunk([5], position, [7, 3]))
    assert {key for key, tape in pair.recorded._tapes.items() if tape} == {(1, 48, False), (1, 48, True)}


def test_many_rows_take_the_plain_way(folders):
    pair = Pair(folders["fp8"])
    chunks = [Chunk([3], 5, [n]) for n in range(native.SMALL + 1)]
    for _ in range(3):
        assert pair.recorded.forward(chunks) is None
    assert pair.recorded._tapes == {}


def test_a_step_that_cannot_be_recorded_takes_the_plain_way(folders):
    pair = Pair(folders["all rotated"])  # no kernel for such indexer keys: torch computes the prolog
    pair.fill()
    for position in range(4, 9):
        assert not pair.step(Chunk([3], position, [7]))
    assert pair.recorded._tapes == {(1, 64, False): None}


def test_the_number_of_tapes_is_bounded(folders, monkeypatch):
    monkeypatch.setattr("tilery.models.recorded.TAPES", 2)
    pair = Pair(folders["fp8"], "fp8")
    pair.fill()
    for start in (0, 64, 0, 128):  # three kinds of steps, the first one used in between
        for position in range(start, start + 3):
            pair.step(Chunk([3], position, [9, 4, 1]))
    assert [key[1] for key in pair.recorded._tapes] == [64, 192]
