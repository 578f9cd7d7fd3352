"""A tiny model with a tokenizer of single characters, and a driver that books every answer."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from tests.tiny import CONFIG, write_checkpoint
from tilery.engine.config import EngineConfig
from tilery.engine.core import EngineCore
from tilery.engine.messages import AddRequest, EngineOutput, FinishReason, SamplingParams

VOCAB = CONFIG["vocab_size"]
EOS = CONFIG["eos_token_id"]
CHARACTERS = 'abcdefghijklmnopqrstuvwxyz0123456789"{}:,[]-. '


def write_model(folder: Path, **changes) -> Path:
    write_checkpoint(folder, **changes)
    vocab = {"<bos>": 0, "<eos>": EOS} | {c.replace(" ", "Ġ"): i + 2 for i, c in enumerate(CHARACTERS)}
    assert len(vocab) == VOCAB
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": name, **special} for name, i in (("<bos>", 0), ("<eos>", EOS))],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                  "byte_fallback": False, "ignore_merges": False},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}))
    return folder


def text_of(token_ids) -> str:
    return "".join(CHARACTERS[token - 2] for token in token_ids if token >= 2)


def make_core(folder: Path, **settings) -> EngineCore:
    base = {"dtype": "float32", "cache_tokens": 4096, "progress": False, "threads": 1, "speculative_auto_off": False}
    return EngineCore(msgspec.convert({"model": str(folder), **base, **settings}, EngineConfig))


def request(name: str, prompt, params: SamplingParams | None = None, /, **changes) -> AddRequest:
    """`changes` go to the request or, by their names, to its greedy sampling parameters."""
    own = {key: changes.pop(key) for key in ("priority", "cache_salt", "arrival_time") if key in changes}
    base = params or SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=8)
    return AddRequest(
        request_id=name, prompt_token_ids=list(prompt), params=msgspec.structs.replace(base, **changes), **own
    )


@dataclass
class Answer:
    """All that the engine said about one choice."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    prompt_logprobs: list | None = None
    last: EngineOutput | None = None
    first_step: int | None = None

    @property
    def reason(self) -> FinishReason | None:
        return self.last and self.last.finish_reason


class Driver:
    """Adds, steps and aborts; verifies that nothing is said after a choice's end."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.answers: dict[tuple[str, int], Answer] = {}
        self.steps = 0

    def add(self, *requests: AddRequest) -> None:
        for one in requests:
            for index in range(one.params.n):
                self.answers[one.request_id, index] = Answer()
            self.core.add(one)

    def step(self) -> list[EngineOutput]:
        outputs = self.core.step()
        self.steps += 1
        for output in outputs:
            answer = self.answers[output.request_id, output.index]
            assert answer.last is None, f"{output} came after the end"
            if output.token_ids and answer.first_step is None:
                answer.first_step = self.steps
            answer.tokens += output.token_ids
            answer.logprobs += output.logprobs or []
            if output.prompt_logprobs is not None:
                assert answer.prompt_logprobs is None, "prompt log-probabilities come once"
                answer.prompt_logprobs = output.prompt_logprobs
            if output.finish_reason is not None:
                answer.last = output
                assert (output.finish_reason is FinishReason.ERROR) == (output.error is not None)
                assert (output.error is None) == (output.error_kind is None)
        return outputs

    def finish(self) -> dict[tuple[str, int], Answer]:
        while self.core.has_work():
            self.step()
            self.core.check()
        assert all(answer.last is not None for answer in self.answers.values()), "a choice was never answered"
        assert self.core.stats().kv_blocks_used == 0
        return self.answers


def run(core: EngineCore, *requests: AddRequest) -> dict[tuple[str, int], Answer]:
    driver = Driver(core)
    driver.add(*requests)
    return driver.finish()


def answer(core: EngineCore, one: AddRequest) -> Answer:
    """The only choice of one request, served alone."""
    return run(core, one)[one.request_id, 0]
