"""`tilery generate`: text from a model in this process, no server."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tilery.cli import options
from tilery.cli.errors import CliError
from tilery.engine.config import CacheDType, Device, DType, EngineConfig
from tilery.engine.messages import SamplingParams
from tilery.models.config import DEFAULT_MODEL

if TYPE_CHECKING:
    from tilery.engine.llm import RequestOutput

SAMPLING = "Sampling"


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="Texts to continue; none, or -: one per line of standard input."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Folder with config.json and *.safetensors, or a bundled model.")
    ] = DEFAULT_MODEL,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per prompt instead of text.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Tokens per answer.", rich_help_panel=SAMPLING)] = 128,
    temperature: Annotated[
        float, typer.Option(help="0: always the most likely token.", rich_help_panel=SAMPLING)
    ] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="Keep the likeliest tokens up to this probability.", rich_help_panel=SAMPLING)
    ] = 0.95,
    top_k: Annotated[int, typer.Option(help="Keep this many tokens; 0: all.", rich_help_panel=SAMPLING)] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; repeat for several.", rich_help_panel=SAMPLING)
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Same seed, same text.", show_default="a new one each run", rich_help_panel=SAMPLING),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the end-of-sequence token.", rich_help_panel=SAMPLING)
    ] = False,
    device: options.DeviceOption = Device.AUTO,
    dtype: options.DTypeOption = DType.BFLOAT16,
    threads: options.ThreadsOption = None,
    cache_dtype: options.CacheDTypeOption = CacheDType.AUTO,
    max_model_len: options.MaxModelLenOption = None,
    cache_tokens: options.CacheTokensOption = None,
    max_batch_tokens: options.MaxBatchTokensOption = 2048,
    max_running: options.MaxRunningOption = 64,
    prefix_cache: options.PrefixCacheOption = True,
    speculative_tokens: options.SpeculativeTokensOption = 0,
) -> None:
    """Continue texts offline.

    Examples:

    \b
      tilery generate "It was a dark night and" --max-tokens 60 --seed 1
      tilery generate --json --temperature 0 < prompts.txt
    """
    options.check_model(model)
    with options.as_flags(SamplingParams):
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop=tuple(stop or ()),
            seed=seed,
            ignore_eos=ignore_eos,
        )
    settings: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "threads": threads,
        "cache_dtype": cache_dtype,
        "max_model_len": max_model_len,
        "cache_tokens": cache_tokens,
        "max_batch_tokens": max_batch_tokens,
        "max_running": max_running,
        "enable_prefix_cache": prefix_cache,
        "speculative_tokens": speculative_tokens,
        "progress": sys.stderr.isatty(),
    }
    with options.as_flags(EngineConfig):
        EngineConfig(model=model, **settings)
    texts = read_prompts(prompts or [])
    outputs = run_model(model, settings, texts, params)
    for position, output in enumerate(outputs):
        if as_json:
            print(json.dumps(as_record(output), ensure_ascii=False), flush=True)
        else:
            show(output, alone=len(outputs) == 1, first=position == 0)


def read_prompts(arguments: list[str]) -> list[str]:
    """The arguments, or the non-empty lines of standard input. Raises `CliError` if there is neither."""
    if arguments and arguments != ["-"]:
        return arguments
    if not arguments and sys.stdin.isatty():
        raise CliError(
            'no prompt: try tilery generate "It was a dark night and", or write one prompt per line to stdin.'
        )
    lines = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
    if not lines:
        raise CliError("standard input holds no prompt: expected one per line.")
    return lines


def run_model(model: str, settings: dict[str, Any], texts: list[str], params: SamplingParams) -> list[RequestOutput]:
    """The whole of the offline interface; tests put a stand-in here."""
    from tilery.engine.llm import LLM, GenerationError

    with options.as_flags(EngineConfig):
        llm = LLM(model, **settings)
    try:
        return llm.generate(texts, params, progress=sys.stderr.isatty())
    except GenerationError as error:
        raise CliError(str(error)) from error


def as_record(output: RequestOutput) -> dict[str, object]:
    choice = output.outputs[0]
    return {
        "prompt": output.prompt,
        "text": choice.text,
        "finish_reason": choice.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": len(choice.token_ids),
    }


def show(output: RequestOutput, *, alone: bool, first: bool) -> None:
    """On a terminal the prompt stands dimmed before its continuation; in a pipe one prompt gives the bare text."""
    terminal = sys.stdout.isatty()
    prompt = output.prompt or ""
    if not first:
        print()
    if terminal:
        prompt = f"\x1b[2m{prompt}\x1b[0m"
    print((prompt if terminal or not alone else "") + output.outputs[0].text, flush=True)
