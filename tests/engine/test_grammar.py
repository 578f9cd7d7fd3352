"""Grammars: whatever is drawn under the masks is valid text, and what cannot be compiled is refused in plain words."""

from __future__ import annotations

import json
import random
import re
import time

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tilery.engine import grammar as grammar_module
from tilery.engine.grammar import MAX_SPEC_BYTES, GrammarCompiler, GrammarError, GrammarState
from tilery.engine.messages import StructuredKind, StructuredOutput

BOS, EOS, PAD = 0, 1, 2
TEXT = ['{"name": "ab", "age": 12}', "yes no maybe true false null", "the cat sat on the mat <think>", "[1,2,3]"]
"""Merges come to spell "<think>", which is then added as a token of its own."""
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "<think>"]}, "maxItems": 3},
        "ok": {"type": ["boolean", "null"]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    tokenizer.train_from_iterator(TEXT * 20, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


TOKENIZER = make_tokenizer()
THINK_ID = TOKENIZER.token_to_id("<think>")
SIZE = TOKENIZER.get_vocab_size()
VOCAB = SIZE + 45  # the model's logits are padded beyond the tokenizer
TEXT_TOKENS = [i for i in range(SIZE) if i not in (BOS, EOS, PAD, THINK_ID)]


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER.to_str(), VOCAB, [EOS])


def spec(kind: str, text: object = "", **options: bool) -> StructuredOutput:
    return StructuredOutput(
        kind=StructuredKind(kind), spec=text if isinstance(text, str) else json.dumps(text), **options
    )


def allowed(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def encode(text: str) -> list[int]:
    """One token per byte, so that nothing depends on merges."""
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [TOKENIZER.token_to_id(letter) for word, _ in letters for letter in word]


def walk(state: GrammarState, rng: random.Random, limit: int = 400) -> str:
    """Draw tokens under the masks until EOS."""
    out: list[int] = []
    while len(out) < limit:
        tokens = allowed(state.mask())
        assert set(tokens) <= {*TEXT_TOKENS, EOS}, "a token that stands for no text is allowed"
        assert state.finished == (tokens == [EOS])
        token = EOS if EOS in tokens and rng.random() < 0.3 else rng.choice(tokens)
        state.consume([token])
        if token == EOS:
            assert state.finished
            assert allowed(state.mask()) == [EOS]
            return TOKENIZER.decode(out, skip_special_tokens=False)
        out.append(token)
    raise AssertionError(f"no end after {limit} tokens: {TOKENIZER.decode(out)!r}")


def fits_schema(value: object) -> bool:
    return (
        isinstance(value, dict)
        and set(value) <= {"name", "age", "tags", "ok"}
        and {"name", "age", "tags"} <= set(value)
        and isinstance(value["name"], str)
        and len(value["name"]) <= 6
        and type(value["age"]) is int
        and 0 <= value["age"] <= 120
        and len(value["tags"]) <= 3
        and all(tag in ("a", "b", "<think>") for tag in value["tags"])
        and value.get("ok") in (None, True, False)
    )


# ---- texts -------------------------------------------------------------------------------------------------------


def test_json_schema_walks_are_valid_and_compact(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(spec("json_schema", SCHEMA))
    for seed in range(60):
        text = walk(grammar.start(), random.Random(seed))
        value = json.loads(text)
        assert fits_schema(value), text
        outside_strings = re.sub(r'"(?:\\.|[^"\\])*"', "", text)
        assert not re.search(r"\s", outside_strings), text


def test_whitespace_is_free_when_not_compact(compiler: GrammarCompiler) -> None:
    text = '{ "name": "x",\n "age": 3, "tags": [ ] }'
    loose = compiler.compile(spec("json_schema", SCHEMA, compact=False)).start()
    loose.consume(encode(text))
    assert allowed(loose.mask()) == [EOS]
    with pytest.raises(GrammarError, match=r"Token \d+ does not fit the grammar after 1 tokens"):
        compiler.compile(spec("json_schema", SCHEMA)).start().consume(encode(text))


def test_a_schemas_own_whitespace_option_wins(compiler: GrammarCompiler) -> None:
    schema = {"type": "array", "items": {"type": "null"}, "x-guidance": {"whitespace_flexible": True}}
    compiler.compile(spec("json_schema", schema)).start().consume(encode("[ null ]"))


def test_json_object(compiler: GrammarCompiler) -> None:
    state = compiler.compile(spec("json_object", "ignored")).start()
    for text in ("[1]", "null", '"a"', " "):
        assert not state.accepts(encode(text)[0])
    state.consume(encode('{"a":{"b":[1,2.5e3,null]}}'))
    assert state.finished


def test_schema_true_is_any_json(compiler: GrammarCompiler) -> None:
    compiler.compile(spec("json_schema", "true")).start().consume(encode("[1,{}]"))


@pytest.mark.parametrize("pattern", [r"[a-c]{2,5}(x|yy)?", r"^\d{3}-\d{2}$", r"(foo|foobar)!*é{1,3}", r"a/b\x{41}?"])
def test_regex_walks_match(compiler: GrammarCompiler, pattern: str) -> None:
    grammar = compiler.compile(spec("regex", pattern))
    for seed in range(20):
        text = walk(grammar.start(), random.Random(seed))
        assert re.fullmatch(pattern.replace(r"\x{41}", "A").replace(r"\d", "[0-9]"), text), text


def test_choice_walks_reach_every_choice_and_nothing_else(compiler: GrammarCompiler) -> None:
    choices = ["yes", "no", "no way", "", 'say "hi"\n\t\\d /x/', "é😀", "\x00\x7f", "<think>", "a|b(.*)"]
    grammar = compiler.compile(spec("choice", choices))
    seen = {walk(grammar.start(), random.Random(seed)) for seed in range(150)}
    assert seen == set(choices)


def test_lark_walks_are_balanced(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(spec("grammar", 'start: expr\nexpr: "(" expr ")" | /[0-9]/'))
    for seed in range(20):
        text = walk(grammar.start(), random.Random(seed))
        depth = text.count("(")
        assert re.fullmatch(re.escape("(" * depth) + "[0-9]" + re.escape(")" * depth), text), text


# ---- tokens ------------------------------------------------------------------------------------------------------


def test_eos_exactly_where_the_text_is_complete(compiler: GrammarCompiler) -> None:
    state = compiler.compile(spec("regex", "ab(cd)*")).start()
    complete = []
    for token in encode("abcdcd"):
        complete.append(state.accepts(EOS))
        state.consume([token])
    assert [*complete, state.accepts(EOS)] == [False, False, True, False, True, False, True]
    with pytest.raises(GrammarError):
        compiler.compile(spec("regex", "ab")).start().consume([EOS])


def test_every_eos_token_ends(compiler: GrammarCompiler) -> None:
    both = GrammarCompiler(TOKENIZER.to_str(), VOCAB, [EOS, PAD])
    state = both.compile(spec("regex", "a?")).start()
    assert state.accepts(EOS)
    assert state.accepts(PAD)
    state.consume([PAD, EOS, PAD])
    assert allowed(state.mask()) == [EOS, PAD]
    with pytest.raises(GrammarError):
        state.consume(encode("a"))


def test_special_tokens_never_match_as_text(compiler: GrammarCompiler) -> None:
    # A forced text is allowed in its canonical tokens only, which for an ordinary tokenizer would be the special one.
    for kind, text in (("regex", "<think>x"), ("choice", ["<think>"]), ("grammar", 'start: "<think>" /x/')):
        state = compiler.compile(spec(kind, text)).start()
        assert not state.accepts(THINK_ID)
        assert walk(state, random.Random(0)).startswith("<think>")
    assert walk(compiler.compile(spec("regex", "<eos>")).start(), random.Random(0)) == "<eos>"


def test_a_lark_grammar_may_name_a_special_token(compiler: GrammarCompiler) -> None:
    text = 'start: <think> "<think>" | /x<think>/  // <think>\n'
    state = compiler.compile(spec("grammar", text)).start()
    assert state.accepts(THINK_ID)
    assert state.accepts(encode("x")[0])
    state.consume([THINK_ID])
    assert not state.accepts(THINK_ID)
    state.consume(encode("<think>"))
    assert state.finished


def test_a_lark_grammar_cannot_put_eos_in_the_middle_or_padding_anywhere(compiler: GrammarCompiler) -> None:
    state = compiler.compile(spec("grammar", f'start: "a" (<[{EOS}]> | "c") "b"')).start()
    state.consume(encode("a"))
    assert not state.accepts(EOS)
    state = compiler.compile(spec("grammar", 'start: "a" <[*]>')).start()
    state.consume(encode("a"))
    assert max(allowed(state.mask())) < SIZE


# ---- drafts ------------------------------------------------------------------------------------------------------


def test_draft_masks_equal_those_of_the_text_and_leave_the_state(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(spec("json_schema", SCHEMA))
    for seed in range(15):
        rng = random.Random(seed)
        state = grammar.start()
        for _ in range(25):
            if state.finished:
                break
            drafts: list[int] = []
            ahead = grammar.start()
            ahead.consume(state._tokens)
            expected = [ahead.mask()]
            for _ in range(rng.randrange(5)):
                legal = allowed(ahead.mask())
                draft = rng.choice(legal) if rng.random() < 0.8 else rng.randrange(VOCAB)
                drafts.append(draft)
                if draft not in legal:
                    drafts += [rng.choice(TEXT_TOKENS)]
                    break
                ahead.consume([draft])
                expected.append(ahead.mask())
            before = state.mask().copy()
            masks = state.masks_for_drafts(drafts)
            assert len(masks) == len(expected)
            assert all((got == want).all() for got, want in zip(masks, expected))
            state._mask = None
            assert (state.mask() == before).all()
            state.consume([rng.choice([t for t in allowed(state.mask()) if t != EOS])])


def test_drafts_beyond_the_end(compiler: GrammarCompiler) -> None:
    state = compiler.compile(spec("regex", "ab?")).start()
    masks = state.masks_for_drafts([*encode("a"), EOS, EOS, *encode("b")])
    assert [allowed(mask) for mask in masks[1:]] == [sorted([EOS, *encode("b")]), [EOS], [EOS]]
    state.consume(encode("ab"))
    assert state.finished


def test_a_limit_hit_by_drafts_does_not_harm_the_state(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = compiler.compile(spec("regex", "abc")).start()
    state.consume(encode("a"))
    before = state.mask()

    def fail(ended: bool) -> np.ndarray:
        state._matcher.consume_token(encode("z")[0])  # puts the matcher into its error state
        raise GrammarError("limit")

    with monkeypatch.context() as patch:
        patch.setattr(state, "_compute_mask", fail)
        assert len(state.masks_for_drafts([allowed(before)[0]])) == 1
    state._mask = None
    assert (state.mask() == before).all()


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("json_schema", "{", "The JSON schema is not valid JSON: Expecting property name"),
        ("json_schema", "[1]", "The JSON schema must be an object, got list."),
        ("json_schema", "false", "The JSON schema `false` matches nothing."),
        ("json_schema", {"type": "foo"}, "The JSON schema cannot be used: Invalid type: foo."),
        (
            "json_schema",
            {"not": {}},
            'Unimplemented keys: ["not"]; remove them, or add "x-guidance": {"lenient": true}',
        ),
        ("json_schema", {"type": "string", "pattern": "("}, "The JSON schema cannot be used: unclosed group."),
        ("json_schema", {"$ref": "#/$defs/x"}, "The JSON schema cannot be used: Pointer '/$defs/x' does not exist."),
        ("json_schema", "[" * 30_000, "The JSON schema is nested too deeply."),
        ("regex", "", "The regex is empty."),
        ("regex", "(ab", "The regex cannot be used: unclosed group."),
        ("regex", "(?=x)y", "The regex cannot be used: look-around, including look-ahead and look-behind, is not"),
        ("choice", "[]", "The choice has no alternatives; give at least one."),
        ("choice", '["a", 1]', 'The choice must be a JSON array of strings, such as ["yes", "no"].'),
        ("choice", "yes", "The choice is not valid JSON"),
        ("choice", '["\\ud800"]', "The choice holds half of a surrogate pair"),
        ("grammar", " ", "The grammar is empty."),
        ("grammar", 'foo: "a"', "The grammar cannot be used: no start rule found."),
        ("grammar", 'start: "a" | b', 'The grammar cannot be used: at 1(8): unknown name: "b"'),
        ("grammar", "start: <nope>", 'unknown special token: "<nope>".'),
        ("regex", "a" * (MAX_SPEC_BYTES + 1), "The regex has 65537 bytes; at most 65536 are accepted."),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(
    compiler: GrammarCompiler, kind: str, text: object, message: str
) -> None:
    with pytest.raises(GrammarError, match=re.escape(message)) as caught:
        compiler.compile(spec(kind, text))
    assert isinstance(caught.value, ValueError)
    assert len(str(caught.value)) < 600


def test_long_chains_of_definitions_do_not_overflow_the_stack(compiler: GrammarCompiler) -> None:
    rules = "start: r0\n" + "".join(f"r{i}:r{i + 1}\n" for i in range(5000)) + 'r5000:"a"\n'
    assert walk(compiler.compile(spec("grammar", rules)).start(), random.Random(0)) == "a"


def test_a_slow_compilation_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(TOKENIZER.to_str(), VOCAB, [EOS], timeout=0.2)
    build = compiler._build

    def slow(structured: StructuredOutput) -> grammar_module.Grammar:
        time.sleep(0.6 if structured.spec.startswith("slow") else 0)
        return build(structured)

    monkeypatch.setattr(compiler, "_build", slow)
    futures = [compiler.submit(spec("regex", text)) for text in ("slow1", "slow2")]
    for future in futures:
        with pytest.raises(GrammarError, match=r"The regex took longer than 0\.2 s to compile; simplify it\."):
            future.result()
    with pytest.raises(GrammarError, match="busy with other requests"):
        compiler.compile(spec("regex", "quick"))
    time.sleep(0.5)
    compiler.compile(spec("regex", "quick"))  # the slots came back, and the failure was not cached


def test_equal_specs_share_one_compilation_and_the_oldest_leave(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiler.submit(spec("regex", "share")) is compiler.submit(spec("regex", "share"))
    first = compiler.compile(spec("regex", "first"))
    assert compiler.compile(spec("regex", "first")) is first
    monkeypatch.setattr(grammar_module, "CACHED_GRAMMARS", 3)
    for i in range(3):
        compiler.compile(spec("regex", f"other{i}"))
    assert compiler.compile(spec("regex", "first")) is not first
    assert len(compiler._cache) == 3


def test_tokenizers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=f"The tokenizer has {SIZE} tokens, but the model only 100 logits"):
        GrammarCompiler(TOKENIZER.to_str(), 100, [EOS])
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        GrammarCompiler("{}", VOCAB, [EOS])
    with pytest.raises(ValueError, match="eos_token_ids is empty"):
        GrammarCompiler(TOKENIZER.to_str(), VOCAB, [])
