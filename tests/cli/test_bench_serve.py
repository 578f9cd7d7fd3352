"""`tilery bench serve` from end to end against a scripted server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tilery.cli.bench.report import Drafting, read_drafting

ROWS = [
    "Successful requests:",
    "Failed requests:",
    "Maximum request concurrency:",
    "Request rate configured (RPS):",
    "Benchmark duration (s):",
    "Total input tokens:",
    "Total generated tokens:",
    "Request throughput (req/s):",
    "Request goodput (req/s):",
    "Output token throughput (tok/s):",
    "Peak output token throughput (tok/s):",
    "Peak concurrent requests:",
    "Total token throughput (tok/s):",
]
KEYS = {
    *("date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate"),
    *("burstiness", "max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens"),
    *("request_throughput", "request_goodput", "output_throughput", "total_token_throughput"),
    *("max_output_tokens_per_s", "max_concurrent_requests"),
}
DETAILS = {
    *("input_lens", "output_lens", "start_times", "ttfts", "itls", "latencies", "generated_texts", "errors"),
}


def row(out: str, label: str) -> float:
    return float(next(line for line in out.splitlines() if line.startswith(label)).removeprefix(label))


@pytest.fixture
def bench(tilery: Callable, fake_server) -> Callable:
    def call(*arguments: str):
        return tilery(
            "bench", "serve", "--base-url", fake_server.url, "--num-prompts", "4", "--random-input-len", "6", *arguments
        )

    return call


def test_rows_and_keys(bench, fake_server, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "result.json"
    ran = bench(
        *("--request-rate", "200", "--max-concurrency", "3", "--goodput", "ttft:10000 tpot:10000", "--save-detailed"),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99.9"),
        *("--result-filename", str(path)),
    )
    assert ran.code == 0, ran.err
    positions = [ran.out.index(label) for label in ROWS]
    assert positions == sorted(positions)
    for name in ("TTFT", "TPOT", "ITL", "E2EL"):
        for label in (f"Mean {name} (ms):", f"Median {name} (ms):", f"P50 {name} (ms):", f"P99.9 {name} (ms):"):
            assert row(ran.out, label) >= 0
    assert row(ran.out, "Successful requests:") == 4
    assert row(ran.out, "Total input tokens:") == 4 * 7  # the server's usage, not our guess
    assert row(ran.out, "Total generated tokens:") == 4 * 3

    record = json.loads(path.read_text())
    spread = [
        f"{part}_{m}_ms" for m in ("ttft", "tpot", "itl", "e2el") for part in ("mean", "median", "std", "p50", "p99.9")
    ]
    assert set(record) == {*KEYS, *spread, *DETAILS, "tilery"}
    assert (record["backend"], record["model_id"], record["request_rate"]) == ("openai", "tiny", 200.0)
    assert record["request_goodput"] == record["request_throughput"]
    assert record["output_lens"] == [3] * 4
    assert record["generated_texts"] == ["a b c"] * 4
    assert [len(gaps) for gaps in record["itls"]] == [2] * 4
    assert record["errors"] == [""] * 4
    assert record["tilery"]["dataset_name"] == "random"


def test_defaults_leave_rows_out(bench, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    ran = bench("--save-result", "--result-filename", str(path))
    record = json.loads(path.read_text())
    assert "goodput" not in ran.out
    assert "RPS" not in ran.out
    assert "E2EL" not in ran.out
    assert (record["request_rate"], record["request_goodput"], record["max_concurrency"]) == ("inf", None, None)
    assert "p99_itl_ms" in record
    assert not DETAILS & set(record)


def test_what_is_sent(bench, fake_server) -> None:
    bench("--ignore-eos", "--random-output-len", "9", "--random-prefix-len", "2", "--temperature", "0.5")
    body = fake_server.bodies[0]
    assert set(body.pop("prompt")) <= {5, 6, 7, 8, 9}  # the ids that /tokenize gave
    assert body == {
        "model": "tiny",
        "max_tokens": 9,
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    assert fake_server.headers[0]["connection"] == "close"


def test_key_and_model(bench, fake_server) -> None:
    bench("--api-key", "secret", "--model", "tiny")
    assert fake_server.headers[0]["authorization"] == "Bearer secret"
    assert bench("--model", "other").err == "tilery: --model other: the server has tiny.\n"


def test_vocabulary_of_a_given_size(bench, fake_server) -> None:
    bench("--vocab-size", "50")
    assert all(5 <= token < 45 for body in fake_server.bodies for token in body["prompt"])


def test_chat_endpoint_sends_text(bench, fake_server, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    ran = bench("--endpoint", "/v1/chat/completions", "--save-detailed", "--result-filename", str(path))
    assert ran.code == 0, ran.err
    message = fake_server.bodies[0]["messages"][0]
    assert message["role"] == "user"
    assert len(message["content"].split()) == 6
    record = json.loads(path.read_text())
    assert record["backend"] == "openai-chat"
    assert record["generated_texts"] == ["a b c"] * 4
    assert [len(gaps) for gaps in record["itls"]] == [2] * 4


@pytest.mark.parametrize("split", [1, 7])
def test_events_cut_anywhere_arrive_whole(bench, fake_server, split: int) -> None:
    fake_server.script.split = split
    fake_server.script.pieces = lambda body: ["ä", "\n\ndata: ", "z"]
    ran = bench()
    assert row(ran.out, "Successful requests:") == 4
    assert row(ran.out, "Total generated tokens:") == 12


def test_failures_are_counted_and_named(bench, fake_server) -> None:
    fake_server.script.status = lambda number: 503 if number % 2 else 200
    ran = bench()
    assert (row(ran.out, "Successful requests:"), row(ran.out, "Failed requests:")) == (2, 2)
    assert "failed x2: HTTP 503: not today" in ran.err
    assert ran.code == 0


def test_a_stream_without_its_end_is_a_failure(bench, fake_server) -> None:
    fake_server.script.done = False
    ran = bench()
    assert ran.code == 2
    assert "without [DONE]" in ran.err
    assert "no request succeeded" in ran.err


def test_times_are_those_of_the_server(bench, fake_server) -> None:
    """Each chunk comes 30 ms after the one before; a loaded machine may add, never take away."""
    fake_server.script.delay = 0.03
    ran = bench()
    for label in ("Median TTFT (ms):", "Median ITL (ms):", "Median TPOT (ms):"):
        assert row(ran.out, label) >= 29.0


def test_concurrency_is_held(bench, fake_server) -> None:
    fake_server.script.delay = 0.01
    bench("--max-concurrency", "2", "--num-prompts", "8")
    assert fake_server.open_most == 2


def test_warmups_are_not_counted(bench, fake_server) -> None:
    ran = bench("--num-warmups", "3")
    assert len(fake_server.bodies) == 7
    assert row(ran.out, "Successful requests:") == 4


def test_trace_keeps_its_clock_and_is_clipped(bench, fake_server, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    line = {"timestamp": 0, "input_length": 1500, "output_length": 10, "hash_ids": [0, 1, 2]}
    path.write_text(json.dumps(line) + "\n" + json.dumps(line | {"timestamp": 600}) + "\n")
    began = time.perf_counter()
    ran = bench("--dataset-name", "mooncake", "--dataset-path", str(path), "--time-scale", "2")
    assert time.perf_counter() - began >= 0.3
    assert "2 of 2 requests clipped to 1000 tokens" in ran.err
    assert [len(body["prompt"]) for body in fake_server.bodies] == [990, 990]


def test_text_prompts(bench, fake_server, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("hello\n")
    assert bench("--dataset-name", "text", "--dataset-path", str(path)).code == 0
    assert {body["prompt"] for body in fake_server.bodies} == {"hello"}


def metrics_page(drafts: int, accepted: tuple[int, int]) -> str:
    label = 'engine="0",model_name="tiny"'
    return f"""# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{{{label}}} {drafts}.0
vllm:spec_decode_num_drafts_created{{{label}}} 1.7e+09
vllm:spec_decode_num_draft_tokens_total{{{label}}} {2 * drafts}.0
vllm:spec_decode_num_accepted_tokens_total{{{label}}} {sum(accepted)}.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{{{label},position="0"}} {accepted[0]}.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{{{label},position="1"}} {accepted[1]}.0
"""


def test_speculative_block_is_the_difference(bench, fake_server) -> None:
    fake_server.script.metrics = [metrics_page(100, (50, 10)), metrics_page(140, (80, 20))]
    ran = bench()
    assert row(ran.out, "Drafts:") == 40
    assert row(ran.out, "Draft tokens:") == 80
    assert row(ran.out, "Accepted tokens:") == 40
    assert row(ran.out, "Acceptance rate (%):") == 50.0
    assert row(ran.out, "Acceptance length:") == 2.0
    assert row(ran.out, "  Position 0:") == 75.0
    assert row(ran.out, "  Position 1:") == 25.0


def test_drafting_sums_engines() -> None:
    page = metrics_page(3, (2, 1)) + metrics_page(4, (1, 0)).replace('engine="0"', 'engine="1"')
    assert read_drafting(page) == Drafting(7, 14, 4, (3, 1))
    assert read_drafting("other 1\n") is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dataset-name", "sharegpt"], "--dataset-name sharegpt: expected one of"),
        (["--dataset-name", "azure"], "needs --dataset-path"),
        (["--request-rate", "0"], "--request-rate 0: must be above 0"),
        (["--burstiness", "-1"], "--burstiness -1: must be above 0"),
        (["--time-scale", "0"], "--time-scale 0"),
        (["--goodput", "ttft"], "--goodput ttft: expected"),
        (["--goodput", "itl:5"], "--goodput itl:5: expected"),
        (["--percentile-metrics", "ttft,foo"], "--percentile-metrics ttft,foo"),
        (["--metric-percentiles", "50,101"], "--metric-percentiles 50,101"),
        (["--endpoint", "v1"], "--endpoint v1"),
    ],
)
def test_bad_values(bench, arguments: list[str], says: str) -> None:
    ran = bench(*arguments)
    assert ran.code == 2
    assert says in ran.err
    assert ran.err.count("\n") == 1


def test_no_server(tilery) -> None:
    ran = tilery("bench", "serve", "--base-url", "http://127.0.0.1:9")
    assert ran.code == 2
    assert "no server answers at http://127.0.0.1:9" in ran.err
    assert "tilery serve" in ran.err


def test_client_keeps_up_with_fast_streams(bench, fake_server) -> None:
    """20 answers of 500 chunks; the bound is far above what the client needs."""
    fake_server.script.pieces = lambda body: ["x"] * 500
    began = time.process_time()
    ran = bench("--num-prompts", "20")
    assert row(ran.out, "Total generated tokens:") == 10_000
    assert time.process_time() - began < 5.0  # the fake server's share included: above 2,000 chunks per second
