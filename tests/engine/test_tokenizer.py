"""The tokenizer's byte table and the incremental detokeniser, against `tokenizers`' own decode.

`python -m tests.engine.test_tokenizer [folder]` prints the cost per token.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers

import tilery
from tilery.engine.tokenizer import Tokenizer, _WindowDetokenizer

FOLDER = Path(tilery.__file__).parent / "bundled" / "tilery-books-26m"
BYTE_LEVEL = Tokenizer.load(FOLDER)
MIXED = "The naïve café: 你好，世界！ 👩‍👩‍👧 😀\n\n<think>\tتجربة</think> <｜tool▁sep｜>"


def metaspace() -> Tokenizer:
    """SentencePiece style, as Llama 2: spaces as U+2581, unknown characters as byte tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcé,."]
    pieces += ["▁a", "▁ab", "bc", "▁▁"]
    backend = FastTokenizer(
        models.BPE(
            vocab={piece: id for id, piece in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, config={"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True})


def wordpiece() -> Tokenizer:
    pieces = ["[UNK]", "[SEP]", "the", "un", "##aff", "##able", ".", ",", "'", "s", "n't", "猫", "do", "not"]
    backend = FastTokenizer(models.WordPiece({piece: id for id, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[SEP]"])
    return Tokenizer(backend)


TOKENIZERS = {"byte-level": BYTE_LEVEL, "metaspace": metaspace(), "wordpiece": wordpiece()}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Iterator[Tokenizer]:
    return TOKENIZERS[request.param]


def stream(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool, context: list[int] | None = None) -> str:
    """`ids` through a detokeniser in chunks that end at `cuts`."""
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip, context=context or [])
    bounds = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    text = "".join(detokenizer.push(ids[a:b]) for a, b in pairwise(bounds))
    return text + detokenizer.flush()


CUTS = st.lists(st.integers(1, 40), max_size=12) | st.just(list(range(40)))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=250, deadline=None)
@given(data=st.data(), cuts=CUTS, skip=st.booleans())
def test_stream_of_random_ids_equals_decode(name: str, data: st.DataObject, cuts: list[int], skip: bool) -> None:
    tokenizer = TOKENIZERS[name]
    # Low ids are special tokens and single bytes: draw them often. Ids past the end have no text.
    any_id = st.integers(0, tokenizer.vocab_size + 3) | st.integers(0, min(300, tokenizer.vocab_size))
    ids = data.draw(st.lists(any_id, max_size=40))
    assert stream(tokenizer, ids, cuts, skip) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=250, deadline=None)
@given(text=st.text(max_size=30), cuts=CUTS)
@example(text=MIXED, cuts=list(range(200)))
def test_text_survives_byte_level(text: str, cuts: list[int]) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    assert stream(BYTE_LEVEL, ids, cuts, skip=False) == text
    assert b"".join(BYTE_LEVEL.token_bytes(id) for id in ids) == text.encode()


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="abcé ,.😀", max_size=20), cuts=CUTS)
def test_text_survives_metaspace(text: str, cuts: list[int]) -> None:
    tokenizer = TOKENIZERS["metaspace"]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert stream(tokenizer, ids, cuts, skip=True) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="aé你😀 ", max_size=12), at=st.integers(0, 60))
def test_context_completes_a_cut_character(text: str, at: int) -> None:
    """Prompt and completion split between any two tokens: the stream gives the rest, cut character included whole."""
    for tokenizer in (BYTE_LEVEL, TOKENIZERS["metaspace"]):
        ids = tokenizer.encode(text, add_special_tokens=False)
        prompt, rest = ids[:at], ids[at:]
        shown = tokenizer.decode(prompt).rstrip("\ufffd")
        if rest:
            assert shown + stream(tokenizer, rest, list(range(60)), True, context=prompt) == tokenizer.decode(ids)


def test_context_keeps_leading_space() -> None:
    tokenizer = TOKENIZERS["wordpiece"]
    ids = tokenizer.encode("the unaffable.", add_special_tokens=False)
    assert stream(tokenizer, ids[1:], [], True, context=ids[:1]) == " unaffable."


def test_incomplete_characters_wait_and_invalid_ones_do_not() -> None:
    byte = {BYTE_LEVEL.token_bytes(id): id for id in range(16, 272)}
    detokenizer = BYTE_LEVEL.detokenizer()
    assert [detokenizer.push([byte[bytes([value])]]) for value in "😀".encode()] == ["", "", "", "😀"]
    assert detokenizer.push([byte[b"\xe4"]]) == ""
    assert detokenizer.push([byte[b"a"]]) == "\ufffda"
    assert detokenizer.push([byte[b"\xe4"]]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_single_tokens() -> None:
    assert BYTE_LEVEL.token_text(6) == "</think>"
    assert BYTE_LEVEL.token_bytes(1) == "<｜end▁of▁sentence｜>".encode()
    assert BYTE_LEVEL.token_bytes(BYTE_LEVEL.vocab_size + 5) == b""
    pieces = [BYTE_LEVEL.token_bytes(id) for id in BYTE_LEVEL.encode("你", add_special_tokens=False)]
    assert b"".join(pieces) == "你".encode()
    assert BYTE_LEVEL.token_text(BYTE_LEVEL.encode("你", add_special_tokens=False)[0]) == "\ufffd"
    meta = TOKENIZERS["metaspace"]
    id = meta.token_id("▁ab")
    assert id is not None
    assert (meta.token_text(id), meta.token_bytes(id)) == (" ab", b" ab")
    newline = meta.token_id("<0x0A>")
    assert newline is not None
    assert meta.token_bytes(newline) == b"\n"


def test_encode(tokenizer: Tokenizer) -> None:
    texts = ["the a", "", "un"]
    for special in (True, False):
        assert tokenizer.encode_batch(texts, special) == [tokenizer.encode(text, special) for text in texts]


def test_bos_is_added_once() -> None:
    assert BYTE_LEVEL.encode("a")[0] == BYTE_LEVEL.bos_id == 0
    assert BYTE_LEVEL.encode("a")[1] != 0  # its post-processor adds BOS, so add_bos_token must not
    assert BYTE_LEVEL.encode("a", add_special_tokens=False)[0] != 0
    meta = TOKENIZERS["metaspace"]
    assert meta.encode("a")[0] == meta.bos_id  # here only the configuration asks for it


def test_load_reads_the_folder(tmp_path: Path) -> None:
    assert (BYTE_LEVEL.eos_id, BYTE_LEVEL.pad_id, BYTE_LEVEL.eos_ids) == (1, 2, (1,))
    assert {0, 1, 2} <= BYTE_LEVEL.special_ids
    assert Tokenizer.load(FOLDER, eos_token_ids=[1, 4]).eos_ids == (1, 4)
    assert json.loads(BYTE_LEVEL.json_text)["model"]["type"] == "BPE"
    shutil.copy(FOLDER / "tokenizer.json", tmp_path)
    bare = Tokenizer.load(tmp_path)
    assert (bare.chat_template, bare.eos_id, bare.eos_ids) == (None, None, ())
    named = {"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    assert Tokenizer.load(tmp_path).chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert Tokenizer.load(tmp_path).chat_template == "J"


def test_load_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_small_imports() -> None:
    """Nothing here may pull torch or transformers into the API process."""
    code = "import sys, tilery.engine.output; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def microseconds_per_token(detokenizer: object, ids: list[int]) -> float:
    push = detokenizer.push  # type: ignore[attr-defined]
    start = time.perf_counter()
    for id in ids:
        push((id,))
    return (time.perf_counter() - start) / len(ids) * 1e6


def test_fast_enough() -> None:
    ids = BYTE_LEVEL.encode(MIXED * 200)
    cost = min(microseconds_per_token(BYTE_LEVEL.detokenizer(), ids) for _ in range(5))
    assert cost < 5.0 * 4  # 4: shared, loaded machines


if __name__ == "__main__":
    subject = Tokenizer.load(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
    sample = subject.encode(MIXED * 1000)
    table = min(microseconds_per_token(subject.detokenizer(), sample) for _ in range(5))
    window = min(microseconds_per_token(_WindowDetokenizer(subject, True, ()), sample) for _ in range(5))
    print(f"{len(sample)} tokens, one per push: byte table {table:.2f} us per token, window {window:.2f} us per token")
