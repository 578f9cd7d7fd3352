"""What is asked, and when: lengths, sharing, clipping, and the two trace formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilery.cli.bench.dataset import (
    MOONCAKE_BLOCK,
    TokenSource,
    arrival_times,
    azure_workload,
    clip,
    mooncake_workload,
    random_workload,
    text_workload,
)
from tilery.cli.errors import CliError

SOURCE = TokenSource.from_vocabulary(1000)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_random_lengths_are_exact_and_ids_safe() -> None:
    work = random_workload(SOURCE, rng(), 20, 30, 7)
    assert {(len(r.prompt), r.prompt_len, r.output_len) for r in work.requests} == {(30, 30, 7)}
    ids = {token for r in work.requests for token in r.prompt}
    assert min(ids) >= 100
    assert max(ids) < 900


def test_random_range_covers_its_ends() -> None:
    work = random_workload(SOURCE, rng(), 3000, 10, 100, range_ratio=0.25)
    assert {r.prompt_len for r in work.requests} == set(range(7, 14))  # floor(7.5) .. ceil(12.5)
    assert (min(r.output_len for r in work.requests), max(r.output_len for r in work.requests)) == (75, 125)


def test_random_prefix_is_shared_and_comes_on_top() -> None:
    first, second = random_workload(SOURCE, rng(), 2, 30, 7, prefix_len=16).requests
    assert first.prompt[:16] == second.prompt[:16]
    assert first.prompt[16:] != second.prompt[16:]
    assert first.prompt_len == len(first.prompt) == 46


def test_same_seed_same_prompts() -> None:
    assert random_workload(SOURCE, rng(3), 5, 9, 2) == random_workload(SOURCE, rng(3), 5, 9, 2)
    assert random_workload(SOURCE, rng(3), 5, 9, 2) != random_workload(SOURCE, rng(4), 5, 9, 2)


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(2, 4000))
def test_clip_fits_and_leaves_short_ones_alone(tokens_in: int, tokens_out: int, limit: int) -> None:
    fitted = clip(tokens_in, tokens_out, limit)
    assert min(fitted) >= 1
    assert sum(fitted) <= limit
    if tokens_in >= 1 and tokens_out >= 1 and tokens_in + tokens_out <= limit:
        assert fitted == (tokens_in, tokens_out)
    if tokens_out <= limit // 2:
        assert fitted[1] == max(1, tokens_out)


def test_clip_without_a_limit() -> None:
    assert clip(10**6, 10**6, None) == (10**6, 10**6)


def test_text_lines_repeat(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo\n")
    assert [r.prompt for r in text_workload(path, 3, 9).requests] == ["one", "two", "one"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "x", "output_tokens": 3}\n{"prompt": "y"}\n')
    assert [(r.prompt, r.output_len) for r in text_workload(lines, 2, 9).requests] == [("x", 3), ("y", 9)]


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:00,90,16
"""


def test_azure_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(AZURE)
    work = azure_workload(path, SOURCE, rng(), 2, None, time_scale=2.0)
    assert [(r.prompt_len, len(r.prompt), r.output_len) for r in work.requests] == [(374, 374, 44), (396, 396, 109)]
    assert [r.arrival for r in work.requests] == pytest.approx([0.0, 4.314579 / 2], abs=1e-6)
    assert work.clipped == 0


def test_azure_trace_is_clipped_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(AZURE)
    work = azure_workload(path, SOURCE, rng(), 3, 400)
    assert work.clipped == 2
    assert [(r.prompt_len, r.output_len) for r in work.requests] == [(356, 44), (291, 109), (90, 16)]


def mooncake(path: Path, *rows: tuple[int, int, int, list[int]]) -> Path:
    keys = ("timestamp", "input_length", "output_length", "hash_ids")
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    return path


def test_mooncake_equal_hashes_are_equal_blocks(tmp_path: Path) -> None:
    path = mooncake(tmp_path / "t.jsonl", (500, 1100, 20, [0, 1, 2]), (3500, 1030, 30, [0, 1, 9]), (3500, 5, 3, [0]))
    work = mooncake_workload(path, SOURCE, 0, 10, None)
    first, second, third = (r.prompt for r in work.requests)
    assert [r.prompt_len for r in work.requests] == [len(first), len(second), len(third)] == [1100, 1030, 5]
    assert first[: 2 * MOONCAKE_BLOCK] == second[: 2 * MOONCAKE_BLOCK]
    assert first[2 * MOONCAKE_BLOCK : 1030] != second[2 * MOONCAKE_BLOCK :]
    assert first[:MOONCAKE_BLOCK] != first[MOONCAKE_BLOCK : 2 * MOONCAKE_BLOCK]
    assert third == first[:5]
    assert [r.arrival for r in work.requests] == [0.0, 3.0, 3.0]


def test_mooncake_clipping_keeps_the_shared_beginning(tmp_path: Path) -> None:
    path = mooncake(tmp_path / "t.jsonl", (0, 5000, 20, list(range(10))), (0, 700, 20, [0, 77]))
    whole = mooncake_workload(path, SOURCE, 0, 10, None).requests
    short = mooncake_workload(path, SOURCE, 0, 10, 1000)
    assert short.clipped == 1
    assert short.requests[0].prompt == whole[0].prompt[:980]
    assert short.requests[1] == whole[1]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.jsonl", "{}\n", "row 1 is malformed"),
        ("t.jsonl", "not json\n", "row 1 is malformed"),
        ("t.jsonl", "\n", "holds no requests"),
        ("t.jsonl", '{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1]}\n', "cannot make 600"),
    ],
)
def test_bad_mooncake_files(tmp_path: Path, name: str, content: str, says: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(CliError, match=says):
        mooncake_workload(path, SOURCE, 0, 10, None)


def test_bad_azure_files(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(CliError, match="columns TIMESTAMP"):
        azure_workload(path, SOURCE, rng(), 1, None)
    with pytest.raises(CliError, match="cannot be read"):
        azure_workload(tmp_path / "absent.csv", SOURCE, rng(), 1, None)


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_arrivals_have_the_rate_and_the_variation(burstiness: float, variation: float) -> None:
    """A gamma of shape k has the coefficient of variation 1/sqrt(k); a Poisson process has k = 1."""
    gaps = np.diff(arrival_times(40_000, 8.0, burstiness, rng(1)))
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05)


def test_arrivals_begin_at_zero_and_infinite_rate_is_at_once() -> None:
    assert arrival_times(5, 2.0, 1.0, rng())[0] == 0.0
    assert arrival_times(5, float("inf"), 1.0, rng()).tolist() == [0.0] * 5
