"""Parts that need no server: forced tool calls, event templates, metrics, the engine client."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.fake_core import MODEL
from tilery.engine.client import EngineClient, EngineDeadError
from tilery.engine.config import EngineConfig
from tilery.engine.messages import AddRequest, EngineStats, FinishReason, SamplingParams
from tilery.engine.tokenizer import Tokenizer
from tilery.observe.metrics import Histogram, ServingMetrics, one_two_five
from tilery.server import ServerConfig
from tilery.server.protocol import ChatRequest
from tilery.server.sse import MARK, TextTemplate, event
from tilery.server.tool_choice import RequiredCallsParser, constraint, join_calls

ROOT = Path(__file__).resolve().parent.parent.parent
names = st.text(min_size=1, max_size=8)
arguments = st.dictionaries(
    st.text(max_size=5), st.recursive(st.text(max_size=6) | st.integers() | st.none(), st.lists, max_leaves=4)
)


@settings(max_examples=80)
@given(calls=st.lists(st.tuples(names, arguments), min_size=1, max_size=3), blanks=st.booleans(), data=st.data())
def test_required_calls_however_they_are_cut(calls: list[tuple[str, dict]], blanks: bool, data: st.DataObject) -> None:
    objects = [{"name": name, "parameters": parameters} for name, parameters in calls]
    text = json.dumps(objects, indent=1 if blanks else None, ensure_ascii=data.draw(st.booleans()))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parser = RequiredCallsParser()
    parts = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        parts += parser.push(text[start:end])
    found = [(call.function.name, json.loads(call.function.arguments)) for call in join_calls(parts)]
    assert found == calls


def test_required_schema() -> None:
    tool = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "integer"}}}
    body = {
        "messages": [],
        "tools": [{"function": {"name": "f", "parameters": tool}}, {"function": {"name": "g"}}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    request = msgspec.convert(body, ChatRequest)
    schema = json.loads(constraint(request, "required", 10_000).spec)
    assert schema["$defs"] == {"A": {"type": "integer"}}
    assert (schema["minItems"], schema["maxItems"]) == (1, 1)
    assert [item["properties"]["name"] for item in schema["items"]["anyOf"]] == [{"const": "f"}, {"const": "g"}]
    assert "$defs" not in schema["items"]["anyOf"][0]["properties"]["parameters"]


@given(st.text())
def test_template_equals_encoding(text: str) -> None:
    def example(value: str) -> dict:
        return {"a": value, "b": [{"c": value, "d": None}]}

    assert TextTemplate(example(MARK)).fill(text) == event(example(text))


def test_one_two_five() -> None:
    assert one_two_five(100) == (1, 2, 5, 10, 20, 50, 100)
    assert one_two_five(0) == (1,)


def test_histogram() -> None:
    histogram = Histogram("x", "", (1, 2))
    for value in (0.5, 1, 1.5, 9):
        histogram.observe(value)
    assert histogram.buckets() == [("1.0", 2), ("2.0", 3), ("+Inf", 4)]
    assert histogram.total == 12


def test_every_engine_counter_has_two_names() -> None:
    stats = EngineStats(generation_tokens=7, spec_accepted_per_position=[3, 1], kv_blocks_used=1, kv_blocks_total=4)
    metrics = ServingMetrics("m", 1000, lambda: msgspec.structs.asdict(stats), {"block_size": "64"})
    metrics.finished["stop"] += 2
    lines = metrics.render().decode().splitlines()
    labels = '{engine="0",model_name="m"'
    for prefix in ("tilery", "vllm"):
        assert f"{prefix}:generation_tokens_total{labels}}} 7.0" in lines
        assert f"{prefix}:kv_cache_usage_perc{labels}}} 0.25" in lines
        assert f'{prefix}:spec_decode_num_accepted_tokens_per_pos_total{labels},position="0"}} 3.0' in lines
        assert f'{prefix}:cache_config_info{{block_size="64",engine="0",model_name="m"}} 1.0' in lines
    own = ServingMetrics("m", 1000, lambda: msgspec.structs.asdict(stats), {}, vllm_names=False).render()
    assert b"vllm:" not in own


@pytest.mark.parametrize(
    ("field", "value"), [("port", 70000), ("max_choices", 0), ("drain_seconds", -1), ("admin_key", "")]
)
def test_server_config_names_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        ServerConfig(**{field: value})  # type: ignore[arg-type]


def test_api_process_needs_no_torch() -> None:
    """Torch costs seconds of start and hundreds of megabytes: it belongs to the engine process."""
    code = "import sys, tilery.server; print('torch' in sys.modules, 'numpy' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == "False False"


# ---- engine client -----------------------------------------------------------------------------------------------


def request(id: str, text: str = "Hello", **params: object) -> AddRequest:
    tokenizer = Tokenizer.load(MODEL)
    return AddRequest(
        request_id=id,
        prompt_token_ids=tokenizer.encode(text),
        params=SamplingParams(**{"max_tokens": 5, **params}),  # type: ignore[arg-type]
    )


async def launch() -> EngineClient:
    return await EngineClient.launch(EngineConfig(model=MODEL), core="tests.server.fake_core:FakeCore")


def test_client_streams_calls_and_closes() -> None:
    async def main() -> None:
        client = await launch()
        assert client.info.model == "fake"
        with client.generate(request("a", n=2), request("b")) as stream:
            outputs = [output async for batch in stream for output in batch]
        assert len(outputs) == 15
        assert sum(output.finish_reason is FinishReason.LENGTH for output in outputs) == 3
        client.generate(request("c", max_tokens=None))
        with pytest.raises(ValueError, match="already running"):
            client.generate(request("c"))
        assert (await client.call("ping")).ok
        reply = await client.call("dance")
        assert not reply.ok
        assert "dance" in reply.value
        await client.close()
        with pytest.raises(EngineDeadError, match="shut down"):
            client.generate(request("d"))
        await client.close()

    asyncio.run(main())


def test_client_abort_answers_every_child() -> None:
    async def main() -> None:
        client = await launch()
        with client.generate(request("a", "<<slow>>", n=3, max_tokens=4000)) as stream:
            reasons = []
            async for batch in stream:
                client.abort(["a", "unknown"])
                reasons += [output.finish_reason for output in batch if output.finish_reason is not None]
        assert reasons == [FinishReason.ABORT] * 3
        await client.close()

    asyncio.run(main())


def test_client_abort_of_one_choice_leaves_the_others() -> None:
    async def main() -> None:
        client = await launch()
        ends: dict[int, FinishReason] = {}
        with client.generate(request("a", "<<slow>>", n=3, max_tokens=12)) as stream:
            async for batch in stream:
                client.abort_choice("a", 1)
                client.abort_choice("unknown", 0)
                ends |= {output.index: output.finish_reason for output in batch if output.finish_reason is not None}
        assert ends == {0: FinishReason.LENGTH, 1: FinishReason.ABORT, 2: FinishReason.LENGTH}
        await client.close()

    asyncio.run(main())


def test_client_death_reaches_everybody() -> None:
    async def main() -> None:
        client = await launch()

        async def read(id: str, text: str) -> None:
            with client.generate(request(id, text, max_tokens=4000)) as stream:
                async for _ in stream:
                    pass

        slow = asyncio.create_task(read("a", "<<slow>>"))
        await asyncio.sleep(0.1)
        start = time.monotonic()
        results = await asyncio.gather(slow, read("b", "<<crash>>"), client.call("stats"), return_exceptions=True)
        assert time.monotonic() - start < 1
        for result in results[:2]:
            assert isinstance(result, EngineDeadError)
            assert "told to crash" in str(result)
        with pytest.raises(EngineDeadError, match="told to crash"):
            await client.call("ping")
        await client.close()

    asyncio.run(main())
