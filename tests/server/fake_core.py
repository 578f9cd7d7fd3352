"""A core without a model for the real engine process: it says what the prompt tells it to.

    <<say:TEXT>>      the tokens of TEXT, then end of sequence      <<crash>>   the next step raises
    <<slow>>          one token per 20 ms                           <<exit>>    the process ends without a word
    <<refuse:KIND>>   an error of that kind                         <<late-crash>>  raises after three tokens
    anything else     " one two three ..." for ever

`stats().preemptions` counts aborted children, so that tests can see aborts arrive.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import tilery
from tilery.engine.config import EngineConfig
from tilery.engine.messages import (
    AddRequest,
    EngineInfo,
    EngineOutput,
    EngineStats,
    ErrorKind,
    FinishReason,
    RequestTiming,
    TokenLogprobs,
)
from tilery.engine.tokenizer import Tokenizer

MODEL = str(Path(tilery.__file__).parent / "bundled" / "tilery-books-26m")
NUMBERS = " one two three four five six seven eight nine ten"
COMMAND = re.compile(r"<<(say|refuse|slow|crash|late-crash|exit):?(.*?)>>", re.DOTALL)


class Child:
    def __init__(self, request: AddRequest, index: int, script: list[int], endless: bool) -> None:
        self.request = request
        self.index = index
        self.script = script
        self.endless = endless
        self.count = 0
        self.scheduled = time.monotonic()
        self.first = 0.0


class FakeCore:
    def __init__(self, config: EngineConfig) -> None:
        self.tokenizer = Tokenizer.load(MODEL)
        assert self.tokenizer.eos_id is not None
        self.eos = self.tokenizer.eos_id
        self.numbers = self.tokenizer.encode(NUMBERS, add_special_tokens=False)
        self.info = EngineInfo(
            model="fake",
            dtype="bfloat16",
            vocab_size=self.tokenizer.vocab_size,
            max_model_len=config.max_model_len or 4096,
            block_size=64,
            num_blocks=1024,
            cache_dtype="auto",
            eos_token_ids=[self.eos],
            speculative_tokens=0,
            version=tilery.__version__,
        )
        self.children: list[Child] = []
        self.waiting_outputs: list[EngineOutput] = []
        self.counts = {"prompt": 0, "generated": 0, "aborted": 0, "steps": 0}
        self.slow = self.crash = False
        self.crash_at: int | None = None

    def add(self, request: AddRequest) -> None:
        prompt = self.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
        commands = dict(COMMAND.findall(prompt))
        if "exit" in commands:
            os._exit(7)
        if "refuse" in commands:
            kind = ErrorKind(commands["refuse"])
            self.waiting_outputs += [
                EngineOutput(
                    request_id=request.request_id,
                    index=index,
                    finish_reason=FinishReason.ERROR,
                    error_kind=kind,
                    error=f"refused: {kind}",
                )
                for index in range(request.params.n)
            ]
            return
        self.slow |= "slow" in commands
        self.crash |= "crash" in commands
        if "late-crash" in commands:
            self.crash_at = 3
        script = self.tokenizer.encode(commands["say"], add_special_tokens=False) if "say" in commands else self.numbers
        self.counts["prompt"] += len(request.prompt_token_ids)
        self.children += [Child(request, index, script, "say" not in commands) for index in range(request.params.n)]

    def abort(self, request_ids: list[str]) -> None:
        for child in [child for child in self.children if child.request.request_id in request_ids]:
            self.children.remove(child)
            self.counts["aborted"] += 1
            self.waiting_outputs.append(self.output(child, [], FinishReason.ABORT))

    def abort_child(self, request_id: str, index: int) -> None:
        for child in [c for c in self.children if (c.request.request_id, c.index) == (request_id, index)]:
            self.children.remove(child)
            self.counts["aborted"] += 1
            self.waiting_outputs.append(self.output(child, [], FinishReason.ABORT))

    def step(self) -> list[EngineOutput]:
        if self.crash:
            raise RuntimeError("the fake core was told to crash")
        outputs, self.waiting_outputs = self.waiting_outputs, []
        if self.children:
            self.counts["steps"] += 1
            if self.slow:
                time.sleep(0.02)
        for child in list(self.children):
            if self.crash_at is not None and child.count >= self.crash_at:
                raise RuntimeError("the fake core was told to crash")
            outputs.append(self.advance(child))
        return outputs

    def advance(self, child: Child) -> EngineOutput:
        script = child.script
        ended = not child.endless and child.count >= len(script)
        token = self.eos if ended else script[child.count % len(script)]
        child.count += 1
        self.counts["generated"] += 1
        finish = None
        if ended and not child.request.params.ignore_eos:
            finish = FinishReason.STOP
        elif child.count >= (child.request.params.max_tokens or 10**9):
            finish = FinishReason.LENGTH
        if finish is not None:
            self.children.remove(child)
        return self.output(child, [token], finish)

    def output(self, child: Child, tokens: list[int], finish: FinishReason | None) -> EngineOutput:
        params = child.request.params
        now = time.monotonic()
        first = child.count == 1
        if first:
            child.first = now
        prompt = child.request.prompt_token_ids
        timing = RequestTiming(child.request.arrival_time, child.scheduled, child.first, now, 0)
        return EngineOutput(
            request_id=child.request.request_id,
            index=child.index,
            token_ids=tokens,
            logprobs=[logprob(token, params.logprobs) for token in tokens] if params.logprobs is not None else None,
            prompt_logprobs=(
                [None, *(logprob(token, params.prompt_logprobs) for token in prompt[1:])]
                if first and params.prompt_logprobs is not None
                else None
            ),
            num_cached_tokens=len(prompt) // 64 * 64 if first else 0,
            finish_reason=finish,
            timing=timing if finish is not None else None,
        )

    def has_work(self) -> bool:
        return bool(self.children or self.waiting_outputs)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.children),
            kv_blocks_used=len(self.children),
            kv_blocks_total=1024,
            steps=self.counts["steps"],
            prompt_tokens=self.counts["prompt"],
            generation_tokens=self.counts["generated"],
            preemptions=self.counts["aborted"],
            last_step_tokens=len(self.children),
        )

    def reset_prefix_cache(self) -> bool:
        return not self.children


def logprob(token: int, count: int) -> TokenLogprobs:
    others = list(range(token + 1, token + 1 + max(0, count - 1)))
    ids = [token, *others][:count]
    return TokenLogprobs(token, -0.5, 1, ids, [-0.5 - step for step in range(len(ids))])


class FailingCore(FakeCore):
    def __init__(self, config: EngineConfig) -> None:
        raise ValueError("no such model")
