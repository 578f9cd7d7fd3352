"""Plug-ins: an installed package's operation, pass and target are found, used, and left out when they fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.plugins import DEMO, install, register
from tilery import tile
from tilery.tile import Dim, OpDef, Tensor, f32, plugins
from tilery.tile.errors import LoweringError
from tilery.tile.lowering import lower
from tilery.tile.ops import OPS
from tilery.tile.plugins import Pass, PluginWarning, Target

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "tile" / "plugins.md"
N = Dim("N")

USE = """
import json, warnings
import torch
from tilery import tile
from tilery.tile import Dim, Tensor, f32, plugins

N = Dim("N")

def reference(x):
    return (x + torch.sqrt(x * x + 4)) / 2 / 8

@tile.kernel(reference=reference)
def smooth(x: Tensor[N, f32]):
    from tilery_demo_plugin import squareplus

    y = tile.empty([N], f32)
    for n in tile.parallel(tile.blocks(N, "n")):
        y[n] = squareplus(x[n]) / 8.0
    return y

@smooth.case
def ragged(rand):
    return {"x": torch.randn(77, generator=rand)}

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    report = smooth.verify()
x = torch.randn(1000)
print(json.dumps({
    "rows": [[r.stage, r.ok] for r in report.rows],
    "close": torch.allclose(smooth(x), reference(x), atol=1e-6),
    "warnings": [str(w.message) for w in caught if issubclass(w.category, plugins.PluginWarning)],
    "stages": [name for name, _ in smooth.lower("triton", N=64).stages],
    "pseudo": smooth.lower("pseudo", N=64).source,
    "flops": smooth.explain(x).work.vector,
    "plugins": plugins.describe(),
    "state": plugins.state(),
}))
"""


def python(site: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A new process that finds what is in `site`."""
    path = site / "use_it.py"  # a file, since kernels are read from their source
    path.write_text(code)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), **environment}
    return subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=env, timeout=240)


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What a process says that has the demonstration package, and one that does not import."""
    site = tmp_path_factory.mktemp("site")
    install(DEMO, site)
    register(site, "tilery-broken-plugin", "3.1", {"tilery.tile.ops": ["lost = no_such_module_at_all:OP"]})
    done = python(site, USE, TILERY_CACHE_DIR=str(site / "cache"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_operation_is_right_at_every_stage(used: dict[str, list[list[object]]]) -> None:
    rows = dict(map(tuple, used["rows"]))  # type: ignore[arg-type]
    assert all(rows.values())
    assert {"trace", "cpu: reciprocal", "cpu: bound", "cpu: compiled"} <= set(rows)
    assert used["close"] is True
    assert used["flops"] == (7 + 4) * 1000  # as written: squareplus, and a division


def test_the_pass_is_a_stage_where_it_asked_to_stand(used: dict[str, list[str]]) -> None:
    stages = used["stages"]
    assert stages.index("reciprocal") > stages.index("trace")
    assert stages.index("reciprocal") < stages.index("bound")


def test_the_target_emits(used: dict[str, str]) -> None:
    text = used["pseudo"]
    assert text.startswith("# smooth: blocks n = ")
    assert "= squareplus(" in text
    assert "mul(" in text
    assert "div(" not in text
    assert "y[...] = " in text


def test_a_plug_in_that_fails_is_left_out_with_a_warning(used: dict[str, list[str]]) -> None:
    (message,) = used["warnings"]
    for part in (
        "the plug-in 'lost' of tilery-broken-plugin 3.1 (tilery.tile.ops, no_such_module_at_all:OP) is left out",
        "ModuleNotFoundError: No module named 'no_such_module_at_all'",
        "set TILERY_NO_PLUGINS=tilery-broken-plugin to stop loading it",
    ):
        assert part in message
    states = {(row["distribution"], row["kind"]): row["state"] for row in used["plugins"]}  # type: ignore[index]
    assert states["tilery-demo-plugin", "ops"] == states["tilery-demo-plugin", "passes"] == "loaded"
    assert states["tilery-broken-plugin", "ops"].startswith("ModuleNotFoundError")


def test_compiled_kernels_depend_on_the_plug_ins(used: dict[str, str]) -> None:
    assert "tilery-demo-plugin 0.1" in used["state"]
    assert re.search(r"tilery_demo_plugin\.py \d+ \d+", used["state"])


def test_plug_ins_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(DEMO, tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv(plugins.DISABLE, raising=False)
    demo = {"tilery-demo-plugin"}
    assert demo <= {name for _, name, _ in plugins.found()}
    for value in ("1", "all", "Tilery_Demo.Plugin", "other,tilery-demo-plugin"):
        monkeypatch.setenv(plugins.DISABLE, value)
        assert not demo & {name for _, name, _ in plugins.found()}
    for value in ("0", "", "other"):
        monkeypatch.setenv(plugins.DISABLE, value)
        assert demo <= {name for _, name, _ in plugins.found()}


def test_half_an_installation_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(DEMO, tmp_path)
    register(tmp_path, "half", "1.0", {"tilery.tile.ops": ["a = b:C"]})
    (tmp_path / "half-1.0.dist-info" / "METADATA").unlink()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv(plugins.DISABLE, raising=False)
    with pytest.warns(PluginWarning, match=r"half-1\.0\.dist-info cannot be read"):
        assert "tilery-demo-plugin" in {name for _, name, _ in plugins.found()}


# --- in this process --------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is loaded yet."""
    operations = dict(OPS)
    monkeypatch.setattr(plugins, "_TABLE", plugins.Table())
    yield
    OPS.clear()
    OPS.update(operations)


def offer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, **entries: str) -> None:
    """Installs a distribution `offered` whose module has this source; `entries`: group's last word = object."""
    name = f"offered_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
    groups = {f"tilery.tile.{kind}": [f"{kind} = {name}:{what}"] for kind, what in entries.items()}
    register(tmp_path, "offered", "1.0", groups)
    monkeypatch.syspath_prepend(str(tmp_path))


@tile.kernel
def halved(x: Tensor[N, f32]):
    y = tile.empty([N], f32)
    for n in tile.parallel(tile.blocks(N, "n")):
        y[n] = x[n] / 2.0
    return y


SAME = """
    from tilery.tile import OpDef
    from tilery.tile.plugins import Pass, Target
    def infer(types, attrs): return (types[0],)
"""


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize(
    ("source", "entries", "message"),
    [
        ("THING = 3", {"ops": "THING"}, "expected OpDef or a list of them, got int"),
        (SAME + "    THING = OpDef('exp', infer, abs)", {"ops": "THING"}, "the operation 'exp' exists already"),
        (SAME + "    THING = Pass('cse', abs, after='dce')", {"passes": "THING"}, "the pass 'cse' exists already"),
        (SAME + "    THING = Target('cpu', str)", {"targets": "THING"}, "the target 'cpu' exists already"),
        (SAME + "    THING = Pass('mine', abs)", {"passes": "THING"}, "give one of after= and before="),
        (SAME + "    THING = Target('Mine', str)", {"targets": "THING"}, "must be of small letters"),
        (SAME + "    THING = Target('mine', str, 'gpu')", {"targets": "THING"}, "must be like 'cpu' or 'triton'"),
        (
            SAME + "    THING = Pass('mine', abs, after='dcee')", {"passes": "THING"},
            "stands beside 'dcee', which is none of bound, cse, dce, hoist, padded, simplify, widen",
        ),
        (SAME + "    THING = [OpDef('two', infer, abs)] * 2", {"ops": "THING"}, "two of its parts have one name"),
        ("raise SystemError('broken')", {"ops": "THING"}, "SystemError: broken"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_left_out(
    source: str, entries: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offer(monkeypatch, tmp_path, source, **entries)
    with pytest.warns(PluginWarning, match=re.escape(message)) as caught:
        table = plugins.load()
    assert "of offered 1.0" in str(caught[0].message)
    assert not table.passes
    assert not table.targets
    assert torch.equal(halved.interpret(torch.ones(3)), torch.full((3,), 0.5))


@pytest.mark.usefixtures("_fresh")
def test_passes_stand_where_they_ask_and_may_name_each_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = """
        from tilery.tile.plugins import Pass
        def same(kernel): return kernel
        A = [Pass("second", same, after="first"), Pass("third", same, before="widen", targets=("triton",))]
    """
    offer(monkeypatch, tmp_path, source, passes="A")
    other = tmp_path / "other"
    other.mkdir()
    offer(monkeypatch, other, "from tilery.tile.plugins import Pass\nB = Pass('first', lambda k: k, before='widen')",
          passes="B")  # fmt: skip
    for path in (tmp_path, other):  # one name would hide the other
        (meta,) = path.glob("*.dist-info")
        (meta / "METADATA").write_text(f"Metadata-Version: 2.1\nName: offered-{path.name}\nVersion: 1.0\n")
    plain = [(name, lambda k: k) for name in ("dce", "widen", "bound")]
    assert [name for name, _ in plugins.arrange(plain, "cpu")] == ["dce", "first", "second", "widen", "bound"]
    with_third = [name for name, _ in plugins.arrange(plain, "triton")]
    assert with_third == ["dce", "first", "second", "third", "widen", "bound"]


def test_a_pass_that_goes_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ir = halved.trace(halved.signature.specialise({"x": torch.zeros(8)}))
    for function, message in (
        (lambda k: 1 // 0, "ZeroDivisionError"),
        (lambda k: None, "it gave NoneType where a Kernel was expected"),
        (lambda k: type(k)(**{**vars(k), "body": k.body[1:]}), "is used where nothing defines it"),
    ):
        table = plugins.Table(
            passes=[Pass("odd", function, after="dce")], origin={"odd": "'odd' of offered"}, done=True
        )
        monkeypatch.setattr(plugins, "_TABLE", table)
        with pytest.raises(LoweringError) as caught:
            lower(ir, {"N": 8}, "cpu")
        assert "halved: the pass 'odd', plug-in 'odd' of offered, failed: " in str(caught.value)
        assert message in str(caught.value)


def test_a_target_that_goes_wrong_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(lowered: object) -> str:
        raise KeyError("dot")

    for emit, message in ((fails, "KeyError: 'dot'"), (lambda lowered: 3, "it gave int where text was expected")):
        target = Target("words", emit, like="triton")  # type: ignore[arg-type]
        table = plugins.Table(targets={"words": target}, origin={"words": "'words' of offered"}, done=True)
        monkeypatch.setattr(plugins, "_TABLE", table)
        lowered = halved.lower("words", N=8)
        assert lowered.kernel.stage == "padded"
        with pytest.raises(
            LoweringError, match="the target 'words', plug-in 'words' of offered, failed on 'halved'"
        ) as c:
            _ = lowered.source
        assert message in str(c.value)
    with pytest.raises(LoweringError, match=r"no target 'wrds'; there are: cpu, triton.*, words"):
        halved.lower("wrds", N=8)


def test_an_operation_that_its_module_registered_too_is_fine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert isinstance(OPS["exp"], OpDef)
    plugin = plugins.Plugin("tilery.tile.ops", "exp", "m:OP", "offered", "1", (OPS["exp"],))
    assert plugins._add(plugin).error == ""


def test_the_command_line_lists_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from tilery.cli.kernel_pages import print_plugins

    monkeypatch.setattr(plugins, "_TABLE", plugins.Table(done=True))
    print_plugins()
    assert capsys.readouterr().out == ""
    rows = [
        plugins.Plugin("tilery.tile.ops", "two", "m:OPS", "offered", "1.0", (OPS["exp"], OPS["log"])),
        plugins.Plugin("tilery.tile.passes", "lost", "m:P", "broken", "2.0", (), "ImportError: no"),
    ]
    monkeypatch.setattr(plugins, "_TABLE", plugins.Table(plugins=rows, done=True))
    print_plugins()
    out = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["offered", "1.0", "ops", "exp,", "log", "loaded"] in out
    assert ["broken", "2.0", "passes", "lost", "ImportError:", "no"] in out


# --- the page ---------------------------------------------------------------------------------------------------


def test_the_page_shows_the_demonstration_package() -> None:
    """All of it, word for word: the page's Python up to the second heading is the module."""
    page = PAGE.read_text()
    (metadata,) = re.findall(r"^```toml\n(.*?)^```$", page, re.M | re.S)
    assert metadata == (DEMO / "pyproject.toml").read_text()
    part = page[page.index("## The module") : page.index("## Try it")]
    blocks = re.findall(r"^```python\n(.*?)^```$", part, re.M | re.S)
    module = (DEMO / "tilery_demo_plugin.py").read_text()
    assert re.sub(r"\n+", "\n", "\n".join(blocks)) == re.sub(r"\n+", "\n", module)
