"""The mathematics of a serving benchmark, with the definitions of `vllm bench serve`.

* TTFT: from sending to the first token. E2EL: from sending to the last token.
* TPOT = (E2EL - TTFT) / (output tokens - 1), for answers of two tokens or more.
* ITL: every gap between two chunks of every answer.
* Percentiles interpolate linearly, standard deviations are of the population: numpy's defaults.
* Failed requests count nowhere but in `failed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from tilery.cli.bench.client import RequestResult


class Metric(StrEnum):
    TTFT = "ttft"
    TPOT = "tpot"
    ITL = "itl"
    E2EL = "e2el"


@dataclass(frozen=True)
class Distribution:
    """Milliseconds."""

    mean: float
    median: float
    std: float
    percentiles: tuple[tuple[float, float], ...]
    """(percentile, value)"""


@dataclass(frozen=True)
class Metrics:
    completed: int
    failed: int
    duration: float
    total_input: int
    total_output: int
    good: int | None
    """Answers that kept every limit; None when no limit was given."""
    peak_output_per_second: float
    peak_concurrent: int
    distributions: dict[Metric, Distribution]

    def per_second(self, amount: float) -> float:
        return amount / self.duration if self.duration > 0 else 0.0


def time_per_output_token(result: RequestResult) -> float:
    """Seconds; 0 for an answer of one token, which has no gap."""
    return (result.latency - result.ttft) / (result.output_len - 1) if result.output_len > 1 else 0.0


def is_good(result: RequestResult, limits: dict[Metric, float]) -> bool:
    """Whether one answer keeps every limit (milliseconds, the limit itself included)."""
    values = {
        Metric.TTFT: result.ttft,
        Metric.TPOT: time_per_output_token(result),
        Metric.E2EL: result.latency,
    }
    return all(values[metric] * 1000 <= limit for metric, limit in limits.items())


def measure(
    results: Sequence[RequestResult],
    duration: float,
    percentiles: Sequence[float] = (99.0,),
    goodput: dict[Metric, float] | None = None,
) -> Metrics:
    """`duration` is the whole run's, seconds."""
    done = [result for result in results if result.success]
    samples = {
        Metric.TTFT: [result.ttft for result in done],
        Metric.TPOT: [time_per_output_token(result) for result in done if result.output_len > 1],
        Metric.ITL: [gap for result in done for gap in result.itl],
        Metric.E2EL: [result.latency for result in done],
    }
    peak_output, peak_concurrent = peaks(done)
    return Metrics(
        completed=len(done),
        failed=len(results) - len(done),
        duration=duration,
        total_input=sum(result.prompt_len for result in done),
        total_output=sum(result.output_len for result in done),
        good=None if not goodput else sum(is_good(result, goodput) for result in done),
        peak_output_per_second=peak_output,
        peak_concurrent=peak_concurrent,
        distributions={metric: distribution(values, percentiles) for metric, values in samples.items()},
    )


def distribution(seconds: Sequence[float], percentiles: Sequence[float]) -> Distribution:
    """Of no samples at all, every figure is 0."""
    values = np.asarray(seconds or [0.0]) * 1000
    return Distribution(
        mean=float(values.mean()),
        median=float(np.median(values)),
        std=float(values.std()),
        percentiles=tuple((p, float(np.percentile(values, p))) for p in percentiles),
    )


def peaks(done: Sequence[RequestResult]) -> tuple[float, int]:
    """The fullest one-second window: tokens that arrived in it, and requests that were open at any time in it.

    Windows start with the first request. Where a chunk carries several tokens (speculative decoding), each chunk of an
    answer counts its equal share of the answer's tokens.
    """
    if not done:
        return 0.0, 0
    start = min(result.start_time for result in done)
    seconds = int(max(result.start_time + result.latency for result in done) - start) + 1
    tokens, open_requests = np.zeros(seconds), np.zeros(seconds, dtype=int)
    for result in done:
        began = result.start_time - start
        arrivals = began + result.ttft + np.concatenate(([0.0], np.cumsum(result.itl)))
        windows = np.minimum(arrivals.astype(int), seconds - 1)
        np.add.at(tokens, windows, result.output_len / len(windows))
        open_requests[int(began) : int(began + result.latency) + 1] += 1
    return float(tokens.max()), int(open_requests.max())
