"""`tilery bench ops` without a GPU: its arithmetic, its names, its table; the cases exist and name real baselines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tilery.cli.main import run as command_line
from tilery.ops.bench import report, run
from tilery.ops.bench.baselines import Baselines
from tilery.ops.bench.case import Case, Prepared, relative_error
from tilery.ops.bench.inputs import PAGE, Pages, normal_lengths, packed_rows, unpack_rows
from tilery.ops.bench.measure import Ceilings
from tilery.ops.bench.worker import isolated
from tilery.ops.cache import read_mla

CEILINGS = Ceilings(bf16=800.0, fp8=1400.0, int8=950.0, copy=3.0)


def case(**changes: object) -> Case:
    values: dict[str, object] = {
        "kernel": "k", "shape": {"m": 64, "n": 2112}, "make": lambda generator: None, "ceiling": "copy",
        "metric": "tb_per_s", "must": 2.0, "aim": 2.2,
    }  # fmt: skip
    return Case(**{**values, **changes})  # type: ignore[arg-type]


def test_the_error_is_relative_and_never_hides_a_nan() -> None:
    x = torch.tensor([3.0, 4.0])
    assert relative_error(x, x) == 0.0
    assert relative_error(torch.tensor([3.0, 4.5]), x) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, float("nan")]), x) == float("inf")
    low = torch.tensor([3.0, float("-inf")])
    assert relative_error(low, low) == 0.0
    assert relative_error(x, low) == float("inf")


def test_rates_follow_from_time_flops_and_bytes() -> None:
    prepared = Prepared(lambda: None, lambda result: 0.0, flops=2e9, bytes=30e6)
    row = run.rates(case(), prepared, 12.5, CEILINGS, Baselines.load())
    assert row["tflops"] == 160.0
    assert row["gb_per_s"] == 2400.0
    assert row["pct_of_ceiling"] == 80.0
    assert row["value"] == 2.4
    assert row["met"]
    assert row["aim_met"]
    slow = run.rates(case(), prepared, 14.0, CEILINGS, Baselines.load())
    assert slow["met"]
    assert not slow["aim_met"]


def test_a_ratio_is_the_rivals_time_over_ours() -> None:
    keys = {"m": 64, "n": 2112, "k": 7168}
    asked = case(metric="ratio", must=1.0, aim=None, baseline=("deep_gemm_fp8_block_gemm", keys))
    row = run.rates(asked, Prepared(lambda: None, lambda result: 0.0, 1.0, 1.0), 21.4, CEILINGS, Baselines.load())
    assert row["ratio"] == 0.5
    assert row["baseline_us"] == 10.7
    assert row["met"] is False


def test_a_wrong_result_meets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = Prepared(lambda: None, lambda result: 0.0, flops=2e9, bytes=30e6)
    for error, met in ((1e-4, True), (1e-2, False), (float("nan"), False)):
        monkeypatch.setattr(run, "_checked", lambda *_, error=error: (prepared, error))
        monkeypatch.setattr(run, "_times", lambda *_: {"us": 12.5})
        row = run.measure_case(case(), CEILINGS, Baselines.load(), None)  # type: ignore[arg-type]
        assert (row["met"], row["aim_met"]) == (met, met)
        monkeypatch.undo()


def test_outputs_that_a_run_leaves_alone_are_found() -> None:
    out, found = torch.zeros(4, 3, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int32)
    prepared = Prepared(lambda: None, lambda result: 0.0, 1.0, 1.0, outputs=(out, found))
    run.poison(prepared)
    out[:3] = 1
    assert not run._written(prepared)
    assert run._written(Prepared(lambda: None, lambda result: 0.0, 1.0, 1.0, outputs=(out,), complete=False))
    out[3] = float("inf")
    assert run._written(prepared)


def test_a_baseline_must_be_one_row() -> None:
    with pytest.raises(KeyError, match="0 rows"):
        Baselines.load().find("deep_gemm_fp8_block_gemm", {"m": 63})
    with pytest.raises(KeyError, match="4 rows"):
        Baselines.load().find("deep_gemm_fp8_block_gemm", {"m": 64})


def test_every_case_names_a_baseline_that_exists_and_no_name_twice() -> None:
    cases, baselines = run.all_cases(), Baselines.load()
    assert len({one.name for one in cases}) == len(cases) > 40
    for one in cases:
        if one.baseline:
            assert baselines.find(*one.baseline) > 0


def test_cases_are_chosen_by_kernel_or_pattern() -> None:
    cases = [case(), case(shape={"m": 4096, "n": 2112}), case(kernel="other")]
    assert run.chosen(cases, ["k"]) == cases[:2]
    assert run.chosen(cases, ["k[m=64*"]) == cases[:1]
    assert run.chosen(cases, []) == cases
    with pytest.raises(ValueError, match="kernels: k, other"):
        run.chosen(cases, ["nothing"])


def test_packed_rows_are_the_caches_rows() -> None:
    rows = packed_rows(torch.Generator().manual_seed(1), 5)
    assert rows.shape == (5, 656)
    read = read_mla(rows, torch.arange(5), 512, torch.float32)
    assert torch.equal(unpack_rows(rows).float(), read)


def test_pages_are_shuffled_and_belong_to_one_request() -> None:
    generator = torch.Generator().manual_seed(2)
    pages = Pages.draw(generator, normal_lengths(generator, 7, 300, 2))
    slots = torch.cat([pages.slots(request) for request in range(7)])
    assert slots.unique().numel() == slots.numel() == int(pages.lengths.sum())
    assert int(slots.max()) < pages.count * PAGE


def rows() -> list[dict[str, object]]:
    prepared = Prepared(lambda: None, lambda result: 0.0, 2e9, 30e6)
    good = {"kernel": "k", "shape": {"m": 64}, "us": 12.5, "error": 1e-4, "error_bound": 1e-3}
    good |= run.rates(case(), prepared, 12.5, CEILINGS, Baselines.load())
    wrong = {**good, "error": 1e-2, "value": 1.0, "met": False, "aim_met": False}
    return [good, wrong, {"kernel": "k", "shape": {"m": 1}, "failure": "ValueError: no"}]


def test_the_table_tells_wrong_from_missed_from_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = report.text(rows())
    assert "2.40 aim" in text
    assert "WRONG" in text
    assert "1.00 missed" in text
    assert "failed: ValueError: no" in text
    result = {"device": "D", "date": "2026-01-01T", "commit": "abcdef12", "ceilings": vars(CEILINGS), "rows": rows()}
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(result))
    assert command_line(["bench", "ops", "--table", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("D, 2026-01-01, commit abcdef1.")
    assert printed.count("\n| k |") == 3


def test_a_process_that_dies_costs_only_its_cases() -> None:
    cases = run.chosen(run.all_cases(), ["fp8_gemm[m=64*"])
    with_gpu = torch.cuda.is_available()
    rows = list(isolated(cases, None))
    assert [row["shape"] for row in rows] == [dict(one.shape) for one in cases]
    if not with_gpu:
        assert all("failure" in row for row in rows)
    lost = list(isolated([case(kernel="not among the cases")], None))
    assert "ended with exit code 1 before it was measured" in lost[0]["failure"]


def test_families_keep_their_cases() -> None:
    every = run.all_cases()
    assert [one.name for part in run.by_family(every) for one in part] == [one.name for one in every]


def test_the_table_of_the_docs_is_the_recorded_run() -> None:
    root = Path(__file__).resolve().parents[3]
    recorded = json.loads((root / "benchmarks/results/ops_h100.json").read_text())
    page = (root / "docs/hopper/README.md").read_text()
    assert report.markdown(recorded) in page, "put the output of tilery bench ops --table between the page's marks"
    known = {(one.kernel, *one.shape.items()) for one in run.all_cases()}
    assert {(row["kernel"], *row["shape"].items()) for row in recorded["rows"]} <= known


def test_the_command_says_what_it_misses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["bench", "ops", "nonsense"]) == 2
    assert "no case matches 'nonsense'; kernels: fp8_gemm" in capsys.readouterr().err
    path = tmp_path / "x.json"
    path.write_text("[]")
    assert command_line(["bench", "ops", "--table", str(path)]) == 2
    assert "it has no rows" in capsys.readouterr().err
    assert command_line(["bench", "ops", "--list", "sparse_mla_decode"]) == 0
    assert "sparse_mla_decode[batch=64,s_q=2,heads=128,topk=2048]  must 1.25, aim 1.5" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert command_line(["bench", "ops"]) == 2
        assert "needs a CUDA device" in capsys.readouterr().err
