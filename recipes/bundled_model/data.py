"""Tokens for training: books, conversations taken from the books' dialogue, and held-out books.

    python -m recipes.bundled_model.data --corpus CORPUS_DIR --tokenizer TOKENIZER_DIR --out TOKENS_DIR

CORPUS_DIR holds `train-*.txt.xz` and `heldout.txt.xz`: UTF-8 text, documents separated by form feeds. Writes
`books-*.u16.xz`, `dialogue.u16.xz`, `heldout.u16.xz` (little-endian uint16 token ids, xz-compressed) and `data.json`.
Every document is BOS, text, EOS. A conversation is written in the chat template's form, so that the chat endpoints get
answers in the manner of a novel's dialogue instead of tokens the model has never seen.
"""

import argparse
import json
import lzma
import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from recipes.bundled_model.tokenizer import BOS, BOS_ID, EOS, EOS_ID, documents

# 16-bit symbols: two position bits and one literal-position bit suit little-endian uint16.
XZ_FILTERS = [
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 3, "lp": 1, "pb": 1, "dict_size": 2**25}
]
QUOTED = re.compile(r'"([^"]+)"')
LONGEST_TURN = 600  # characters
THINKING_SHARE = 0.25


def turn(paragraph: str) -> tuple[str, str] | None:
    """(speech, narration) of a paragraph that opens with a quotation mark; None when it is no clean dialogue."""
    paragraph = " ".join(paragraph.split())
    if not paragraph.startswith('"') or paragraph.count('"') % 2 or len(paragraph) > LONGEST_TURN:
        return None
    speech = " ".join(part.strip() for part in QUOTED.findall(paragraph))
    narration = " ".join(part.strip() for part in QUOTED.split(paragraph)[::2] if part.strip())
    return (speech, narration) if len(speech) > 2 else None


def conversations(text: str) -> Iterator[list[tuple[str, str]]]:
    """Runs of two or more neighbouring lines of dialogue, an even number of turns each."""
    run = []
    for paragraph in [*text.split("\n\n"), ""]:
        if spoken := turn(paragraph):
            run.append(spoken)
            continue
        if len(run) >= 2:
            yield run[: len(run) // 2 * 2]
        run = []


def chat_text(turns: list[tuple[str, str]], rng: random.Random) -> str:
    """The chat template's form, without BOS. Some replies carry the narration as their thoughts."""
    out = []
    for (question, _), (answer, narration) in zip(turns[::2], turns[1::2], strict=True):
        thoughts = ""
        if len(narration.split()) >= 3 and rng.random() < THINKING_SHARE:
            thoughts = f"<think>{narration}"
        out.append(f"<｜User｜>{question}<｜Assistant｜>{thoughts}</think>{answer}{EOS}")
    return "".join(out)


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Token ids without BOS. Long documents are cut at blank lines so that threads share the work."""
    pieces, owner = [], []
    for index, text in enumerate(texts):
        parts = re.split(r"(?<=\n\n)(?=\S)", text)
        for start in range(0, len(parts), 200):
            pieces.append("".join(parts[start : start + 200]))
            owner.append(index)
    out = [[] for _ in texts]
    for index, encoding in zip(owner, tokenizer.encode_batch(pieces, add_special_tokens=False), strict=True):
        out[index].append(np.array(encoding.ids, dtype=np.uint16))
    return [np.concatenate(parts) for parts in out]


def write_tokens(path: Path, tokens: np.ndarray) -> None:
    path.write_bytes(lzma.compress(tokens.astype("<u2").tobytes(), lzma.FORMAT_XZ, filters=XZ_FILTERS))


def read_tokens(path: Path) -> np.ndarray:
    """Token ids [n], uint16."""
    return np.frombuffer(lzma.decompress(path.read_bytes()), dtype="<u2")


@dataclass(frozen=True)
class Windows:
    """Training windows of `length + 2` tokens, in a reproducible order, from a flat stream of documents.

    Each pass over the stream shifts the cuts and shuffles the windows anew; window n of the order depends on the seed
    alone. Half of the windows move forward to the next blank line (at most `SNAP` tokens), and BOS replaces the first
    token of every window: at inference a text always starts with BOS.
    """

    stream: Tensor  # [n] int16 token ids, on the device that trains
    breaks: Tensor  # positions of the tokens that hold a blank line, sorted
    length: int
    seed: int
    SNAP = 256

    @property
    def per_pass(self) -> int:
        return (self.stream.numel() - self.SNAP) // (self.length + 2) - 1

    def starts(self, first: int, count: int) -> Tensor:
        """Start positions of windows first .. first + count - 1 of the order."""
        out = []
        while count:
            epoch, offset = divmod(first, self.per_pass)
            rng = np.random.default_rng([self.seed, self.length, epoch])
            shift = int(rng.integers(self.length + 2))
            take = min(count, self.per_pass - offset)
            order = _order(self.seed, self.length, epoch, self.per_pass)
            out.append(order[offset : offset + take].astype(np.int64) * (self.length + 2) + shift)
            first, count = first + take, count - take
        return torch.from_numpy(np.concatenate(out)).to(self.stream.device)

    def batch(self, first: int, count: int) -> Tensor:
        """Tokens [count, length + 2], int64."""
        start = self.starts(first, count)
        if self.breaks.numel():
            after = self.breaks[torch.searchsorted(self.breaks, start).clamp_max(self.breaks.numel() - 1)]
            snap = (after > start) & (after - start <= self.SNAP) & (start // (self.length + 2) % 2 == 0)
            start = torch.where(snap, after, start)
        window = torch.arange(self.length + 2, device=start.device)
        tokens = self.stream[(start[:, None] + window).clamp_max(self.stream.numel() - 1)].long()
        tokens[:, 0] = BOS_ID
        return tokens


_ORDERS: dict[tuple[int, int, int], np.ndarray] = {}


def _order(seed: int, length: int, epoch: int, count: int) -> np.ndarray:
    key = (seed, length, epoch, count)
    if key not in _ORDERS:
        if len(_ORDERS) > 8:
            _ORDERS.clear()
        _ORDERS[key] = np.random.default_rng([seed, length, epoch, 1]).permutation(count)
    return _ORDERS[key]


def blank_line_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of tokens whose text holds a blank line."""
    return [i for i in range(tokenizer.get_vocab_size()) if "\n\n" in tokenizer.decode([i])]


def load_stream(paths: list[Path], blank_ids: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(token stream as int16, positions of blank lines) on `device`."""
    with ThreadPoolExecutor() as pool:  # decompression releases the interpreter lock
        tokens = np.concatenate(list(pool.map(read_tokens, paths)))
    breaks = np.flatnonzero(np.isin(tokens, np.array(blank_ids, dtype=np.uint16)))
    return torch.from_numpy(tokens.astype(np.int16)).to(device), torch.from_numpy(breaks).to(device)


def held_out_documents(path: Path) -> list[np.ndarray]:
    """The token ids of each document (BOS ... EOS) of a stream file."""
    tokens = read_tokens(path)
    return np.split(tokens, np.flatnonzero(tokens == BOS_ID)[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of tokenizer.json")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    args.out.mkdir(parents=True, exist_ok=True)
    bos, eos = np.array([BOS_ID], np.uint16), np.array([EOS_ID], np.uint16)
    rng = random.Random(0)
    chats, rows = [], []
    for path in [*sorted(args.corpus.glob("train-*.txt.xz")), args.corpus / "heldout.txt.xz"]:
        texts = list(documents(path))
        ids = encode(tokenizer, texts)
        stream = np.concatenate([part for doc in ids for part in (bos, doc, eos)])
        name = path.name.removesuffix(".txt.xz").replace("train", "books")
        write_tokens(args.out / f"{name}.u16.xz", stream)
        size = sum(len(text.encode()) for text in texts)
        rows.append({"stream": name, "documents": len(texts), "bytes": size, "tokens": stream.size})
        print(rows[-1], flush=True)
        if name != "heldout":
            chats.extend(BOS + chat_text(turns, rng) for text in texts for turns in conversations(text))
    stream = np.concatenate(encode(tokenizer, chats))
    write_tokens(args.out / "dialogue.u16.xz", stream)
    size = sum(len(text.encode()) for text in chats)
    rows.append({"stream": "dialogue", "documents": len(chats), "bytes": size, "tokens": stream.size})
    print(rows[-1])
    (args.out / "data.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
