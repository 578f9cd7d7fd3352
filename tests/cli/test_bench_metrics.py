"""The mathematics of the benchmark on timelines whose answers can be worked out by hand."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilery.cli.bench.client import RequestResult, Timeline
from tilery.cli.bench.metrics import Metric, distribution, is_good, measure, peaks, time_per_output_token


def answer(start: float, times: list[float], tokens: int | None = None, prompt: int = 10) -> RequestResult:
    """A successful answer whose chunks arrived `times` seconds after `start`."""
    gaps = [b - a for a, b in pairwise(times)]
    return RequestResult(
        True, prompt, len(times) if tokens is None else tokens, start, ttft=times[0], latency=times[-1], itl=gaps
    )


def test_definitions_on_one_answer() -> None:
    metrics = measure([answer(5.0, [0.25, 0.5, 1.25])], duration=2.0, percentiles=[50, 99])
    by = metrics.distributions
    assert by[Metric.TTFT].mean == 250.0
    assert by[Metric.E2EL].mean == 1250.0
    assert by[Metric.TPOT].mean == (1250.0 - 250.0) / 2
    assert by[Metric.ITL].mean == 500.0
    assert by[Metric.ITL].percentiles[0] == (50, 500.0)
    assert metrics.per_second(metrics.total_output) == 1.5
    assert (metrics.total_input, metrics.total_output, metrics.completed, metrics.failed) == (10, 3, 1, 0)


def test_tpot_counts_tokens_and_itl_counts_chunks() -> None:
    """Two chunks of three tokens each, as speculative decoding sends them."""
    result = answer(0.0, [1.0, 2.0], tokens=6)
    assert time_per_output_token(result) == pytest.approx(0.2)
    assert measure([result], 2.0).distributions[Metric.ITL].mean == 1000.0


def test_an_answer_of_one_token_has_no_tpot() -> None:
    metrics = measure([answer(0.0, [1.0]), answer(0.0, [1.0, 3.0])], 4.0)
    assert metrics.distributions[Metric.TPOT].mean == 2000.0
    assert metrics.distributions[Metric.ITL].mean == 2000.0


def test_failures_count_only_as_failed() -> None:
    failed = RequestResult(False, 1000, 0, 0.0, error="no")
    alone = measure([answer(0.0, [1.0, 2.0])], 2.0)
    both = measure([failed, answer(0.0, [1.0, 2.0]), failed], 2.0)
    assert (both.completed, both.failed) == (1, 2)
    assert both.total_input == alone.total_input
    assert both.distributions == alone.distributions


def test_nothing_completed_gives_zeros() -> None:
    metrics = measure([RequestResult()], 1.0)
    assert (metrics.completed, metrics.peak_concurrent, metrics.distributions[Metric.TTFT].mean) == (0, 0, 0.0)


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({Metric.TTFT: 100.0}, True),
        ({Metric.TTFT: 99.0}, False),
        ({Metric.TPOT: 50.0}, True),
        ({Metric.TTFT: 100.0, Metric.TPOT: 49.0}, False),
        ({Metric.E2EL: 200.0}, True),
        ({}, True),
    ],
)
def test_goodput_needs_every_limit(limits: dict[Metric, float], good: bool) -> None:
    result = RequestResult(True, 1, 3, 0.0, ttft=0.1, latency=0.2)
    assert is_good(result, limits) is good


def test_goodput_is_none_without_limits() -> None:
    done = [answer(0.0, [0.1, 0.2]), answer(0.0, [0.3, 0.4])]
    assert measure(done, 2.0).good is None
    assert measure(done, 2.0, goodput={Metric.TTFT: 200.0}).good == 1


@given(st.lists(st.floats(0, 100), min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_are_numpys(seconds: list[float], percentile: float) -> None:
    result = distribution(seconds, [percentile])
    assert result.percentiles[0][1] == pytest.approx(np.percentile(np.array(seconds) * 1000, percentile))
    assert result.std == pytest.approx(np.std(np.array(seconds) * 1000))


def test_peaks_take_the_fullest_second() -> None:
    # Seconds since the first request: tokens at 0.5 | 1.1 1.2 1.9 | 2.5, and from the second answer 1.5 | 2.1
    first = answer(100.0, [0.5, 1.1, 1.2, 1.9, 2.5])
    second = answer(101.0, [0.5, 1.1])
    assert peaks([first, second]) == (4.0, 2)
    assert peaks([first, answer(110.0, [0.5])]) == (3.0, 1)


def test_peaks_spread_tokens_over_chunks() -> None:
    assert peaks([answer(0.0, [0.1, 1.1], tokens=6)]) == (3.0, 1)


def chunk(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def test_timeline_of_a_completion() -> None:
    line = Timeline(10.0, prompt_len=4)
    line.add(10.5, chunk(choices=[{"text": "a"}]))
    line.add(11.0, chunk(choices=[{"text": ""}]))  # half a character: a token all the same
    line.add(12.0, chunk(choices=[{"text": "b", "finish_reason": "length"}]))
    line.add(19.0, chunk(choices=[], usage={"prompt_tokens": 5, "completion_tokens": 3}))
    result = line.result()
    assert result == RequestResult(True, 5, 3, 10.0, 0.5, 2.0, [0.5, 1.0], "ab", "")


def test_timeline_of_a_chat_skips_role_and_closing_chunks() -> None:
    line = Timeline(0.0, prompt_len=4)
    line.add(0.1, chunk(choices=[{"delta": {"role": "assistant", "content": ""}}]))
    line.add(0.5, chunk(choices=[{"delta": {"reasoning": "hm"}}]))
    line.add(0.75, chunk(choices=[{"delta": {"content": "yes"}}]))
    line.add(2.0, chunk(choices=[{"delta": {}, "finish_reason": "stop"}]))
    result = line.result()
    assert (result.ttft, result.latency, result.itl, result.text) == (0.5, 0.75, [0.25], "hmyes")
    assert result.output_len == 2  # no usage: chunks are counted


def test_timeline_of_an_error_event() -> None:
    line = Timeline(0.0, prompt_len=4)
    line.add(0.1, chunk(choices=[{"text": "a"}]))
    line.add(0.2, chunk(error={"message": "engine died"}))
    assert line.result().success is False
    assert line.result().error == "engine died"


def test_timeline_without_tokens_is_a_failure() -> None:
    assert Timeline(0.0, 1).result().error == "the answer held no tokens"
