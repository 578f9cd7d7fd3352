"""Offline generation: prompts in every form, texts cut where they should be, and an engine that survives errors."""

import io
import random

import pytest

from tests.engine.support import EOS, VOCAB, text_of, write_model
from tilery.engine.llm import LLM, GenerationError
from tilery.engine.messages import FinishReason, SamplingParams
from tilery.models.config import ConfigError

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SETTINGS = {"dtype": "float32", "cache_tokens": 1024, "progress": False, "threads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def shared(folder):
    return LLM(str(folder), **SETTINGS)


@pytest.fixture
def llm(shared):
    assert not shared.core.has_work(), "the test before left something behind"
    yield shared
    assert shared.stats().kv_blocks_used == 0


def test_every_form_of_prompt(llm):
    ids = llm.tokenizer.encode("the cat")
    (text,) = llm.generate("the cat", GREEDY)
    (listed,) = llm.generate(["the cat"], GREEDY)
    (numbers,) = llm.generate(ids, GREEDY)
    two = llm.generate([ids, "a dog", tuple(ids)], GREEDY)
    assert (text.prompt, numbers.prompt) == ("the cat", None)
    for answer in (text, listed, numbers, two[0], two[2]):
        assert answer.prompt_token_ids == ids
        (choice,) = answer.outputs
        assert choice.token_ids == text.outputs[0].token_ids
        assert choice.text == text_of(choice.token_ids)
        assert (len(choice.token_ids), choice.finish_reason) == (12, FinishReason.LENGTH)
        assert choice.timing.finished >= choice.timing.arrived > 0
    assert two[1].prompt == "a dog"
    assert llm.generate([], GREEDY) == []


def test_defaults_sample_sixteen_tokens(llm):
    (answer,) = llm.generate("hello")
    assert len(answer.outputs[0].token_ids) <= 16


def test_one_params_per_prompt(llm):
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (3, 5)]
    assert [len(a.outputs[0].token_ids) for a in llm.generate(["a", "b"], params)] == [3, 5]
    with pytest.raises(ValueError, match=r"^got 3 prompts but 2 sampling parameters; give one or as many\.$"):
        llm.generate(["a", "b", "c"], params)


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings(llm, include):
    (free,) = llm.generate("the cat", SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True))
    text = free.outputs[0].text
    stop = text[7:9]
    params = SamplingParams(
        temperature=0.0,
        max_tokens=30,
        ignore_eos=True,
        stop=(stop, "@@"),
        include_stop_str_in_output=include,
        logprobs=0,
    )
    (answer,) = llm.generate("the cat", params)
    (choice,) = answer.outputs
    end = text.index(stop)
    assert choice.text == text[: end + len(stop) * include]
    assert (choice.finish_reason, choice.stop_reason) == (FinishReason.STOP, stop)
    assert choice.token_ids == free.outputs[0].token_ids[: end + 2], "tokens up to the one that completes it"
    assert len(choice.logprobs) == len(choice.token_ids)


def test_a_stop_string_ends_its_choice_only(llm):
    sampled = SamplingParams(temperature=1.0, seed=4, max_tokens=30, ignore_eos=True, n=3)
    free = llm.generate("the cat", sampled)[0].outputs
    stop = free[1].text[4:6]
    stopped = llm.generate(
        "the cat", SamplingParams(temperature=1.0, seed=4, max_tokens=30, ignore_eos=True, n=3, stop=(stop,))
    )
    for index, choice in enumerate(stopped[0].outputs):
        assert choice.index == index
        assert choice.text == free[index].text.split(stop)[0]


def test_end_of_sequence_and_stop_tokens(llm):
    biased = {"temperature": 0.0, "max_tokens": 5, "logit_bias": {EOS: 100.0}}
    (choice,) = llm.generate("a", SamplingParams(**biased))[0].outputs
    assert (choice.text, choice.token_ids, choice.finish_reason) == ("", [EOS], FinishReason.STOP)
    (choice,) = llm.generate("a", SamplingParams(**biased, ignore_eos=True, skip_special_tokens=False))[0].outputs
    assert choice.text == "<eos>" * 5
    z = llm.tokenizer.encode("z")[0]
    (choice,) = llm.generate("a", SamplingParams(temperature=0.0, logit_bias={z: 100.0}, stop_token_ids=(z,)))[
        0
    ].outputs
    assert (choice.text, choice.token_ids, choice.stop_reason) == ("", [z], z)


def test_every_end_of_sequence_token_of_the_config_is_hidden(tmp_path):
    z = 2 + 25
    llm = LLM(str(write_model(tmp_path, eos_token_id=[EOS, z])), **SETTINGS)
    (choice,) = llm.generate("a", SamplingParams(temperature=0.0, logit_bias={z: 100.0}))[0].outputs
    assert (choice.text, choice.token_ids, choice.finish_reason) == ("", [z], FinishReason.STOP)


def test_log_probabilities_and_cached_tokens(llm):
    ids = random.Random(1).choices(range(2, VOCAB), k=140)
    assert llm.core.reset_prefix_cache()
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    first, second = (llm.generate(ids, params)[0] for _ in range(2))
    assert first.prompt_logprobs[0] is None
    assert [record.token_id for record in first.prompt_logprobs[1:]] == ids[1:]
    assert [len(record.top_ids) for record in first.outputs[0].logprobs] == [2] * 4
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 0), "every prompt position had to be computed"
    assert llm.generate(ids, GREEDY)[0].num_cached_tokens == 128


def test_a_refused_prompt_leaves_the_engine_clean(llm):
    expected = llm.generate("good", GREEDY)[0].outputs[0].token_ids
    with pytest.raises(GenerationError, match=r"^The prompt holds token 48, but token ids go from 0 to 47\.$"):
        llm.generate(["good", [2, VOCAB], "good"], GREEDY)
    assert not llm.core.has_work()
    assert llm.stats().kv_blocks_used == 0
    assert llm.generate("good", GREEDY)[0].outputs[0].token_ids == expected


@pytest.mark.parametrize("bad", [None, [None], 3.5])
def test_a_prompt_of_the_wrong_type_leaves_the_engine_clean(llm, bad):
    with pytest.raises((TypeError, ValueError)):
        llm.generate(["good", bad], GREEDY)
    assert not llm.core.has_work()
    assert len(llm.generate(["good"], GREEDY)) == 1


def test_an_interrupt_leaves_the_engine_clean(llm, monkeypatch):
    step, calls = llm.core.step, []

    def interrupted():
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(llm.core, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b" * 90], GREEDY)
    assert not llm.core.has_work()
    assert len(llm.generate("a", GREEDY)[0].outputs[0].token_ids) == 12


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_on_a_terminal_only(llm, monkeypatch):
    for stream, progress, shown in ((Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)):
        monkeypatch.setattr("sys.stderr", stream)
        llm.generate("a", GREEDY, progress=progress)
        assert ("generating" in stream.getvalue()) == shown


def test_bf16_with_drafts(folder):
    llm = LLM(str(folder), **SETTINGS | {"dtype": "bfloat16"}, speculative_tokens=2, speculative_auto_off=False)
    answers = llm.generate(["the cat", "a dog"], SamplingParams(seed=1, max_tokens=20, ignore_eos=True, n=2))
    assert [len(choice.token_ids) for answer in answers for choice in answer.outputs] == [20] * 4
    assert llm.stats().spec_drafts > 0


def test_unknown_models_and_settings():
    with pytest.raises(ConfigError, match=r"^no model folder 'nowhere'\. Give a folder"):
        LLM("nowhere")
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        LLM("nowhere", block_size=0)
