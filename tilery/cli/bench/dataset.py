"""What to ask, and when: random tokens, texts from a file, and two published traces.

A prompt is either text or token ids. Random and trace prompts are ids drawn from a `TokenSource`, so that their length
is exact on every server without a tokenizer here.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import numpy as np

from tilery.cli.errors import CliError

Row = TypeVar("Row")
Parsed = TypeVar("Parsed")

MOONCAKE_BLOCK = 512
"""Tokens that one `hash_ids` entry of a Mooncake trace stands for."""


class DatasetName(StrEnum):
    RANDOM = "random"
    TEXT = "text"
    AZURE = "azure"
    MOONCAKE = "mooncake"


@dataclass(frozen=True)
class BenchRequest:
    prompt: str | list[int]
    prompt_len: int
    """Tokens; 0 for text, whose length only the server knows."""
    output_len: int
    arrival: float | None = None
    """Seconds after the first request; None where the dataset has no clock of its own."""


@dataclass(frozen=True)
class Workload:
    requests: list[BenchRequest]
    clipped: int = 0
    """Requests shortened to the server's context."""


@dataclass(frozen=True)
class TokenSource:
    """The ids that random prompts are drawn from, each as likely as another."""

    ids: np.ndarray

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        return self.ids[rng.integers(0, len(self.ids), count)].tolist()

    @staticmethod
    def from_vocabulary(size: int) -> TokenSource:
        """The middle eight tenths: special tokens stand at the ends of a vocabulary."""
        margin = size // 10
        return TokenSource(np.arange(margin, size - margin))


# ---- lengths -----------------------------------------------------------------------------------------------------


def clip(input_len: int, output_len: int, limit: int | None) -> tuple[int, int]:
    """Shortens to `limit` tokens in all: the output to at most half of it, then the input to what remains.

    Both stay at least 1. A prompt loses its end, so that shared beginnings stay shared.
    """
    input_len, output_len = max(1, input_len), max(1, output_len)
    if limit is None or input_len + output_len <= limit:
        return input_len, output_len
    output_len = min(output_len, max(1, limit // 2))
    return max(1, min(input_len, limit - output_len)), output_len


# ---- datasets ----------------------------------------------------------------------------------------------------


def random_workload(
    source: TokenSource,
    rng: np.random.Generator,
    count: int,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
) -> Workload:
    """`count` prompts of random ids behind one common prefix.

    Lengths are uniform over the integers in [floor(n (1 - r)), ceil(n (1 + r))], at least 1; the prefix comes on top.
    """

    def lengths(mean: int) -> np.ndarray:
        low, high = math.floor(mean * (1 - range_ratio)), math.ceil(mean * (1 + range_ratio))
        return np.maximum(1, rng.integers(low, high + 1, count))

    prefix = source.draw(rng, prefix_len)
    requests = []
    for tokens_in, tokens_out in zip(lengths(input_len).tolist(), lengths(output_len).tolist(), strict=True):
        requests.append(BenchRequest(prefix + source.draw(rng, tokens_in), prefix_len + tokens_in, tokens_out))
    return Workload(requests)


def text_workload(path: Path, count: int, output_len: int) -> Workload:
    """One prompt per non-empty line; in a .jsonl file the line's "prompt", and "output_tokens" if it has one.

    Starts again at the top when the file has fewer than `count`.
    """

    def parse(line: str) -> BenchRequest:
        if path.suffix != ".jsonl":
            return BenchRequest(line, 0, output_len)
        row = json.loads(line)
        return BenchRequest(str(row["prompt"]), 0, int(row.get("output_tokens", output_len)))

    rows = _parse_lines(path, _lines(path), parse, "one prompt per line, or JSON objects with a `prompt`")
    return Workload([rows[i % len(rows)] for i in range(count)])


def azure_workload(
    path: Path, source: TokenSource, rng: np.random.Generator, count: int, limit: int | None, time_scale: float = 1.0
) -> Workload:
    """The first `count` rows of an Azure LLM inference trace: CSV with TIMESTAMP, ContextTokens, GeneratedTokens.

    The trace tells lengths and times only; prompts are random and share nothing. `time_scale` 2 replays twice as fast.
    """
    rows = csv.DictReader(_lines(path))
    parsed = _parse_lines(
        path,
        rows,
        lambda row: (_timestamp(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"])),
        "columns TIMESTAMP, ContextTokens, GeneratedTokens",
        count,
    )
    start = parsed[0][0]
    requests, clipped = [], 0
    for when, tokens_in, tokens_out in parsed:
        fitted = clip(tokens_in, tokens_out, limit)
        clipped += fitted != (tokens_in, tokens_out)
        requests.append(BenchRequest(source.draw(rng, fitted[0]), *fitted, arrival=(when - start) / time_scale))
    return Workload(requests, clipped)


def mooncake_workload(
    path: Path, source: TokenSource, seed: int, count: int, limit: int | None, time_scale: float = 1.0
) -> Workload:
    """The first `count` rows of a Mooncake trace: lines with timestamp (ms), input_length, output_length, hash_ids.

    Equal hash ids become equal blocks of 512 tokens, so a prefix cache sees the sharing that the trace recorded.
    """

    def parse(line: str) -> tuple[float, int, int, list[int]]:
        row = json.loads(line)
        return row["timestamp"] / 1000, int(row["input_length"]), int(row["output_length"]), list(row["hash_ids"])

    parsed = _parse_lines(
        path, _lines(path), parse, "JSON lines with timestamp, input_length, output_length, hash_ids", count
    )
    start = parsed[0][0]
    blocks: dict[int, list[int]] = {}

    def block(hash_id: int) -> list[int]:
        if hash_id not in blocks:
            blocks[hash_id] = source.draw(np.random.default_rng([seed, hash_id]), MOONCAKE_BLOCK)
        return blocks[hash_id]

    requests, clipped = [], 0
    for when, tokens_in, tokens_out, hash_ids in parsed:
        fitted = clip(tokens_in, tokens_out, limit)
        clipped += fitted != (tokens_in, tokens_out)
        needed = math.ceil(fitted[0] / MOONCAKE_BLOCK)
        if len(hash_ids) < needed:
            raise CliError(f"--dataset-path {path}: {len(hash_ids)} hash_ids cannot make {fitted[0]} tokens.")
        prompt = [token for hash_id in hash_ids[:needed] for token in block(hash_id)][: fitted[0]]
        requests.append(BenchRequest(prompt, *fitted, arrival=(when - start) / time_scale))
    return Workload(requests, clipped)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"--dataset-path {path}: cannot be read as text ({error}).") from error


def _parse_lines(
    path: Path, rows: Iterable[Row], parse: Callable[[Row], Parsed], expected: str, count: int | None = None
) -> list[Parsed]:
    parsed: list[Parsed] = []
    for number, row in enumerate(rows, start=1):
        if count is not None and len(parsed) == count:
            break
        try:
            parsed.append(parse(row))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CliError(f"--dataset-path {path}: row {number} is malformed; expected {expected}.") from error
    if not parsed:
        raise CliError(f"--dataset-path {path}: holds no requests; expected {expected}.")
    return parsed


def _timestamp(text: str) -> float:
    """Seconds of `2023-11-16 18:15:46.6805900`; the seventh decimal is below Python's microseconds."""
    whole, _, fraction = text.strip().partition(".")
    return datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{fraction or 0}")


# ---- arrivals ----------------------------------------------------------------------------------------------------


def arrival_times(count: int, rate: float, burstiness: float, rng: np.random.Generator) -> np.ndarray:
    """Seconds of each request after the first, which comes at 0; an infinite rate sends all at once.

    Gaps are gamma distributed with shape `burstiness` and mean 1/rate: 1 is a Poisson process, less is burstier, more
    is steadier.
    """
    if math.isinf(rate):
        return np.zeros(count)
    gaps = rng.gamma(burstiness, 1.0 / (rate * burstiness), count)
    gaps[:1] = 0.0
    return np.cumsum(gaps)
