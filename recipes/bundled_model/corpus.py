"""Build the corpus: 522 public-domain books in eight shards, and 12 held-out books.

    git clone https://github.com/mlschmitt/classic-books-markdown CHECKOUT
    git -C CHECKOUT checkout 944882722e9a96fa6cf2739dc2ea757e101f412f
    python -m recipes.bundled_model.corpus --books CHECKOUT --out CORPUS_DIR

`titles.txt` beside this file lists shard and path of every book. Trailing spaces are dropped and blank lines collapsed;
nothing else changes. Writes `train-NN.txt.xz` and `heldout.txt.xz`: UTF-8, documents separated by form feeds.
"""

import argparse
import lzma
import re
from collections import defaultdict
from pathlib import Path

TITLES = Path(__file__).with_name("titles.txt")


def clean(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()


def shards(titles: Path) -> dict[str, list[str]]:
    """Shard name -> paths of its books, in order."""
    out = defaultdict(list)
    for line in titles.read_text(encoding="utf-8").splitlines():
        shard, path = line.split("\t")
        out[shard].append(path)
    return dict(out)


def build(books: Path, out: Path, titles: Path = TITLES) -> dict[str, int]:
    """Write the shards; returns the number of books in each. Raises FileNotFoundError naming the missing book."""
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for shard, paths in shards(titles).items():
        texts = [clean((books / path).read_text(encoding="utf-8")) for path in paths]
        (out / f"{shard}.txt.xz").write_bytes(lzma.compress("\n\f".join(texts).encode(), preset=6))
        counts[shard] = len(texts)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="checkout of classic-books-markdown")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    for shard, count in build(args.books, args.out).items():
        print(f"{shard}: {count} books", flush=True)


if __name__ == "__main__":
    main()
