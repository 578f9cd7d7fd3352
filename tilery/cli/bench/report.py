"""The printed rows and the JSON of a benchmark: labels and keys are those of `vllm bench serve`, so that scripts which
read its output read this one too. What has no key there stands under the one extra key "tilery".
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tilery.cli.bench.client import RequestResult
from tilery.cli.bench.metrics import Distribution, Metric, Metrics

TITLES = {
    Metric.TTFT: "Time to First Token",
    Metric.TPOT: "Time per Output Token (excl. 1st token)",
    Metric.ITL: "Inter-token Latency",
    Metric.E2EL: "End-to-end Latency",
}


# ---- speculative decoding ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drafting:
    """Counters of speculative decoding, summed over the engines of a server."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: tuple[int, ...] = ()
    """Accepted tokens per position of the draft."""

    def since(self, before: Drafting) -> Drafting:
        earlier = before.accepted_at + (0,) * (len(self.accepted_at) - len(before.accepted_at))
        return Drafting(
            self.drafts - before.drafts,
            self.draft_tokens - before.draft_tokens,
            self.accepted_tokens - before.accepted_tokens,
            tuple(now - then for now, then in zip(self.accepted_at, earlier, strict=False)),
        )


_SAMPLE = re.compile(r"^vllm:spec_decode_(num_\w+?)(?:_total)?(?:\{(.*)\})? (\S+)", re.MULTILINE)
_POSITION = re.compile(r'position="(\d+)"')


def read_drafting(exposition: str) -> Drafting | None:
    """From a Prometheus page with vLLM's metric names; None if it holds none of them."""
    totals: dict[str, int] = {}
    positions: dict[int, int] = {}
    for name, labels, value in _SAMPLE.findall(exposition):
        if name.endswith("_created"):
            continue
        amount = int(float(value))
        if name == "num_accepted_tokens_per_pos":
            position = _POSITION.search(labels)
            if position:
                positions[int(position[1])] = positions.get(int(position[1]), 0) + amount
        else:
            totals[name] = totals.get(name, 0) + amount
    if not totals:
        return None
    return Drafting(
        totals.get("num_drafts", 0),
        totals.get("num_draft_tokens", 0),
        totals.get("num_accepted_tokens", 0),
        tuple(positions.get(i, 0) for i in range(max(positions, default=-1) + 1)),
    )


# ---- the report --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What was asked for, as far as the report repeats it."""

    date: str
    backend: str
    model: str
    num_prompts: int
    request_rate: float
    burstiness: float
    max_concurrency: int | None
    shown: tuple[Metric, ...]
    extra: dict[str, Any]


def _rows_of(metric: Metric, values: Distribution) -> list[str]:
    name = metric.upper()
    rows = [
        f"{TITLES[metric]:-^50}",
        _row(f"Mean {name} (ms):", values.mean),
        _row(f"Median {name} (ms):", values.median),
    ]
    return rows + [_row(f"P{p:g} {name} (ms):", value) for p, value in values.percentiles]


def _row(label: str, value: float) -> str:
    text = str(value) if isinstance(value, int) else f"{value:.2f}"
    return f"{label:<40} {text:<10}"


def render(setup: Setup, metrics: Metrics, drafting: Drafting | None = None) -> str:
    """The table that is printed."""
    rows = [
        f"{' Serving Benchmark Result ':=^50}",
        _row("Successful requests:", metrics.completed),
        _row("Failed requests:", metrics.failed),
    ]
    if setup.max_concurrency is not None:
        rows.append(_row("Maximum request concurrency:", setup.max_concurrency))
    if not math.isinf(setup.request_rate):
        rows.append(_row("Request rate configured (RPS):", float(setup.request_rate)))
    rows += [
        _row("Benchmark duration (s):", float(metrics.duration)),
        _row("Total input tokens:", metrics.total_input),
        _row("Total generated tokens:", metrics.total_output),
        _row("Request throughput (req/s):", float(metrics.per_second(metrics.completed))),
    ]
    if metrics.good is not None:
        rows.append(_row("Request goodput (req/s):", float(metrics.per_second(metrics.good))))
    rows += [
        _row("Output token throughput (tok/s):", float(metrics.per_second(metrics.total_output))),
        _row("Peak output token throughput (tok/s):", float(metrics.peak_output_per_second)),
        _row("Peak concurrent requests:", float(metrics.peak_concurrent)),
        _row("Total token throughput (tok/s):", float(metrics.per_second(metrics.total_input + metrics.total_output))),
    ]
    for metric in Metric:
        if metric in setup.shown:
            rows += _rows_of(metric, metrics.distributions[metric])
    if drafting is not None and drafting.draft_tokens > 0:
        rows.append(f"{'Speculative Decoding':-^50}")
        rows.append(_row("Acceptance rate (%):", 100 * drafting.accepted_tokens / drafting.draft_tokens))
        rows.append(_row("Acceptance length:", acceptance_length(drafting)))
        rows.append(_row("Drafts:", drafting.drafts))
        rows.append(_row("Draft tokens:", drafting.draft_tokens))
        rows.append(_row("Accepted tokens:", drafting.accepted_tokens))
        if drafting.accepted_at:
            rows.append("Per-position acceptance (%):")
        for position, accepted in enumerate(drafting.accepted_at):
            rows.append(_row(f"  Position {position}:", 100 * accepted / max(1, drafting.drafts)))
    return "\n".join([*rows, "=" * 50])


def acceptance_length(drafting: Drafting) -> float:
    """Tokens per verification step: the accepted drafts and the one that the model adds itself."""
    return 1 + drafting.accepted_tokens / drafting.drafts if drafting.drafts else 0.0


def as_json(
    setup: Setup,
    metrics: Metrics,
    results: Sequence[RequestResult],
    drafting: Drafting | None = None,
    detailed: bool = False,
) -> dict[str, Any]:
    """The record that `--save-result` writes; `detailed` adds one list entry per request."""
    record: dict[str, Any] = {
        "date": setup.date,
        "endpoint_type": setup.backend,
        "backend": setup.backend,
        "label": None,
        "model_id": setup.model,
        "tokenizer_id": setup.model,
        "num_prompts": setup.num_prompts,
        "request_rate": "inf" if math.isinf(setup.request_rate) else setup.request_rate,
        "burstiness": setup.burstiness,
        "max_concurrency": setup.max_concurrency,
        "duration": metrics.duration,
        "completed": metrics.completed,
        "failed": metrics.failed,
        "total_input_tokens": metrics.total_input,
        "total_output_tokens": metrics.total_output,
        "request_throughput": metrics.per_second(metrics.completed),
        "request_goodput": None if metrics.good is None else metrics.per_second(metrics.good),
        "output_throughput": metrics.per_second(metrics.total_output),
        "total_token_throughput": metrics.per_second(metrics.total_input + metrics.total_output),
        "max_output_tokens_per_s": metrics.peak_output_per_second,
        "max_concurrent_requests": metrics.peak_concurrent,
    }
    for metric in Metric:
        if metric in setup.shown:
            values = metrics.distributions[metric]
            record |= {
                f"mean_{metric}_ms": values.mean,
                f"median_{metric}_ms": values.median,
                f"std_{metric}_ms": values.std,
            }
            record |= {f"p{p:g}_{metric}_ms": value for p, value in values.percentiles}
    if drafting is not None and drafting.draft_tokens > 0:
        record |= {
            "spec_decode_acceptance_rate": 100 * drafting.accepted_tokens / drafting.draft_tokens,
            "spec_decode_acceptance_length": acceptance_length(drafting),
            "spec_decode_num_drafts": drafting.drafts,
            "spec_decode_draft_tokens": drafting.draft_tokens,
            "spec_decode_accepted_tokens": drafting.accepted_tokens,
            "spec_decode_per_position_acceptance_rates": [
                accepted / max(1, drafting.drafts) for accepted in drafting.accepted_at
            ],
        }
    if detailed:
        record |= {
            "input_lens": [result.prompt_len for result in results],
            "output_lens": [result.output_len for result in results],
            "start_times": [result.start_time for result in results],
            "ttfts": [result.ttft for result in results],
            "itls": [result.itl for result in results],
            "latencies": [result.latency for result in results],
            "generated_texts": [result.text for result in results],
            "errors": [result.error for result in results],
        }
    record["tilery"] = setup.extra
    return record
