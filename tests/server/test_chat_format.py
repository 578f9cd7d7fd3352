"""The chat format: exact prompts, errors, the choice of template, and the streaming parser under every cut."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tilery
from tilery.engine.messages import SamplingParams
from tilery.engine.tokenizer import Tokenizer
from tilery.server.chat import (
    ChatDelta,
    ChatFormatError,
    ChatParser,
    ChatTemplate,
    DeltaKind,
    ParsedMessage,
    params_for_parsing,
    parse,
    render,
    render_prompt,
)
from tilery.server.chat.parse import collect

TOKENIZER = Tokenizer.load(Path(tilery.__file__).parent / "bundled" / "tilery-books-26m")

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello!"}
AGAIN = {"role": "user", "content": "Weather in 杭州?"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "杭州"}'}},
        {"id": "c2", "type": "function", "function": {"name": "clock", "arguments": {"zone": 8}}},
    ],
}
RESULTS = [
    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    {"role": "tool", "tool_call_id": "c2", "content": "12:00"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Today's weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "城市"}}},
        },
    },
    {"type": "function", "function": {"name": "clock"}},
]

TOOLS_TEXT = """## Tools
You have access to the following tools:

### weather
Description: Today's weather

Parameters: {"type": "object", "properties": {"city": {"type": "string", "description": "城市"}}}

### clock
Description: 

Parameters: {}

IMPORTANT: ALWAYS adhere to this exact format for tool use:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>{additional_tool_calls}<｜tool▁calls▁end｜>

Where:
- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces"""  # noqa: W291
CALLS_TEXT = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "杭州"}<｜tool▁call▁end｜>'
    '<｜tool▁call▁begin｜>clock<｜tool▁sep｜>{"zone": 8}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
OUTPUTS_TEXT = "<｜tool▁output▁begin｜>sunny<｜tool▁output▁end｜><｜tool▁output▁begin｜>12:00<｜tool▁output▁end｜>"
B, E, U, A = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"


# ---- exact prompts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "options", "expected"),
    [
        pytest.param([USER], {}, f"{B}{U}Hi{A}</think>", id="plain"),
        pytest.param([USER], {"thinking": True}, f"{B}{U}Hi{A}<think>", id="thinking"),
        pytest.param([USER], {"add_generation_prompt": False}, f"{B}{U}Hi", id="no generation prompt"),
        pytest.param([SYSTEM, USER], {}, f"{B}Be brief.{U}Hi{A}</think>", id="system"),
        pytest.param(
            [SYSTEM, USER, {"role": "developer", "content": "In English."}],
            {},
            f"{B}Be brief.\n\nIn English.{U}Hi{A}</think>",
            id="system messages joined in front",
        ),
        pytest.param(
            [SYSTEM, USER, ANSWER, AGAIN],
            {"thinking": True},
            f"{B}Be brief.{U}Hi{A}</think>Hello!{E}{U}Weather in 杭州?{A}<think>",
            id="multi-turn",
        ),
        pytest.param(
            [USER, {"role": "assistant", "content": "<think>Hm, hi.</think>Hello!"}, AGAIN],
            {},
            f"{B}{U}Hi{A}</think>Hello!{E}{U}Weather in 杭州?{A}</think>",
            id="reasoning in old content dropped",
        ),
        pytest.param(
            [USER, {**ANSWER, "reasoning_content": "Hm."}, AGAIN],
            {"thinking": True},
            f"{B}{U}Hi{A}</think>Hello!{E}{U}Weather in 杭州?{A}<think>",
            id="old reasoning dropped",
        ),
        pytest.param([SYSTEM, AGAIN], {"tools": []}, f"{B}Be brief.{U}Weather in 杭州?{A}</think>", id="no tools"),
        pytest.param(
            [SYSTEM, AGAIN], {"tools": TOOLS}, f"{B}Be brief.\n\n{TOOLS_TEXT}{U}Weather in 杭州?{A}</think>", id="tools"
        ),
        pytest.param(
            [AGAIN], {"tools": TOOLS}, f"{B}{TOOLS_TEXT}{U}Weather in 杭州?{A}</think>", id="tools without system"
        ),
        pytest.param(
            [SYSTEM, AGAIN, CALL, *RESULTS],
            {"tools": TOOLS},
            f"{B}Be brief.\n\n{TOOLS_TEXT}{U}Weather in 杭州?{A}</think>{CALLS_TEXT}{E}{OUTPUTS_TEXT}",
            id="call and results",
        ),
        pytest.param(
            [AGAIN, {**CALL, "content": "One moment."}, *RESULTS, {"role": "assistant", "content": "Sunny."}, USER],
            {"thinking": True},
            f"{B}{U}Weather in 杭州?{A}</think>One moment.{CALLS_TEXT}{E}{OUTPUTS_TEXT}Sunny.{E}{U}Hi{A}<think>",
            id="answer after results",
        ),
        pytest.param([USER, ANSWER], {}, f"{B}{U}Hi{A}</think>Hello!{E}{A}</think>", id="after an answer"),
        pytest.param(
            [USER, ANSWER], {"continue_final_message": True}, f"{B}{U}Hi{A}</think>Hello!", id="continue content"
        ),
        pytest.param([USER, {**ANSWER, "prefix": True}], {}, f"{B}{U}Hi{A}</think>Hello!", id="prefix"),
        pytest.param(
            [USER, {**ANSWER, "prefix": True}], {"thinking": True}, f"{B}{U}Hi{A}<think>Hello!", id="prefix, thinking"
        ),
        pytest.param(
            [USER, {**ANSWER, "reasoning": "Hm."}],
            {"continue_final_message": True, "thinking": True},
            f"{B}{U}Hi{A}<think>Hm.</think>Hello!",
            id="continue after reasoning",
        ),
        pytest.param(
            [USER, {"role": "assistant", "reasoning": "Hm"}],
            {"continue_final_message": True, "thinking": True},
            f"{B}{U}Hi{A}<think>Hm",
            id="continue reasoning",
        ),
        pytest.param(
            [AGAIN, CALL, *RESULTS, {"role": "assistant", "content": "It"}],
            {"continue_final_message": True, "thinking": True},
            f"{B}{U}Weather in 杭州?{A}</think>{CALLS_TEXT}{E}{OUTPUTS_TEXT}It",
            id="continue after results",
        ),
        pytest.param(
            [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}],
            {},
            f"{B}{U}a b{A}</think>",
            id="text parts",
        ),
    ],
)
def test_render(messages: list[dict], options: dict, expected: str) -> None:
    assert render(messages, **options) == expected


def test_prompt_knows_where_the_answer_starts() -> None:
    assert render_prompt([USER], thinking=True).in_reasoning
    assert not render_prompt([USER]).in_reasoning
    assert not render_prompt([AGAIN, CALL, *RESULTS], thinking=True).in_reasoning
    assert not render_prompt([USER], thinking=True, add_generation_prompt=False).in_reasoning
    reasoning = {"role": "assistant", "reasoning": "Hm"}
    assert render_prompt([USER, reasoning], thinking=True, continue_final_message=True).in_reasoning
    said = {**reasoning, "content": "So"}
    assert not render_prompt([USER, said], thinking=True, continue_final_message=True).in_reasoning


@pytest.mark.parametrize(
    ("messages", "error", "index"),
    [
        ([], "messages: must have at least one message", None),
        ([USER, "hi"], "messages[1]: must be an object, got str", 1),
        ([{"role": "bot", "content": ""}], "messages[0].role: unknown role 'bot'; expected one of system, ", 0),
        ([{"content": "x"}], "messages[0].role: unknown role None", 0),
        ([USER, {"role": "user"}], "messages[1].content: a user message needs content", 1),
        ([USER, {"role": "assistant"}], "messages[1].content: an assistant message needs content or tool_calls", 1),
        ([{"role": "user", "content": 3}], "messages[0].content: must be a string or a list of text parts, got int", 0),
        (
            [{"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {}}]}],
            "messages[0].content[1]: this model reads text only; expected "
            '{"type": "text", "text": ...}, got \'image_url\'',
            0,
        ),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]: this model reads text only", 0),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text: must be a string", 0),
        ([{"role": "tool", "content": "x"}], "messages[0].tool_call_id: a tool message must say which call", 0),
        (
            [{"role": "assistant", "tool_calls": [{"function": {}}]}],
            "messages[0].tool_calls[0].function.name: must be a non-empty string",
            0,
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}],
            "messages[0].tool_calls[0].function.arguments: must be JSON text or an object, got int",
            0,
        ),
        ([{"role": "assistant", "tool_calls": "f"}], "messages[0].tool_calls: must be a list, got str", 0),
        ([{**ANSWER, "reasoning": 1}], "messages[0].reasoning: must be a string, got int", 0),
    ],
)
def test_message_errors(messages: list, error: str, index: int | None) -> None:
    with pytest.raises(ChatFormatError, match=re.escape(error)) as caught:
        render(messages)
    assert caught.value.index == index
    assert error.startswith(caught.value.field)


def test_other_errors() -> None:
    with pytest.raises(ChatFormatError, match=r"^tools\[0\]: must be"):
        render([USER], tools=[{"name": "f"}])
    with pytest.raises(ChatFormatError, match=r"^tools\[0\].function.name: "):
        render([USER], tools=[{"type": "function", "function": {"name": ""}}])
    with pytest.raises(ChatFormatError, match=r"^continue_final_message: the last message must have role 'assistant'"):
        render([USER], continue_final_message=True)
    with pytest.raises(ChatFormatError, match="complete and cannot be continued"):
        render([AGAIN, CALL], continue_final_message=True)


# ---- which template --------------------------------------------------------------------------------------------------

JINJA = (
    "{%- for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{%- for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{%- endfor %}{{ '\\n' }}{% endfor -%}"
    "{%- if tools %}{{ tools | tojson }}{% endif %}"
    "{%- if add_generation_prompt %}[bot]{{ '<think>' if enable_thinking }}{% endif %}"
)


def test_native_is_chosen_by_model_type_tokens_and_template() -> None:
    assert ChatTemplate(TOKENIZER, "deepseek_v32").native
    assert ChatTemplate(TOKENIZER, "deepseek_v3").parses_tools
    assert not ChatTemplate(TOKENIZER, "qwen3_moe").native
    assert not ChatTemplate(TOKENIZER, "deepseek_v32", template=JINJA).native


def test_native_apply_and_parser() -> None:
    template = ChatTemplate(TOKENIZER, "deepseek_v32")
    for name in ("thinking", "enable_thinking"):
        prompt = template.apply([USER], template_kwargs={name: True})
        assert prompt.text == render([USER], thinking=True)
        deltas = template.parser(prompt, tools=False).push("Hm.</think>Hello")
        assert collect(deltas) == ParsedMessage("Hello", "Hm.", [])
    assert template.apply([USER]).text == render([USER])
    with pytest.raises(ChatFormatError, match=r"chat_template_kwargs\.thinking: must be true or false, got 'yes'"):
        template.apply([USER], template_kwargs={"thinking": "yes"})
    ids = TOKENIZER.encode(prompt.text, add_special_tokens=False)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == prompt.text
    assert ids.count(0) == 1


def test_bundled_template_agrees_with_native() -> None:
    """The checkpoint's own Jinja template, where it can express the conversation."""
    assert TOKENIZER.chat_template is not None
    jinja = ChatTemplate(TOKENIZER, "deepseek_v32", template=TOKENIZER.chat_template)
    native = ChatTemplate(TOKENIZER, "deepseek_v32")
    for thinking in (False, True):
        for messages in ([USER], [SYSTEM, USER], [SYSTEM, USER, ANSWER, AGAIN]):
            options = {"template_kwargs": {"thinking": thinking}}
            assert jinja.apply(messages, **options) == native.apply(messages, **options)


def test_jinja() -> None:
    template = ChatTemplate(TOKENIZER, "other", template=JINJA)
    parts = {"role": "user", "content": [{"type": "text", "text": "<a> "}, {"type": "text", "text": "é"}]}
    assert template.apply([parts, CALL]).text == (
        '[user] <a> é\n[assistant] None{"city": "杭州"}{"zone": 8}\n[bot]'
    )  # no HTML escapes
    assert template.apply([USER], tools=TOOLS).text == f"[user] Hi\n{json.dumps(TOOLS, ensure_ascii=False)}[bot]"
    thinking = template.apply([USER], template_kwargs={"thinking": True})
    assert thinking.text.endswith("<think>")
    assert thinking.in_reasoning
    assert template.apply([USER, ANSWER], continue_final_message=True).text == "[user] Hi\n[assistant] Hello!"
    assert not template.parses_tools


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("{{ raise_exception('only users') }}", "the chat template refused them: only users"),
        ("{{ messages.append(1) }}", "refused"),
        ("{{ ''.__class__.__mro__ }}", "refused"),
        ("{{ 'x' * 1000000000 }}", "refused"),
        ("{{ 9 ** 9 ** 9 }}", "refused"),
        ("{% for i in range(99999) %}{{ 'x' * 1 if false else 'abcdefghijklmnopqrst' }}{% endfor %}", "more than 1000"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% set k = i + j %}{% endfor %}{% endfor %}",
            "longer than 0.2 seconds",
        ),
    ],
)
def test_jinja_is_bounded(source: str, error: str) -> None:
    template = ChatTemplate(TOKENIZER, "other", template=source, max_seconds=0.2, max_chars=1000)
    with pytest.raises(ChatFormatError, match=error):
        template.apply([USER])


def test_jinja_extras() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    assert ChatTemplate(TOKENIZER, "other", template=source).apply([USER, AGAIN]).text == "Hi"
    year = ChatTemplate(TOKENIZER, "other", template="{{ strftime_now('%Y') }}").apply([USER]).text
    assert re.fullmatch(r"\d{4}", year)
    with pytest.raises(ValueError, match="not valid Jinja"):
        ChatTemplate(TOKENIZER, "other", template="{% if %}")
    with pytest.raises(ChatFormatError, match=r"chat_template_kwargs\.messages: is set by the server"):
        ChatTemplate(TOKENIZER, "other", template="x").apply([USER], template_kwargs={"messages": []})


def test_no_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", None)
    with pytest.raises(ChatFormatError, match="no chat template"):
        ChatTemplate(TOKENIZER, "other").apply([USER])
    assert ChatTemplate(TOKENIZER, "deepseek_v32").native


# ---- parser ----------------------------------------------------------------------------------------------------------


def stream(text: str, cuts: list[int], **options: bool) -> list[ChatDelta]:
    """`text` through a parser in pieces, adjacent deltas of the same kind joined, ids left out."""
    parser = ChatParser(**options)
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    deltas = [delta for a, b in pairwise(bounds) for delta in parser.push(text[a:b])] + parser.finish()
    joined: list[ChatDelta] = []
    for delta in deltas:
        assert delta.kind is DeltaKind.TOOL_START or delta.text
        last = joined[-1] if joined else None
        if last and delta.kind is not DeltaKind.TOOL_START and (last.kind, last.index) == (delta.kind, delta.index):
            joined[-1] = ChatDelta(delta.kind, last.text + delta.text, delta.index)
        else:
            joined.append(ChatDelta(delta.kind, delta.text, delta.index, "", delta.name))
    return joined


def simple(message: ParsedMessage) -> tuple[str, str, list[tuple[str, str]]]:
    return message.reasoning, message.content, [(call.name, call.arguments) for call in message.tool_calls]


CS, CE = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
C, S, D = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
FRAGMENTS = st.sampled_from(
    [CS, CE, C, S, D, "<think>", "</think>", E, "<", "<｜tool", "get_x", '{"a": 1}', " ", "\n", "text", "</", "f" * 150]
)
SOUP = st.lists(FRAGMENTS, max_size=14).map("".join)


@settings(max_examples=600, deadline=None)
@given(text=SOUP, cuts=st.lists(st.integers(1, 200), max_size=20), thinking=st.booleans(), tools=st.booleans())
@example(text=f"a{CS}{C}f{S}{{}}{D}\n{C}g{S}{{}}{D}\nb{CE}", cuts=list(range(200)), thinking=False, tools=True)
def test_cuts_do_not_matter(text: str, cuts: list[int], thinking: bool, tools: bool) -> None:
    whole = stream(text, [], thinking=thinking, tools=tools)
    assert stream(text, cuts, thinking=thinking, tools=tools) == whole
    assert stream(text, list(range(len(text))), thinking=thinking, tools=tools) == whole


@settings(max_examples=300, deadline=None)
@given(text=SOUP, thinking=st.booleans())
def test_nothing_is_lost(text: str, thinking: bool) -> None:
    """What is not in the result is markers and blanks; without a call, only the reasoning's and sequence's markers."""
    message = parse(text, thinking=thinking)
    pieces = message.reasoning + message.content + "".join(c.name + c.arguments for c in message.tool_calls)

    def bare(text: str, markers: tuple[str, ...]) -> str:
        return re.sub("|".join(map(re.escape, markers)), "", text)

    every = (CS, CE, C, S, D, "<think>", "</think>", E)
    kept = bare(pieces, every)
    assert sorted(re.sub(r"\s", "", kept)) == sorted(re.sub(r"\s", "", bare(text.replace(E, ""), every)))
    if not message.tool_calls:
        assert bare(pieces, every[5:]) == bare(text.replace(E, ""), every[5:])


PLAIN = st.text(alphabet="ab <>|/{}\n你😀", max_size=20).filter(lambda text: not text.startswith("<think>"))
NAMES = st.from_regex(r"[a-zA-Z0-9_-]{1,20}", fullmatch=True)
JSON = st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=8), max_size=3).map(
    lambda value: json.dumps(value, ensure_ascii=False)
)


@settings(max_examples=250, deadline=None)
@given(
    content=PLAIN,
    reasoning=st.none() | PLAIN,
    calls=st.lists(st.tuples(NAMES, JSON), max_size=3),
    cuts=st.lists(st.integers(1, 300), max_size=20),
)
def test_rendered_messages_parse_back(
    content: str, reasoning: str | None, calls: list[tuple[str, str]], cuts: list[int]
) -> None:
    message = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [{"function": {"name": name, "arguments": text}} for name, text in calls]
    prompt = render([USER])
    text = render([USER, message], add_generation_prompt=False)
    assert text.startswith(prompt)
    thinking = reasoning is not None
    text = (f"{reasoning}</think>" if thinking else "") + text[len(prompt) :]
    parsed = collect(stream(text, cuts, thinking=thinking, tools=True))
    assert simple(parsed) == (reasoning or "", content, calls)
    # and the message as the API returns it renders to the same history
    again = {
        "role": "assistant",
        "content": parsed.content,
        "reasoning": parsed.reasoning,
        "tool_calls": [{"function": {"name": c.name, "arguments": c.arguments}} for c in parsed.tool_calls],
    }
    assert render([USER, again]) == render([USER, message])


def test_streaming_is_incremental() -> None:
    parser = ChatParser(thinking=True)
    pieces = [
        "Hm",
        ".</thi",
        "nk>Let",
        " me <",
        "3",
        CS + C,
        "wea",
        "ther" + S,
        '{"city"',
        ': "x"}<｜tool',
        "▁call▁end｜>",
        CE,
    ]
    got = [[(delta.kind.value, delta.text or delta.name) for delta in parser.push(piece)] for piece in pieces]
    assert got == [
        [("reasoning", "Hm")],
        [("reasoning", ".")],
        [("content", "Let")],
        [("content", " me ")],
        [("content", "<3")],
        [],
        [],
        [("tool_start", "weather")],
        [("tool_arguments", '{"city"')],
        [("tool_arguments", ': "x"}')],
        [],
        [],
    ]
    assert parser.finish() == []


def test_tool_ids() -> None:
    calls = parse(f"{CS}{C}f{S}1{D}{C}f{S}2{D}{CE}").tool_calls
    assert all(re.fullmatch(r"call_[0-9a-f]{24}", call.id) for call in calls)
    assert calls[0].id != calls[1].id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(f"{CS}{CE}", ("", f"{CS}{CE}", []), id="empty block"),
        pytest.param(f"{CS} {C}f", ("", f"{CS} {C}f", []), id="ends in the name"),
        pytest.param(f"{CS}{C}{S}{{}}{D}{CE}", ("", f"{CS}{C}{S}{{}}{D}{CE}", []), id="no name"),
        pytest.param(f"{CS}{C}f\ng{S}{{}}", ("", f"{CS}{C}f\ng{S}{{}}", []), id="name of two lines"),
        pytest.param(f"{CS}{C}{'f' * 257}{S}", ("", f"{CS}{C}{'f' * 257}{S}", []), id="name too long"),
        pytest.param(f"{CS}oops{C}f{S}1{D}{CE}", ("", f"{CS}oops", [("f", "1")]), id="text before the call"),
        pytest.param(f"{CS}{C}f{C}g{S}1{D}{CE}", ("", f"{CS}{C}f", [("g", "1")]), id="begin twice"),
        pytest.param(f'{CS}{C}f{S}{{"a', ("", "", [("f", '{"a')]), id="cut short in the arguments"),
        pytest.param(f"{C}f{S}1{D}", ("", "", [("f", "1")]), id="no outer markers"),
        pytest.param(f"{CS}{C}f{S}1{CE}x", ("", "x", [("f", "1")]), id="no call end"),
        pytest.param(f"{CS}{C}f{S}1{C}g{S}2{D}{CE}", ("", "", [("f", "1"), ("g", "2")]), id="no end between"),
        pytest.param(f"{CS}\n{C} f {S}1{D}\n{C}g{S}2{D}\n{CE}{E}", ("", "", [("f", "1"), ("g", "2")]), id="blanks"),
        pytest.param(f"{CS}{C}f{S}1{D}\nx", ("", "\nx", [("f", "1")]), id="text after a call"),
        pytest.param(f"{CS}{C}f{S}1{D}{CE}{CS}{C}g{S}2{D}{CE}", ("", "", [("f", "1"), ("g", "2")]), id="two blocks"),
        pytest.param(f"a{S}b{D}c{CE}", ("", f"a{S}b{D}c{CE}", []), id="stray markers"),
        pytest.param("<think>Hm</think>x", ("Hm", "x", []), id="leading think"),
        pytest.param("<thin", ("", "<thin", []), id="only the beginning of think"),
    ],
)
def test_malformed_and_sloppy(text: str, expected: tuple) -> None:
    assert simple(parse(text)) == expected


def test_calls_inside_reasoning() -> None:
    assert simple(parse(f"Hm{CS}{C}f{S}1{D}{CE}", thinking=True)) == ("Hm", "", [("f", "1")])
    malformed = f"Say {CS} to call.</think>x"
    assert simple(parse(malformed, thinking=True)) == (f"Say {CS} to call.", "x", [])
    assert simple(parse(f"Hm{C}f</think>x{S}1", thinking=True)) == (f"Hm{C}f", f"x{S}1", [])
    assert simple(parse(f"Hm{CS}{C}f{S}1{D}x", thinking=True)) == ("Hm", "x", [("f", "1")])


def test_without_tools_markers_are_content() -> None:
    text = f"{CS}{C}f{S}1{D}{CE}"
    assert simple(parse(text, tools=False)) == ("", text, [])


def test_params_for_parsing() -> None:
    params = SamplingParams(temperature=0.5)
    assert params_for_parsing(params) == SamplingParams(temperature=0.5, skip_special_tokens=False)
    assert params.skip_special_tokens
