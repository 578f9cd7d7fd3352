"""The command line itself: help, start-up weight, mistakes of the user, and what the commands hand to the engine."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import tilery as package
from tilery.cli import generate, serve
from tilery.engine.config import CacheDType, Device, DType, EngineConfig
from tilery.engine.messages import SamplingParams
from tilery.server import ServerConfig


def test_help_tells_what_to_type_first(tilery) -> None:
    for arguments in ([], ["--help"]):
        ran = tilery(*arguments)
        assert ran.code == 0
        for word in ("Type first", "tilery generate", "tilery serve", "tilery chat", "bench", "kernels"):
            assert word in ran.out


@pytest.mark.parametrize("command", [["serve"], ["generate"], ["chat"], ["bench"], ["bench", "serve"], ["kernels"]])
def test_every_command_has_help(tilery, command: list[str]) -> None:
    ran = tilery(*command, "--help")
    assert ran.code == 0
    assert "Usage: tilery" in ran.out


def test_version(tilery) -> None:
    ran = tilery("--version")
    assert (ran.code, ran.out) == (0, f"tilery {package.__version__}\n")


def test_help_loads_nothing_heavy() -> None:
    """What keeps `tilery --help` quick: none of these come in before a command runs."""
    code = """
import sys
from tilery.cli.main import run
assert run(["--help"]) == 0
heavy = {"torch", "numpy", "starlette", "uvicorn", "zmq", "tokenizers", "jinja2", "asyncio", "http.client"}
print(sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sing"], "sing"),
        (["serve", "--port", "99999"], "--port"),
        (["serve", "--dtype", "int3"], "float32"),
        (["serve", "--device", "tpu"], "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        (["serve", "--bogus"], "--bogus"),
        (["serve", "--max-running", "0"], "--max-running must be at least 1, got 0."),
        (["serve", "--max-running", "4000"], "--max-batch-tokens (2048)"),
        (["serve", "--cache-tokens", "0"], "--cache-tokens must be at least 1"),
        (["serve", "--chat-template", "nowhere.jinja"], "--chat-template nowhere.jinja: no such file."),
        (
            ["serve", "--operator", "linear"],
            "--operator linear: expected NAME=IMPLEMENTATION, as in mla_decode=reference.",
        ),
        (["serve", "no-such-model"], "no model folder 'no-such-model'"),
        (["serve", "--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["generate", "--model", "./absent", "x"], "no model folder './absent'"),
        (["generate", "--temperature", "-1", "x"], "--temperature must be between 0 and 100, got -1.0."),
        (["generate", "--max-tokens", "0", "x"], "--max-tokens must be at least 1, got 0."),
    ],
)
def test_mistakes_are_one_line(tilery, arguments: list[str], says: str) -> None:
    ran = tilery(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.count("\n") == 1
    assert ran.err.startswith("tilery")
    assert says in ran.err


def test_incomplete_model_folders(tilery, tmp_path: Path, bundled_model: Path) -> None:
    assert "has no config.json" in tilery("serve", str(tmp_path)).err
    (tmp_path / "config.json").write_text("{}")
    ran = tilery("serve", str(tmp_path))
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    shutil.copy(bundled_model / "config.json", tmp_path)
    ran = tilery("serve", str(tmp_path))
    assert "has no *.safetensors" in ran.err
    assert ran.code == 2
    assert "is a file" in tilery("serve", str(tmp_path / "config.json")).err


def test_bundled_model_is_the_default(bundled_model: Path) -> None:
    from tilery.cli.options import check_model
    from tilery.models.config import DEFAULT_MODEL

    assert bundled_model.name == DEFAULT_MODEL
    check_model(DEFAULT_MODEL)
    check_model(str(bundled_model))


def test_busy_port(tilery) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ran = tilery("serve", "--port", str(port))
    assert ran.code == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in ran.err
    assert "--port" in ran.err


def test_a_free_port_passes() -> None:
    serve.check_port("127.0.0.1", 0)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineConfig, ServerConfig]]:
    """What `tilery serve` hands to the server, which does not run."""
    seen: list[tuple[EngineConfig, ServerConfig]] = []
    monkeypatch.setattr("tilery.server.run", lambda *pair: seen.append(pair))
    return seen


def test_a_server_that_cannot_start_says_why_in_one_line(tilery, monkeypatch: pytest.MonkeyPatch) -> None:
    from tilery.server import StartError

    def refuse(*_: object) -> None:
        raise StartError("The engine could not start: no such operator.")

    monkeypatch.setattr("tilery.server.run", refuse)
    ran = tilery("serve", "--port", "0")
    assert (ran.code, ran.err.strip()) == (2, "tilery: The engine could not start: no such operator.")


def test_serve_hands_over_every_setting(tilery, served) -> None:
    ran = tilery(
        *(
            "serve",
            "--port",
            "0",
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--cache-dtype",
            "fp8",
            "--max-model-len",
            "100",
        ),
        *("--cache-tokens", "640", "--block-size", "32", "--max-batch-tokens", "50", "--max-running", "4"),
        *("--max-waiting", "9", "--no-prefix-cache", "--cache-salt", "s", "--speculative-tokens", "1"),
        *("--speculative-always", "--threads", "1", "--seed", "7", "--aging-seconds", "2", "--api-key", "a"),
        *("--api-key", "b", "--admin-key", "c", "--served-model-name", "n", "--cors-origin", "*"),
        *("--operator", "mla_decode=reference", "--operator", "linear=native"),
    )
    assert ran.code == 0, ran.err
    config, server = served[0]
    assert config == EngineConfig(
        model="tilery-books-26m",
        device=Device.CPU,
        dtype=DType.FLOAT32,
        cache_dtype=CacheDType.FP8,
        max_model_len=100,
        cache_tokens=640,
        block_size=32,
        max_batch_tokens=50,
        max_running=4,
        max_waiting=9,
        enable_prefix_cache=False,
        cache_salt="s",
        speculative_tokens=1,
        speculative_auto_off=False,
        threads=1,
        operators={"mla_decode": "reference", "linear": "native"},
        seed=7,
        aging_seconds=2.0,
    )
    assert (server.port, server.api_keys, server.admin_key) == (0, ("a", "b"), "c")
    assert (server.model_names, server.cors_origins) == (("n",), ("*",))


def test_serve_and_engine_agree_on_defaults(tilery, served) -> None:
    assert tilery("serve", "--port", "0").code == 0
    config, server = served[0]
    assert config == EngineConfig(model="tilery-books-26m")
    assert server == ServerConfig(port=0)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """In place of the engine: answers each prompt in capitals and notes what it was given."""
    calls: list[tuple] = []

    def run_model(model: str, settings: dict, texts: list[str], params: SamplingParams) -> list[SimpleNamespace]:
        calls.append((model, settings, texts, params))
        return [
            SimpleNamespace(
                prompt=text,
                prompt_token_ids=[1, 2],
                outputs=[SimpleNamespace(text=text.upper(), token_ids=[3, 4, 5], finish_reason="length")],
            )
            for text in texts
        ]

    monkeypatch.setattr(generate, "run_model", run_model)
    return calls


def test_generate_prints_the_bare_text_of_one_prompt(tilery, stand_in) -> None:
    ran = tilery("generate", "ab", "--seed", "3", "--max-tokens", "4", "--temperature", "0", "--threads", "1")
    assert (ran.code, ran.out) == (0, "AB\n")
    model, settings, texts, params = stand_in[0]
    assert (model, texts, settings["threads"]) == ("tilery-books-26m", ["ab"], 1)
    assert (params.seed, params.max_tokens, params.temperature) == (3, 4, 0.0)
    EngineConfig(model=model, **settings)


@pytest.mark.parametrize("arguments", [["generate", "ab"], ["kernels", "list"]])
def test_a_gpu_asked_for_in_vain_is_one_line(tilery, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", None)
    ran = tilery(*arguments, "--device", "cuda")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith("tilery: --device cuda: this torch (")
    assert ran.err.endswith(") is built without CUDA; install a build with it, or take device cpu.\n")


def test_generate_several(tilery, stand_in) -> None:
    assert tilery("generate", "ab", "cd").out == "abAB\n\ncdCD\n"


def test_generate_json_from_stdin(tilery, stand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("ab\n\nç\n"))
    ran = tilery("generate", "--json")
    rows = [json.loads(line) for line in ran.out.splitlines()]
    assert [row["text"] for row in rows] == ["AB", "Ç"]
    assert rows[0] == {
        "prompt": "ab",
        "text": "AB",
        "finish_reason": "length",
        "prompt_tokens": 2,
        "completion_tokens": 3,
    }


def test_generate_without_a_prompt(tilery, stand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    ran = tilery("generate")
    assert ran.code == 2
    assert "holds no prompt" in ran.err
    assert stand_in == []


def test_kernels_list_and_explain(tilery) -> None:
    from tilery.ops.registry import list_operators

    operators = list_operators()
    listing = tilery("kernels", "list").out
    for operator in operators:
        assert operator.name in listing
    one = operators[0]
    ran = tilery("kernels", "list", "--explain", one.name)
    assert ran.out.startswith(one.name)
    assert one.contract.strip() in ran.out
    for implementation in one.implementations:
        assert f"{implementation.name} ({implementation.target})" in ran.out
        assert implementation.reason in ran.out
    ran = tilery("kernels", "list", "--explain", "nothing")
    assert ran.code == 2
    assert one.name in ran.err
