"""Stop strings, hold-back, cuts and offsets, against a plain search over the whole text."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from tilery.engine.messages import EngineOutput, FinishReason, SamplingParams, TokenLogprobs
from tilery.engine.output import OutputProcessor, TextDelta
from tilery.engine.tokenizer import Tokenizer

EOS = 300


def make_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are bytes, 256 to 261 a few longer pieces, 300 the end of sequence."""
    alphabet = {0x100 + n: byte for n, byte in enumerate(b for b in range(256) if not _prints(b))}
    letters = {byte: chr(byte) for byte in range(256) if _prints(byte)} | {b: chr(c) for c, b in alphabet.items()}
    vocabulary = {letters[byte]: byte for byte in range(256)}
    pieces = ["ab", "abc", "STOP", "ST", "OP", "\u0120x"]
    vocabulary |= {piece: 256 + n for n, piece in enumerate(pieces)}
    vocabulary["<eos>"] = EOS
    backend = FastTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    return Tokenizer(backend, config={"eos_token": "<eos>"})


def _prints(byte: int) -> bool:
    return 0x21 <= byte < 0x7F or 0xA1 <= byte < 0xAD or byte >= 0xAE


TOKENIZER = make_tokenizer()


def ids(text: str) -> list[int]:
    return list(text.encode())


def run(chunks: list[list[int]], finish: FinishReason | None = FinishReason.LENGTH, **params) -> list[TextDelta]:
    """Pushes each chunk as one engine output, the last with `finish`; the deltas until the processor is finished."""
    prompt = params.pop("prompt", [])
    processor = OutputProcessor(TOKENIZER, SamplingParams(max_tokens=None, **params), prompt)
    deltas = []
    for number, chunk in enumerate(chunks):
        last = number == len(chunks) - 1
        output = EngineOutput(request_id="r", token_ids=chunk, finish_reason=finish if last else None)
        if (delta := processor.push(output)) is not None:
            deltas.append(delta)
    assert processor.num_tokens == sum(len(delta.token_ids) for delta in deltas)
    return deltas


def text_of(deltas: list[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_no_stop_strings() -> None:
    deltas = run([ids("hello "), ids("wör")[:2], ids("wör")[2:]])
    assert [delta.text for delta in deltas] == ["hello ", "w", "ör"]
    assert [delta.finish_reason for delta in deltas] == [None, None, FinishReason.LENGTH]


def test_stop_string_across_tokens_is_held_back_and_cut() -> None:
    deltas = run([ids("go "), ids("S"), ids("TO"), ids("P now")], stop=("STOP",))
    assert [delta.text for delta in deltas] == ["go ", "", "", ""]
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert deltas[-1].stop_reason == "STOP"
    assert not deltas[-1].needs_abort  # the engine had finished by itself
    assert deltas[-1].token_ids == ids("P")  # tokens after the completing one are cut


def test_needs_abort_and_silence_afterwards() -> None:
    processor = OutputProcessor(TOKENIZER, SamplingParams(stop=("b",)))
    first = processor.push(EngineOutput(request_id="r", token_ids=ids("ab")))
    assert first is not None
    assert first.needs_abort
    assert first.finish_reason is FinishReason.STOP
    assert processor.finished
    assert processor.push(EngineOutput(request_id="r", token_ids=ids("x"))) is None
    assert processor.push(EngineOutput(request_id="r", finish_reason=FinishReason.ABORT)) is None


def test_false_alarm_is_released() -> None:
    deltas = run([ids("S"), ids("T"), ids("A")], stop=("STOP",))
    assert [delta.text for delta in deltas] == ["", "", "STA"]
    assert deltas[-1].finish_reason is FinishReason.LENGTH


def test_held_text_comes_out_at_the_end() -> None:
    assert text_of(run([ids("x"), ids("STO")], stop=("STOP",))) == "xSTO"
    assert text_of(run([ids("xSTO"), []], finish=FinishReason.ABORT, stop=("STOP",))) == "xSTO"


@pytest.mark.parametrize(("include", "expected"), [(False, "x"), (True, "xSTOP")])
def test_include_stop_string(include: bool, expected: str) -> None:
    assert text_of(run([ids("x"), [258], ids("y")], stop=("STOP",), include_stop_str_in_output=include)) == expected


def test_earliest_start_then_longest() -> None:
    assert run([[257]], stop=("b", "abc", "ab"))[-1].stop_reason == "abc"  # one token "abc" completes all three
    assert run([ids("a"), ids("b")], stop=("b", "ab"))[-1].stop_reason == "ab"
    assert run([ids("a"), ids("b"), ids("c")], stop=("abc", "ab"))[-1].stop_reason == "ab"  # complete first


def test_min_tokens() -> None:
    deltas = run([ids("a"), ids("b"), ids("a"), ids("b"), ids("c")], stop=("ab",), min_tokens=2)
    assert text_of(deltas) == "ab"
    assert sum(len(delta.token_ids) for delta in deltas) == 4
    # A stop string that begins before and ends after the limit counts.
    assert text_of(run([ids("a"), ids("b")], stop=("ab",), min_tokens=1)) == ""
    assert text_of(run([ids("a"), ids("b")], stop=("ab",), min_tokens=2)) == "ab"


@pytest.mark.parametrize("logprobs", [None, 0])
def test_eos_and_stop_tokens_have_no_text(logprobs: int | None) -> None:
    def go(last: int, **params) -> str:
        return text_of(run([ids("hi"), [last]], finish=FinishReason.STOP, logprobs=logprobs, **params))

    assert go(EOS) == "hi"
    assert go(EOS, skip_special_tokens=False) == "hi"
    assert go(EOS, skip_special_tokens=False, include_stop_str_in_output=True) == "hi<eos>"
    assert go(ord("x"), stop_token_ids=(ord("x"),)) == "hi"
    assert go(ord("x"), stop_token_ids=(ord("x"),), include_stop_str_in_output=True) == "hix"
    assert go(ord("x")) == "hix"  # stopped for another reason, e.g. a grammar came to its end
    assert run([ids("hi"), [EOS]], finish=FinishReason.STOP)[-1].token_ids == [EOS]


def test_prompt_that_ends_inside_a_character() -> None:
    emoji = list("😀".encode())
    assert text_of(run([emoji[2:], ids("!")], prompt=ids("look: ") + emoji[:2])) == "😀!"


def test_logprobs_are_cut_and_offsets_count_characters() -> None:
    processor = OutputProcessor(TOKENIZER, SamplingParams(stop=("STOP",), logprobs=0))
    tokens = [*ids("aé"), 258, ids("x")[0]]
    logprobs = [TokenLogprobs(token, -1.0, 1, [], []) for token in tokens]
    delta = processor.push(EngineOutput(request_id="r", token_ids=tokens, logprobs=logprobs))
    assert delta is not None
    assert delta.text == "aé"
    assert delta.token_ids == tokens[:4]
    assert delta.logprobs == logprobs[:4]
    assert delta.text_offsets == [0, 1, 1, 2]  # both bytes of é begin at 1


def expected(tokens: list[int], stops: tuple[str, ...], min_tokens: int, include: bool) -> tuple[str, str | None, int]:
    """The same by brute force: after each token, decode everything and look for a stop string that just ended."""
    before = ""
    for count in range(1, len(tokens) + 1):
        data = bytes(tokens[:count])
        final = data.decode("utf-8", "replace") if count == len(tokens) else _finished_text(data)
        if count > min_tokens:
            found = [
                (start, -len(stop), stop)
                for stop in stops
                for start in range(len(final))
                if final.startswith(stop, start) and start + len(stop) > len(before)
            ]
            if found:
                start, _, stop = min(found)
                return final[: start + len(stop) if include else start], stop, count
        before = final
    return before, None, len(tokens)


def _finished_text(data: bytes) -> str:
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


BYTES = st.lists(st.sampled_from([ord(c) for c in "aab"] + [0xC3, 0xA9, 0xF0]), min_size=1, max_size=14)
STOPS = st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


@settings(max_examples=400, deadline=None)
@given(BYTES, STOPS, st.integers(0, 6), st.booleans(), st.data())
def test_against_brute_force(tokens: list[int], stops: tuple[str, ...], least: int, include: bool, data) -> None:
    text, stop, kept = expected(tokens, stops, least, include)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(tokens)))) | {len(tokens)})
    chunks = [tokens[a:b] for a, b in zip([0, *cuts], cuts)]
    deltas = run(chunks, stop=stops, min_tokens=least, include_stop_str_in_output=include)
    assert text_of(deltas) == text
    assert deltas[-1].stop_reason == stop
    assert [id for delta in deltas for id in delta.token_ids] == tokens[:kept]
    assert all(delta.finish_reason is None for delta in deltas[:-1])
