"""Train the tokenizer: byte-level BPE, 8,192 entries, with DeepSeek's special-token names.

    python -m recipes.bundled_model.tokenizer --corpus CORPUS_DIR --out tilery/bundled/tilery-books-26m

Writes tokenizer.json and tokenizer_config.json. Ids 0, 1, 2 are BOS, EOS and PAD as in DeepSeek's vocabulary; the other
special names follow, then the 256 byte symbols, then the merges. Encoding puts BOS in front.
"""

import argparse
import json
import lzma
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 8192
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
SPECIAL_TOKENS = (
    BOS,
    EOS,
    PAD,
    USER,
    ASSISTANT,
    THINK,
    END_THINK,
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁outputs▁begin｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
)
# Only these three vanish from decoded text; parsers of thoughts and tool calls must see the others.
HIDDEN_WHEN_DECODED = (BOS, EOS, PAD)

# Words carry their leading space, numbers split into at most three digits, line breaks stay together.
WORD_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages if message['role'] == 'system' -%}{{ message['content'] }}{%- endfor -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ '<｜User｜>' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{ '<｜Assistant｜></think>' + message['content'] + eos_token }}"
    "{%- elif message['role'] == 'tool' -%}"
    "{{ '<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + message['content']"
    " + '<｜tool▁output▁end｜><｜tool▁outputs▁end｜>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{ '<｜Assistant｜>' + ('<think>' if thinking is defined and thinking else '</think>') }}"
    "{%- endif -%}"
)


def documents(path: Path) -> Iterator[str]:
    """Documents of one shard: UTF-8 text, xz-compressed, separated by form feeds."""
    with lzma.open(path, "rt", encoding="utf-8", newline="\n") as shard:
        for text in shard.read().split("\f"):
            if text.strip():
                yield text.strip("\n") + "\n"


def paragraphs(text: str, size: int = 2000) -> Iterator[str]:
    """Pieces of about `size` characters, cut at line breaks: the trainer counts words piece by piece."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size)
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


def sample(corpus: Path, shards: int, every: int) -> Iterator[str]:
    """Every `every`-th piece of the first `shards` training shards."""
    for path in sorted(corpus.glob("train-*.txt.xz"))[:shards]:
        for text in documents(path):
            for index, piece in enumerate(paragraphs(text)):
                if index % every == 0:
                    yield piece


def train(texts: Iterator[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Train byte-level BPE on `texts`; special tokens take ids 0..15 in the order of SPECIAL_TOKENS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[BOS, "$A"], pair=[BOS, "$A", BOS, "$B:1"], special_tokens=[(BOS, BOS_ID)]
    )
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] in HIDDEN_WHEN_DECODED
    return Tokenizer.from_str(json.dumps(state))


def config(model_max_length: int) -> dict:
    """Contents of tokenizer_config.json."""
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": model_max_length,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
        "chat_template": CHAT_TEMPLATE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of train-*.txt.xz")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--every", type=int, default=3, help="use every n-th piece of about 2,000 characters")
    parser.add_argument("--model-max-length", type=int, default=4096)
    args = parser.parse_args()
    tokenizer = train(sample(args.corpus, args.shards, args.every))
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"))
    text = json.dumps(config(args.model_max_length), ensure_ascii=False, indent=2)
    (args.out / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    print(f"{tokenizer.get_vocab_size()} entries written to {args.out}")


if __name__ == "__main__":
    main()
