"""Prometheus metrics of one serving process: one store of plain numbers, shown under two names.

The serving path touches lists and integers only (an observation is one bisection and two additions); the Prometheus
families are built when somebody scrapes. That makes an alias free: every metric that vLLM also has appears as
`tilery:NAME` and, unless turned off, as `vllm:NAME`, with the same labels and buckets, so that existing dashboards
and endpoint pickers work. Names without a vLLM counterpart exist as `tilery:` only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Bucket bounds of vLLM's histograms, so that its dashboards compute the same quantiles.
TTFT_SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
ITL_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHOICES = (1, 2, 5, 10, 20)


def one_two_five(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `limit`."""
    bounds: list[int] = []
    power = 1
    while True:
        for factor in (1, 2, 5):
            if factor * power > limit:
                return tuple(bounds) or (1,)
            bounds.append(factor * power)
        power *= 10


class Histogram:
    """Counts per bucket and a sum. `counts[i]` holds values in (bounds[i-1], bounds[i]]; the last one is +Inf."""

    __slots__ = ("bounds", "counts", "help", "name", "total")

    def __init__(self, name: str, help: str, bounds: Sequence[float]) -> None:
        self.name = name
        self.help = help
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus wants them."""
        result, running = [], 0
        for bound, count in zip([*self.bounds, float("inf")], self.counts, strict=True):
            running += count
            result.append((floatToGoString(bound), float(running)))
        return result


# Engine statistics shown as they are: metric, help, key in the engine's mapping.
ENGINE_GAUGES = (
    ("num_requests_running", "Requests that hold cache blocks.", "running"),
    ("num_requests_waiting", "Requests in the engine's queue.", "waiting"),
)
ENGINE_COUNTERS = (
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "prefix_query_tokens"),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", "prefix_hit_tokens"),
    ("prompt_tokens_cached", "Prompt tokens not computed again.", "prefix_hit_tokens"),
    ("num_preemptions", "Times a running request gave its blocks back.", "preemptions"),
    ("prompt_tokens", "Prompt tokens processed, cached ones included.", "prompt_tokens"),
    ("generation_tokens", "Tokens generated.", "generation_tokens"),
    ("admission_rejections", "Requests refused by the engine.", "refused"),
    ("spec_decode_num_drafts", "Drafts proposed by speculative decoding.", "spec_drafts"),
    ("spec_decode_num_draft_tokens", "Tokens proposed by speculative decoding.", "spec_draft_tokens"),
    ("spec_decode_num_accepted_tokens", "Draft tokens accepted.", "spec_accepted_tokens"),
)
# The same without a vLLM counterpart.
OWN_GAUGES = (
    ("spec_decode_disabled", "1 while speculative decoding has switched itself off.", "spec_disabled"),
    ("kv_cache_blocks", "Blocks of the KV cache.", "kv_blocks_total"),
    ("kv_cache_blocks_used", "Blocks held by requests.", "kv_blocks_used"),
)
OWN_COUNTERS = (
    ("engine_steps", "Forward passes.", "steps"),
    (
        "dsa_dense_steps",
        "Steps in which no context exceeded the indexer's top-k, so that it did not score.",
        "dense_steps",
    ),
)


class ServingMetrics:
    """All metrics of one model behind one API process.

    `engine` returns the engine's statistics as a mapping (`messages.EngineStats` field by field) and `cache` its
    cache settings; both are called when somebody scrapes.
    """

    def __init__(
        self,
        model_name: str,
        max_model_len: int,
        engine: Callable[[], Mapping[str, Any]],
        cache: Mapping[str, str],
        vllm_names: bool = True,
    ) -> None:
        self._labels = {"model_name": model_name, "engine": "0"}
        self._engine = engine
        self._cache = cache
        self._prefixes = ("tilery", "vllm") if vllm_names else ("tilery",)
        self.ttft = Histogram(
            "time_to_first_token_seconds", "From the request's arrival to its first token.", TTFT_SECONDS
        )
        self.itl = Histogram("inter_token_latency_seconds", "Between two outputs of one request.", ITL_SECONDS)
        self.tpot = Histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first.", ITL_SECONDS
        )
        self.e2e = Histogram("e2e_request_latency_seconds", "From arrival to the last token.", REQUEST_SECONDS)
        self.queue = Histogram("request_queue_time_seconds", "From arrival to the first scheduling.", REQUEST_SECONDS)
        self.inference = Histogram("request_inference_time_seconds", "From scheduling to the end.", REQUEST_SECONDS)
        self.prefill = Histogram("request_prefill_time_seconds", "From scheduling to the first token.", REQUEST_SECONDS)
        self.decode = Histogram("request_decode_time_seconds", "From the first token to the end.", REQUEST_SECONDS)
        self.step_tokens = Histogram("iteration_tokens_total", "Tokens per engine step.", STEP_TOKENS)
        lengths = one_two_five(max_model_len)
        self.prompt_lengths = Histogram("request_prompt_tokens", "Prompt tokens per request.", lengths)
        self.output_lengths = Histogram("request_generation_tokens", "Tokens generated per choice.", lengths)
        self.max_tokens = Histogram("request_params_max_tokens", "max_tokens per request.", lengths)
        self.choices = Histogram("request_params_n", "n per request.", CHOICES)
        self._histograms = [value for value in vars(self).values() if isinstance(value, Histogram)]
        self.finished: Counter[str] = Counter()
        """Choices by finish reason."""
        self.responses: Counter[tuple[str, int]] = Counter()
        """HTTP responses by (path, status)."""
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def observe_timing(self, arrived: float, scheduled: float, first_token: float, finished: float) -> None:
        """One finished choice, by the engine's clock; a stage that was never reached is 0."""
        if scheduled:
            self.queue.observe(scheduled - arrived)
            self.inference.observe(finished - scheduled)
        if first_token:
            self.prefill.observe(first_token - scheduled)
            self.decode.observe(finished - first_token)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Says that names need not be checked by collecting once at registration."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Called by prometheus-client on every scrape."""
        engine = self._engine()
        for prefix in self._prefixes:
            yield from self._shared(prefix, engine)
        yield from self._own(engine)

    # ---- families ------------------------------------------------------------------------------------------------

    def _shared(self, prefix: str, engine: Mapping[str, Any]) -> Iterator[Metric]:
        names, labels = list(self._labels), list(self._labels.values())
        for name, help, key in ENGINE_GAUGES:
            yield self._gauge(f"{prefix}:{name}", help, float(engine[key]))
        usage = engine["kv_blocks_used"] / max(1, engine["kv_blocks_total"])
        yield self._gauge(f"{prefix}:kv_cache_usage_perc", "Part of the KV cache held by requests; 1 is full.", usage)
        for name, help, key in ENGINE_COUNTERS:
            yield self._counter(f"{prefix}:{name}", help, float(engine[key]))

        positions = CounterMetricFamily(
            f"{prefix}:spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens accepted, by position.",
            labels=[*names, "position"],
        )
        for position, count in enumerate(engine["spec_accepted_per_position"]):
            positions.add_metric([*labels, str(position)], count)
        yield positions

        success = CounterMetricFamily(
            f"{prefix}:request_success", "Finished choices by reason.", labels=[*names, "finished_reason"]
        )
        for reason in ("stop", "length", "abort", "error"):
            success.add_metric([*labels, reason], self.finished[reason])
        yield success

        cache = GaugeMetricFamily(
            f"{prefix}:cache_config_info", "Settings of the KV cache.", labels=[*names, *self._cache]
        )
        cache.add_metric([*labels, *self._cache.values()], 1)
        yield cache

        for histogram in self._histograms:
            family = HistogramMetricFamily(f"{prefix}:{histogram.name}", histogram.help, labels=names)
            family.add_metric(labels, buckets=histogram.buckets(), sum_value=histogram.total)
            yield family

    def _own(self, engine: Mapping[str, Any]) -> Iterator[Metric]:
        for name, help, key in OWN_GAUGES:
            yield self._gauge(f"tilery:{name}", help, float(engine[key]))
        for name, help, key in OWN_COUNTERS:
            yield self._counter(f"tilery:{name}", help, float(engine[key]))
        responses = CounterMetricFamily("tilery:http_responses", "HTTP responses.", labels=["path", "status"])
        for (path, status), count in self.responses.items():
            responses.add_metric([path, str(status)], count)
        yield responses

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, help, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, help: str, value: float) -> Metric:
        family = CounterMetricFamily(name, help, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family
