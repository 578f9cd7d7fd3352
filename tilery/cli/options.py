"""Options that several commands share, and the checks that must fail before a model is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from tilery.cli.errors import CliError
from tilery.engine.config import CacheDType, Device, DType, EngineConfig
from tilery.models.config import ConfigError, read_config, resolve_model

ENGINE = "Engine"
MEMORY = "Memory and batching"
SPECULATION = "Speculative decoding"

DeviceOption = Annotated[
    Device,
    typer.Option(help="Where the model runs. auto: cuda where torch can use an NVIDIA GPU.", rich_help_panel=ENGINE),
]
DTypeOption = Annotated[
    DType, typer.Option(help="Arithmetic and weights. float32 is exact and slower.", rich_help_panel=ENGINE)
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(help="CPU threads for tensor work.", show_default="every core allowed", rich_help_panel=ENGINE),
]
CacheDTypeOption = Annotated[
    CacheDType,
    typer.Option(
        help="model: like --dtype. fp8: packed rows (656-byte latent, 132-byte indexer key). auto: fp8 for a sparse "
        "FP8 checkpoint in bfloat16, else model.",
        rich_help_panel=MEMORY,
    ),
]
MaxModelLenOption = Annotated[
    int | None,
    typer.Option(
        help="Longest request in tokens, prompt and output together.",
        show_default="from config.json",
        rich_help_panel=MEMORY,
    ),
]
CacheTokensOption = Annotated[
    int | None,
    typer.Option(
        help="Tokens that the KV cache holds.",
        show_default="65536; on a GPU what --max-running requests can use; less if memory is short",
        rich_help_panel=MEMORY,
    ),
]
MaxBatchTokensOption = Annotated[
    int, typer.Option(help="Token budget of one step, prefill and decode together.", rich_help_panel=MEMORY)
]
MaxRunningOption = Annotated[int, typer.Option(help="Requests in flight at the same time.", rich_help_panel=MEMORY)]
PrefixCacheOption = Annotated[
    bool,
    typer.Option(
        "--prefix-cache/--no-prefix-cache", help="Reuse the cache of shared prompt beginnings.", rich_help_panel=MEMORY
    ),
]
SpeculativeTokensOption = Annotated[
    int, typer.Option(help="Draft tokens per step from the model's MTP layer; 0: off.", rich_help_panel=SPECULATION)
]


def check_model(name_or_path: str) -> None:
    """Raises `CliError` unless the argument is a bundled model, or a folder with weights and a config that is served.

    The engine looks again when it loads; this look comes first so that a slip of the pen costs no start-up time.
    """
    if Path(name_or_path).is_file():
        raise CliError(f"{name_or_path!r} is a file: MODEL must be a folder with config.json and *.safetensors.")
    try:
        folder = resolve_model(name_or_path)
        if not (folder / "config.json").is_file():
            raise CliError(f"folder {name_or_path!r} has no config.json: expected a Hugging Face checkpoint.")
        read_config(folder)
    except ConfigError as error:
        raise CliError(str(error)) from error
    if not any(folder.glob("*.safetensors")):
        raise CliError(f"folder {name_or_path!r} has no *.safetensors: download the checkpoint's weights first.")


@contextmanager
def as_flags(record: type[msgspec.Struct] = EngineConfig) -> Iterator[None]:
    """Turns a settings record's `ValueError` into a `CliError` that speaks of `--max-running`, not `max_running`."""
    try:
        yield
    except ValueError as error:
        names = sorted(record.__struct_fields__, key=len, reverse=True)
        compound = [name for name in names if "_" in name]
        pattern = rf"^({'|'.join(names)})\b|\b({'|'.join(compound)})\b"
        message = re.sub(pattern, lambda match: "--" + match[0].replace("_", "-"), str(error))
        raise CliError(message) from error


def api_key_header(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}
