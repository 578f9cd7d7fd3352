"""`tilery bench serve`: asks a running server a workload at a given pace and reports latency and throughput.

Here the options are read and the parts put together; numpy and asyncio come in with the parts, when the command runs.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilery.cli.errors import CliError
from tilery.cli.options import api_key_header

if TYPE_CHECKING:
    from tilery.cli.bench.client import RequestResult
    from tilery.cli.bench.metrics import Metric

WORKLOAD = "What to ask"
PACE = "When to ask"
REPORT = "What to report"
DATASETS = ("random", "text", "azure", "mooncake")
METRICS = ("ttft", "tpot", "itl", "e2el")


def bench_serve(
    base_url: Annotated[str, typer.Option(help="The server's address.")] = "http://127.0.0.1:8000",
    endpoint: Annotated[
        str, typer.Option(help="/v1/completions or /v1/chat/completions; the path decides the kind of request.")
    ] = "/v1/completions",
    model: Annotated[str | None, typer.Option(help="Model name in the API.", show_default="the server's first")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Bearer key.", envvar="TILERY_API_KEY", show_default="none")
    ] = None,
    dataset_name: Annotated[
        str, typer.Option(help=f"One of {', '.join(DATASETS)}.", rich_help_panel=WORKLOAD)
    ] = "random",
    dataset_path: Annotated[
        Path | None,
        typer.Option(
            help="File of the text, azure (CSV) or mooncake (JSON lines) dataset.",
            show_default="none",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests in all.", rich_help_panel=WORKLOAD)] = 100,
    random_input_len: Annotated[
        int, typer.Option(min=1, help="random: tokens per prompt.", rich_help_panel=WORKLOAD)
    ] = 1024,
    random_output_len: Annotated[
        int, typer.Option(min=1, help="random and text: tokens per answer.", rich_help_panel=WORKLOAD)
    ] = 128,
    random_range_ratio: Annotated[
        float,
        typer.Option(
            min=0.0, max=0.99, help="random: lengths vary by this part up and down.", rich_help_panel=WORKLOAD
        ),
    ] = 0.0,
    random_prefix_len: Annotated[
        int, typer.Option(min=0, help="random: tokens that all prompts begin with, on top.", rich_help_panel=WORKLOAD)
    ] = 0,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            min=10,
            help="Draw random tokens from the middle of a vocabulary of this size.",
            show_default="tokens of an English text, by /tokenize",
            rich_help_panel=WORKLOAD,
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.", rich_help_panel=WORKLOAD)] = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Always generate the full length.", rich_help_panel=WORKLOAD)
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts and arrivals.", rich_help_panel=WORKLOAD)] = 0,
    request_rate: Annotated[
        float,
        typer.Option(
            help="Requests per second; inf: all at once, or by a trace's own clock.",
            rich_help_panel=PACE,
        ),
    ] = math.inf,
    burstiness: Annotated[
        float, typer.Option(help="Gamma shape of the gaps: 1 Poisson, less burstier.", rich_help_panel=PACE)
    ] = 1.0,
    max_concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Requests open at the same time.", show_default="no limit", rich_help_panel=PACE),
    ] = None,
    time_scale: Annotated[
        float, typer.Option(help="Traces: replay this many times as fast.", rich_help_panel=PACE)
    ] = 1.0,
    num_warmups: Annotated[
        int, typer.Option(min=0, help="Requests sent before, not counted.", rich_help_panel=PACE)
    ] = 0,
    percentile_metrics: Annotated[
        str, typer.Option(help=f"Any of {','.join(METRICS)}.", rich_help_panel=REPORT)
    ] = "ttft,tpot,itl",
    metric_percentiles: Annotated[str, typer.Option(help="Such as 50,90,99.", rich_help_panel=REPORT)] = "99",
    goodput: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC:MS",
            help="Limit that a good answer keeps, such as ttft:200; repeat for several.",
            show_default="none",
            rich_help_panel=REPORT,
        ),
    ] = None,
    save_result: Annotated[
        bool, typer.Option("--save-result", help="Write the figures as JSON.", rich_help_panel=REPORT)
    ] = False,
    save_detailed: Annotated[
        bool, typer.Option("--save-detailed", help="And every request's.", rich_help_panel=REPORT)
    ] = False,
    result_filename: Annotated[
        Path | None,
        typer.Option(help="Where to.", show_default="from backend, rate, model and time", rich_help_panel=REPORT),
    ] = None,
) -> None:
    """Measure a running OpenAI-compatible server.

    Prints the rows and writes the JSON keys of `vllm bench serve`.

    Examples:

    \b
      tilery bench serve --num-prompts 200 --request-rate 4 --ignore-eos
      tilery bench serve --dataset-name mooncake --dataset-path trace.jsonl --goodput ttft:500
    """
    need(dataset_name in DATASETS, f"--dataset-name {dataset_name}: expected one of {', '.join(DATASETS)}.")
    need(request_rate > 0, f"--request-rate {request_rate:g}: must be above 0 (or inf).")
    need(burstiness > 0, f"--burstiness {burstiness:g}: must be above 0.")
    need(time_scale > 0 and math.isfinite(time_scale), f"--time-scale {time_scale:g}: must be above 0 and finite.")
    need(dataset_name == "random" or dataset_path is not None, f"--dataset-name {dataset_name} needs --dataset-path.")
    need(endpoint.startswith("/"), f"--endpoint {endpoint}: must begin with a slash.")
    shown = parse_metrics(percentile_metrics)
    percentiles = parse_percentiles(metric_percentiles)
    limits = parse_goodput(goodput or [])

    import numpy as np

    from tilery.cli.bench import dataset, load, metrics, report
    from tilery.cli.bench import endpoint as endpoints
    from tilery.cli.connection import parse_url

    server = endpoints.find_server(parse_url(base_url, "--base-url"), endpoint, model, api_key_header(api_key))
    rng = np.random.default_rng(seed)
    name = dataset.DatasetName(dataset_name)
    if name is dataset.DatasetName.TEXT:
        assert dataset_path is not None
        workload = dataset.text_workload(dataset_path, num_prompts, random_output_len)
    else:
        source = endpoints.token_source(server, vocab_size)
        if name is dataset.DatasetName.RANDOM:
            workload = dataset.random_workload(
                source, rng, num_prompts, random_input_len, random_output_len, random_range_ratio, random_prefix_len
            )
        elif name is dataset.DatasetName.AZURE:
            assert dataset_path is not None
            workload = dataset.azure_workload(dataset_path, source, rng, num_prompts, server.max_model_len, time_scale)
        else:
            assert dataset_path is not None
            workload = dataset.mooncake_workload(
                dataset_path, source, seed, num_prompts, server.max_model_len, time_scale
            )
    if workload.clipped:
        say(f"{workload.clipped} of {len(workload.requests)} requests clipped to {server.max_model_len} tokens in all.")
    times = load.start_times(workload, request_rate, burstiness, rng)
    bodies = [endpoints.request_body(server, request, temperature, ignore_eos) for request in workload.requests]

    before = endpoints.read_drafting(server)
    results, duration = load.run_loop(
        load.run_benchmark(
            server, workload.requests, bodies, times, max_concurrency, num_warmups, load.progress(len(bodies))
        )
    )
    after = endpoints.read_drafting(server)

    drafting = after.since(before) if after is not None and before is not None else None
    figures = metrics.measure(results, duration, percentiles, limits)
    setup = report.Setup(
        date=datetime.now().strftime("%Y%m%d-%H%M%S"),
        backend=server.backend,
        model=server.model,
        num_prompts=len(workload.requests),
        request_rate=request_rate,
        burstiness=burstiness,
        max_concurrency=max_concurrency,
        shown=shown,
        extra={
            "dataset_name": dataset_name,
            "dataset_path": dataset_path.name if dataset_path else None,
            "clipped_requests": workload.clipped,
            "max_model_len": server.max_model_len,
            "time_scale": time_scale,
            "ignore_eos": ignore_eos,
            "temperature": temperature,
            "seed": seed,
            "goodput": {str(metric): limit for metric, limit in limits.items()} or None,
        },
    )
    print(report.render(setup, figures, drafting))
    for message, times_seen in common_errors(results):
        say(f"failed x{times_seen}: {message}")
    if save_result or save_detailed or result_filename is not None:
        record = report.as_json(setup, figures, results, drafting, save_detailed)
        save(record, result_filename or default_filename(record))
    if figures.completed == 0:
        raise CliError("no request succeeded.")


# ---- options -----------------------------------------------------------------------------------------------------


def need(ok: bool, message: str) -> None:
    if not ok:
        raise CliError(message)


def parse_metrics(text: str) -> tuple[Metric, ...]:
    from tilery.cli.bench.metrics import Metric

    names = [part.strip() for part in text.split(",") if part.strip()]
    need(
        bool(names) and all(name in METRICS for name in names),
        f"--percentile-metrics {text}: expected some of {','.join(METRICS)}.",
    )
    return tuple(Metric(name) for name in names)


def parse_percentiles(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    need(
        bool(values) and all(0 <= value <= 100 for value in values),
        f"--metric-percentiles {text}: expected numbers from 0 to 100 such as 50,90,99.",
    )
    return values


def parse_goodput(items: Sequence[str]) -> dict[Metric, float]:
    """`ttft:200` and the like; one option may hold several, separated by blanks."""
    from tilery.cli.bench.metrics import Metric

    limits: dict[Metric, float] = {}
    for item in (part for text in items for part in text.split()):
        name, _, value = item.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = -1.0
        need(
            name in ("ttft", "tpot", "e2el") and limit >= 0,
            f"--goodput {item}: expected ttft:MS, tpot:MS or e2el:MS with milliseconds.",
        )
        limits[Metric(name)] = limit
    return limits


# ---- results ------------------------------------------------------------------------------------------------------


def common_errors(results: Sequence[RequestResult]) -> list[tuple[str, int]]:
    from collections import Counter

    return Counter(result.error for result in results if not result.success).most_common(5)


def say(message: str) -> None:
    print(message, file=sys.stderr)


def default_filename(record: dict[str, Any]) -> Path:
    concurrency = f"-concurrency{record['max_concurrency']}" if record["max_concurrency"] else ""
    model = str(record["model_id"]).rstrip("/").rsplit("/", 1)[-1]
    return Path(f"{record['backend']}-{record['request_rate']}qps{concurrency}-{model}-{record['date']}.json")


def save(record: dict[str, Any], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise CliError(f"--result-filename {path}: cannot be written ({error.strerror}).") from error
    say(f"Written: {path}")
