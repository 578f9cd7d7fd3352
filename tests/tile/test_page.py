"""Pictures: what they show is what the IR and the cost model say, and a page needs nothing but itself."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from tests.tile.runtime_kernels import H, T, norm
from tilery import tile
from tilery.cli.main import run
from tilery.tile import Dim, InOut, Tensor, bf16, f32, i32
from tilery.tile.errors import LaunchError
from tilery.tile.page import H100_DEVICE, accuracy, arguments_for, estimate, svg
from tilery.tile.page.diff import align, lines_of, stage_table
from tilery.tile.page.estimate import program_shares
from tilery.tile.page.html import Page
from tilery.tile.page.kernel import subject
from tilery.tile.page.memory import memory_map
from tilery.tile.page.trace import lanes_of

GALLERY = Path(__file__).resolve().parents[2] / "docs" / "tile" / "gallery"
BROWSER = os.environ.get("TILERY_TEST_BROWSER", "")
"""A Chromium to test with; without one, what scripts do on a page is not tested."""
M, K = Dim("M"), Dim("K")


@tile.kernel
def product(a: Tensor[M, K, bf16], b: Tensor[K, 64, bf16]):
    """A product, & its <sum>."""
    y = tile.empty([M, 64], f32)
    for m in tile.parallel(tile.blocks(M, "m")):
        acc = tile.zeros([m.extent, 64], f32)
        for k in tile.range(tile.blocks(K, "k")):
            acc = acc + tile.dot(a[m, k], b[k, :])
        y[m, :] = acc
    return y


@tile.kernel
def bump(x: InOut[T, H, f32], lens: Tensor[T, i32]):
    for t in tile.parallel(T):
        v = x[t, :]
        for _ in tile.range(lens[t], label="again"):
            v = v + 1.0
        x[t, :] = v


@tile.graph
def layer(x: InOut[T, H, f32], w: Tensor[H, f32], lens: Tensor[T, i32]):
    y = norm(x, w)
    bump(x, lens)
    return norm(y, w), norm(x, w)


@pytest.fixture(scope="module")
def norm_page() -> Page:
    return norm.page(torch.randn(4100, 32), torch.randn(32), binary=False)


@pytest.fixture(scope="module")
def product_page() -> Page:
    return product.page(torch.zeros(1000, 96).bfloat16(), torch.zeros(96, 64).bfloat16(), binary=False)


@pytest.fixture(scope="module")
def layer_page() -> Page:
    return layer.page(T=64, H=32, lens=5)


# --- the page ---------------------------------------------------------------------------------------------------


class Checker(HTMLParser):
    """Collects ids and addresses; fails on tags that do not match."""

    VOID = frozenset({"meta", "input", "br", "link", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("href", "src", "data", "action", "srcset"):
                self.addresses.append(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert not checker.open
    assert len(checker.ids) == len(set(checker.ids))
    for address in checker.addresses:
        assert address.startswith("#")
        assert address[1:] in checker.ids
    assert not re.search(r"@import|url\((?!#)|https?:|<link|<img|<iframe", text)
    return checker


KERNEL_SECTIONS = {"overview", "source", "stages", "memory", "roofline", "cost", "schedule", "lanes", "code"}


def test_a_kernels_page_is_whole_and_alone(norm_page: Page, product_page: Page) -> None:
    for page in (norm_page, product_page):
        assert set(checked(page.html).ids) >= KERNEL_SECTIONS
        assert "estimated, not measured" in page.html
    assert "A product, &amp; its &lt;sum&gt;." in product_page.html
    assert "&quot;row&quot;" in norm_page.html  # the source


def test_a_graphs_page_is_whole_and_alone(layer_page: Page) -> None:
    ids = set(checked(layer_page.html).ids)
    assert ids >= {"graph", "cost", "lanes", "source", "ir", "node0", "node1", "node2", "node3"}
    assert "estimated, not measured" in layer_page.html


def test_pictures_are_well_formed(norm_page: Page, product_page: Page, layer_page: Page) -> None:
    counts = []
    for page in (norm_page, product_page, layer_page):
        drawn = re.findall(r"<svg.*?</svg>", page.html, re.S)
        counts.append(len(drawn))
        for text in drawn:
            picture = ElementTree.fromstring(text)
            assert picture.get("aria-label")
            across, down = (float(n) for n in str(picture.get("viewBox")).split()[2:])
            for box in picture.iter("rect"):
                x, y, w, h = (float(str(box.get(n))) for n in ("x", "y", "width", "height"))
                assert 0 <= x <= x + w <= across + 0.1
                assert -0.1 <= y <= y + h <= down + 0.1
    assert counts == [3, 4, 2]  # memory (twice where a product has shared memory), roofline, lanes; graph, lanes


def test_a_page_is_saved_and_shows_itself_in_a_notebook(norm_page: Page, tmp_path: Path) -> None:
    assert norm_page.save(tmp_path / "page.html").read_text(encoding="utf-8") == norm_page.html
    assert norm_page._repr_html_().startswith('<iframe srcdoc="&lt;!doctype html&gt;')


# --- stages -----------------------------------------------------------------------------------------------------


def test_lines_are_paired() -> None:
    def pairs(before: str, after: str) -> list[tuple[int, int]]:
        return list(align(*([(line, "") for line in text.split("|")] for text in (before, after))))

    assert pairs("a|b", "a|b") == [(0, 0), (1, 1)]
    assert pairs("a|b|c", "a|c") == [(0, 0), (1, -1), (2, 1)]
    assert pairs("a|x: f32 = add(y, z)|b", "a|w = f(x)|x: f32 = sub(y, z)|b") == [(0, 0), (-1, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("target", ["cpu", "triton"])
def test_the_sides_of_a_stage_are_the_stages(target: str) -> None:
    lowered = product.lower(target, M=100, K=64)
    table = stage_table(lowered.stages, "test_page.py")
    text = {n: line for n, (line, _) in enumerate(table["lines"])}
    shown = [lines_of(lowered.stages[0][1], "test_page.py")]
    for _, kernel in lowered.stages[1:]:
        lines = lines_of(kernel, "test_page.py")
        if [a for a, _ in lines] != [a for a, _ in shown[-1]]:
            shown.append(lines)
    assert len(shown) == len(table["stages"]) > (3 if target == "triton" else 1)
    for number, stage in enumerate(table["stages"]):
        right = [text[b] for _, b in stage["rows"] if b >= 0]
        assert right == [line for line, _ in shown[number]]
        left = [text[a] for a, _ in stage["rows"] if a >= 0]
        assert left == [line for line, _ in shown[max(number - 1, 0)]]
        differ = sum(a < 0 or b < 0 or text[a] != text[b] for a, b in stage["rows"])
        assert differ == stage["changed"]
        assert (differ > 0) == (number > 0)


def test_lines_know_where_they_come_from() -> None:
    first = product.function.__code__.co_firstlineno
    found = dict(lines_of(product.lower("cpu", M=100, K=64).stages[0][1], "test_page.py"))
    (dot,) = (line for text, line in found.items() if " = dot(" in text)
    assert dot == str(first + 7)
    elsewhere = dict(lines_of(product.lower("cpu", M=100, K=64).stages[0][1], "other.py"))
    assert f"test_page.py:{first + 7}" in elsewhere.values()
    assert not any("#" in text for text in found)


# --- memory -----------------------------------------------------------------------------------------------------


def test_the_memory_of_a_program() -> None:
    lowered = norm.lower("triton", T=64, H=32)
    found = memory_map(lowered.kernel, {"T": 64, "H": 32}, 2)
    rows = lowered.schedule["row"]
    assert found.peak(shared=True) == 0
    assert found.peak(shared=False) >= 2 * rows * 32 * 4  # v, and the product with itself or the weights
    assert found.peak(shared=False) <= 4 * rows * 32 * 4
    for shared in (False, True):
        for (at, a), (other, b) in itertools.combinations(found.offsets(shared), 2):
            together = a.start < b.end and b.start < a.end
            assert not together or at + a.bytes <= other or other + b.bytes <= at, (a, b)


def test_operands_of_products_lie_in_shared_memory_once_per_stage() -> None:
    lowered = product.lower("triton", M=1000, K=96)
    env = {"M": 1000, "K": 96}
    blocks = lowered.schedule.blocks
    wanted = (blocks["m"] * blocks["k"] + blocks["k"] * 64) * 2
    for stages in (1, 3):
        assert memory_map(lowered.kernel, env, stages).peak(shared=True) == wanted * stages
    names = {t.name for t in memory_map(lowered.kernel, env, 1).tiles if not t.shared}
    assert any(name.startswith("acc") for name in names)


# --- the estimate and its trace ---------------------------------------------------------------------------------


def test_every_program_runs_once_and_lanes_do_not_overlap() -> None:
    made = subject(norm, norm.signature.bind((torch.randn(4100, 32), torch.randn(32)), {}), binary=False).lanes
    assert made is not None
    rows = norm.lower("triton", T=4100, H=32).schedule["row"]
    assert made.programs == -(-4100 // rows)
    programs = sorted(n for p in made.placed for n in range(p.first, p.first + p.count))
    assert programs == list(range(made.programs))
    for _, lane in itertools.groupby(sorted(made.placed, key=lambda p: p.processor), key=lambda p: p.processor):
        ordered = sorted(lane, key=lambda p: p.start)
        for before, after in itertools.pairwise(ordered):
            assert before.start + before.seconds <= after.start + 1e-12
    assert {p.processor for p in made.placed} <= set(range(H100_DEVICE.processors))
    assert made.seconds == max(p.start + p.seconds for p in made.placed)
    assert 0 < made.busy <= 1


def test_the_estimate_never_beats_the_roofline() -> None:
    for rows in (1, 7, 132, 4096, 100_000):
        found = subject(norm, arguments_for(norm, known={"T": rows, "H": 4096}), binary=False)
        assert found.lanes is not None
        assert found.lanes.seconds >= found.about.floor + H100_DEVICE.launch
    assert found.lanes.seconds < 1.5 * found.about.floor  # and is near it where there is work for all
    assert found.lanes.bound == "memory"


def test_one_program_gets_what_one_multiprocessor_can_draw() -> None:
    low = norm.lower("triton", T=1, H=4096)
    work = norm.explain(torch.randn(1, 4096), torch.randn(4096)).work
    one = estimate(low, {"T": 1, "H": 4096}, work, 1)
    device = H100_DEVICE
    assert one.seconds == pytest.approx(device.launch + device.latency)  # 24 KiB come in less
    assert (one.bound, one.waves < 0.01) == ("latency", True)
    much = replace(work, read={"x": 10**9}, written={})
    share = device.reach * device.machine.copy / device.processors
    assert estimate(low, {"T": 1, "H": 4096}, much, 1).seconds == pytest.approx(device.launch + 1e9 / share)


def test_what_limits_residency() -> None:
    low = norm.lower("triton", T=4096, H=32)
    work = norm.explain(torch.randn(64, 32), torch.randn(32)).work
    warps = low.schedule.warps
    for registers, shared, limit in ((255, 0, "registers"), (0, 120_000, "shared memory"), (0, 0, None)):
        made = estimate(low, {"T": 4096, "H": 32}, work, 512, registers, shared)
        if limit:
            assert made.limit == limit
        most = {"registers": 65536 // (255 * 32 * warps), "shared memory": 1, None: min(32, 64 // warps)}[limit]
        assert made.resident == most


def test_ragged_blocks_are_shorter() -> None:
    low = norm.lower("triton", T=4100, H=32)
    size = low.schedule["row"]
    shares = program_shares(low.kernel, {"T": 4100, "H": 32}, -(-4100 // size))
    assert sum(shares) == pytest.approx(1)
    assert shares[-1] == pytest.approx(shares[0] * (4100 % size) / size)
    assert program_shares(low.kernel, {"T": 4100, "H": 32}, 7) == [1 / 7] * 7  # not the grid: all alike


def test_the_error_of_the_estimate_is_told() -> None:
    """How `accuracy.py` compares; what it finds stands in docs/tile/pictures.md."""
    measured = [
        {"kernel": "rms_norm", "case": "hidden_4096", "us": 10.0}, {"kernel": "rms_norm", "case": "gone", "us": 1.0},
        {"kernel": "no_such_kernel", "case": "x", "us": 1.0}, {"kernel": "index_scores", "us": 1.0, "case": "x"},
    ]  # fmt: skip
    (row,) = accuracy.compare(measured, {})
    assert (row.kernel, row.case, row.measured) == ("rms_norm", "hidden_4096", 10.0)
    assert row.factor == row.estimated / 10.0
    rows = [accuracy.Row("k", str(n), e, 10.0, "memory") for n, e in enumerate((5.0, 10.0, 11.0, 14.0, 40.0))]
    assert accuracy.summary(rows) == (
        "5 kernels: half are within a factor of 1.40; 2 within a factor of 1.25, 3 within a factor of 1.5, "
        "4 within a factor of 2; median factor 1.10"
    )


def test_the_trace_follows_the_schema(norm_page: Page) -> None:
    trace = json.loads(json.dumps(norm_page.trace))
    lanes = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"]
    assert lanes == [f"SM {n}" for n in range(132)]
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert events
    for event in events:
        assert set(event) == {"ph", "pid", "tid", "cat", "name", "ts", "dur", "args"}
        assert event["ts"] >= 0 < event["dur"]
        assert event["cat"] == "estimated"
    about = trace["otherData"]
    assert about["measured"] is False
    assert about["note"] == "estimated, not measured"
    (launch,) = about["launches"]
    assert launch["seconds"] * 1e6 == pytest.approx(max(e["ts"] + e["dur"] for e in events), rel=1e-3)
    assert sum(e["args"]["programs"] for e in events) == launch["programs"]
    assert len(lanes_of(trace)) == 132


def test_launches_of_a_graph_follow_each_other(layer_page: Page) -> None:
    assert layer_page.trace is not None
    ends: dict[str, tuple[float, float]] = {}
    for event in layer_page.trace["traceEvents"]:
        if event["ph"] == "X":
            name, begin, end = event["args"]["kernel"], event["ts"], event["ts"] + event["dur"]
            low, high = ends.get(name, (begin, end))
            ends[name] = (min(low, begin), max(high, end))
    assert list(ends) == ["0: norm", "1: bump", "2: norm", "3: norm"]
    for before, after in itertools.pairwise(ends.values()):
        assert before[1] < after[0]


def test_a_trace_of_measured_lanes_is_drawn_too() -> None:
    """The seam for timers inside kernels: any trace with named threads and complete events."""
    events = [{"ph": "M", "pid": 0, "tid": 7, "name": "thread_name", "args": {"name": "SM 7"}}]
    events += [{"ph": "X", "pid": 0, "tid": 7, "name": "load", "ts": 1.0, "dur": 2.0}]
    picture = ElementTree.fromstring(svg.lanes({"traceEvents": events, "otherData": {"measured": True}}))
    assert [t.text for t in picture.iter("title")] == ["SM 7: 1 programs, busy 2.00 of 3.00 us"]


# --- the graph --------------------------------------------------------------------------------------------------


def test_edges_of_a_graph(layer_page: Page) -> None:
    (text,) = re.findall(r'<svg[^>]*aria-label="Graph".*?</svg>', layer_page.html, re.S)
    titles = [str(t.text) for t in ElementTree.fromstring(text).iter("title")]
    assert any(t.startswith("RAW y: 0: norm to 2: norm") for t in titles)
    assert any(t.startswith("WAR x: 0: norm to 1: bump") for t in titles)
    assert any(t.startswith("RAW x: 1: bump to 3: norm") for t in titles)
    assert not any(t.startswith("RAW x: x to 3: norm") for t in titles)  # bump has changed it


def test_a_mean_stands_for_lengths_that_are_not_there(layer_page: Page) -> None:
    assert "Too short: loops" not in layer_page.html
    open_ = layer.page(T=64, H=32)
    assert "Too short: loops whose length depends on data count once (again)." in open_.html


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(LaunchError, match="graph layer: the dimension T needs a value; it has T, H"):
        layer.page(H=32)
    with pytest.raises(LaunchError, match="graph layer: no dimension or parameter 'W'; it has T, H, x, w, lens"):
        layer.page(T=1, W=3)
    with pytest.raises(LaunchError, match="norm has no case 'none'; it has ragged, empty"):
        norm.page(case="none")
    with pytest.raises(LaunchError, match="product declares no case: give its dimensions, M=64, K=64"):
        product.page()


def test_an_empty_grid_has_no_lanes() -> None:
    page = norm.page(case="empty", binary=False)
    assert page.trace is None
    assert "The grid is empty" in page.html


# --- the command line, the gallery ------------------------------------------------------------------------------


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, trace, small = tmp_path / "page.html", tmp_path / "trace.json", ["--dim", "T=64", "--dim", "H=512"]
    graph = ["route", "--dim", "T=64", "--dim", "G=8", "--dim", "S=32", "--dim", "k=8", "--dim", "kept=4"]
    assert run(["kernels", "show", *graph, "--html", str(page)]) == 0
    assert "node1" in checked(page.read_text(encoding="utf-8")).ids
    assert "opens in any browser" in capsys.readouterr().out
    assert run(["kernels", "profile", "rms_norm", *small, "--trace", str(trace)]) == 0
    assert "estimated, not measured" in capsys.readouterr().out
    assert json.loads(trace.read_text())["otherData"]["measured"] is False
    for wrong, message in (
        (["show", "rms_nrm", "--html", str(page)], "no kernel is named 'rms_nrm'"),
        (["show", "route", "--case", "x", "--html", str(page)], "route is a graph; describe its sizes with --dim"),
        (["show", "rms_norm", "--case", "x", "--html", str(page)], "has no case 'x'; it has ragged, strided_rows"),
        (["profile", "rms_norm", *small, "--trace", str(tmp_path)], "cannot be written"),
        (["profile", "rms_norm", *small, "--case", "x", "--trace", "t"], "--dim and --case both choose the sizes"),
    ):
        assert run(["kernels", *wrong]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["rms_norm_quant", "mla_prolog_fp8"])
def test_the_gallery(name: str) -> None:
    path = GALLERY / f"{name}.html"
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 300_000
    assert set(checked(text).ids) >= KERNEL_SECTIONS
    assert f"tilery kernels show {name} --case " in text
    assert f"gallery/{name}.html" in (GALLERY.parent / "README.md").read_text()


ACT = """<script>
document.querySelector(".source tr:nth-child(5)").click();
document.querySelectorAll(".stages").forEach((root) => {
  const range = root.querySelector("input[type=range]");
  root.querySelector("input[type=checkbox]").checked = true;
  range.value = range.max;
  range.dispatchEvent(new Event("input"));
});
</script></body>"""


def after_scripts(page: Page, folder: Path) -> str:
    """The page in a browser, once somebody has chosen a line and the last stages. Fails on any error of a script."""
    path = folder / f"{page.title}.html"
    path.write_text(page.html.replace("</body>", ACT), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=3000"]
    command = [BROWSER, *options, f"--user-data-dir={folder / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert 'data-ready="yes"' in done.stdout
    return done.stdout


@pytest.mark.skipif(not BROWSER, reason="set TILERY_TEST_BROWSER to a Chromium to run it")
def test_in_a_browser(norm_page: Page, layer_page: Page, tmp_path: Path) -> None:
    assert 'class="lit"' in after_scripts(layer_page, tmp_path)
    text = after_scripts(norm_page, tmp_path)
    pressed = re.findall(r'<button [^>]*aria-pressed="true"[^>]*>(\w+)<', text)
    tables = re.findall(r'<script type="application/json">(.*?)</script>', norm_page.html, re.S)
    last = [json.loads(table)["stages"][-1] for table in tables]
    assert pressed == [stage["name"] for stage in last]
    for stage in last:
        assert f"{stage['changed']} lines changed by {stage['name']}" in text
    assert text.count('class="lit"') > 2  # the source line, and what it became
    assert re.search(r'<td class="(now|was)">', text)
