"""`tilery serve`: one model behind the OpenAI-compatible API."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

import typer

from tilery.cli import options
from tilery.cli.errors import CliError
from tilery.engine.config import CacheDType, Device, DType, EngineConfig
from tilery.models.config import DEFAULT_MODEL

SERVER = "Server"


def serve(
    model: Annotated[
        str, typer.Argument(help="Folder with config.json and *.safetensors, or a bundled model.")
    ] = DEFAULT_MODEL,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.", rich_help_panel=SERVER)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.", rich_help_panel=SERVER)] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="Name in the API; repeat for aliases.", show_default="MODEL's last part", rich_help_panel=SERVER
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Require this bearer key; repeat for several.",
            envvar="TILERY_API_KEY",
            show_default="open to all",
            rich_help_panel=SERVER,
        ),
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(
            help="Key of the administrative calls (reset the prefix cache ...).",
            envvar="TILERY_ADMIN_KEY",
            show_default="calls off",
            rich_help_panel=SERVER,
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            help="Jinja file in place of the model's template.", show_default="the model's", rich_help_panel=SERVER
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Browser origin that may call; repeat for several, * for all.",
            show_default="none",
            rich_help_panel=SERVER,
        ),
    ] = None,
    drain_seconds: Annotated[
        float,
        typer.Option(min=0.0, help="Time that running requests get to finish after SIGTERM.", rich_help_panel=SERVER),
    ] = 30.0,
    device: options.DeviceOption = Device.AUTO,
    dtype: options.DTypeOption = DType.BFLOAT16,
    threads: options.ThreadsOption = None,
    seed: Annotated[
        int,
        typer.Option(help="Not 0: requests without a seed repeat across runs.", rich_help_panel=options.ENGINE),
    ] = 0,
    max_waiting: Annotated[
        int,
        typer.Option(help="Queue length; beyond it requests are refused with 503.", rich_help_panel=options.ENGINE),
    ] = 4096,
    aging_seconds: Annotated[
        float,
        typer.Option(
            help="A waiting request gains a priority level per this many seconds.", rich_help_panel=options.ENGINE
        ),
    ] = 10.0,
    cache_dtype: options.CacheDTypeOption = CacheDType.AUTO,
    max_model_len: options.MaxModelLenOption = None,
    cache_tokens: options.CacheTokensOption = None,
    block_size: Annotated[
        int, typer.Option(help="Tokens per block of the KV cache.", rich_help_panel=options.MEMORY)
    ] = 64,
    max_batch_tokens: options.MaxBatchTokensOption = 2048,
    max_running: options.MaxRunningOption = 64,
    prefix_cache: options.PrefixCacheOption = True,
    cache_salt: Annotated[
        str,
        typer.Option(
            help="Mixed into prefix hashes: deployments with different salts share nothing.",
            show_default="none",
            rich_help_panel=options.MEMORY,
        ),
    ] = "",
    operator: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=IMPLEMENTATION",
            help="Override the choice for an operator (see tilery kernels list); repeatable, *=reference for all.",
            show_default="the fastest valid ones",
            rich_help_panel=options.ENGINE,
        ),
    ] = None,
    speculative_tokens: options.SpeculativeTokensOption = 0,
    speculative_auto_off: Annotated[
        bool,
        typer.Option(
            "--speculative-auto-off/--speculative-always",
            help="Pause drafting while it costs more than it gains.",
            rich_help_panel=options.SPECULATION,
        ),
    ] = True,
) -> None:
    """Serve MODEL over HTTP: completions, chat, tokenize, metrics.

    Examples:

    \b
      tilery serve
      tilery serve ./DeepSeek-V3.2 --host 0.0.0.0 --api-key secret
      tilery serve ./DeepSeek-V3.2 --speculative-tokens 1

    Then: curl http://127.0.0.1:8000/v1/models, or tilery chat.
    """
    options.check_model(model)
    operators = parse_operators(operator or [])
    with options.as_flags(EngineConfig):
        config = EngineConfig(
            model=model,
            device=device,
            dtype=dtype,
            cache_dtype=cache_dtype,
            max_model_len=max_model_len,
            cache_tokens=cache_tokens,
            block_size=block_size,
            max_batch_tokens=max_batch_tokens,
            max_running=max_running,
            max_waiting=max_waiting,
            enable_prefix_cache=prefix_cache,
            speculative_tokens=speculative_tokens,
            speculative_auto_off=speculative_auto_off,
            cache_salt=cache_salt,
            aging_seconds=aging_seconds,
            threads=threads,
            operators=operators,
            seed=seed,
        )
    if chat_template is not None and not chat_template.is_file():
        raise CliError(f"--chat-template {chat_template}: no such file.")
    check_port(host, port)

    from tilery.server import ServerConfig, StartError, run

    with options.as_flags(ServerConfig):
        server = ServerConfig(
            host=host,
            port=port,
            model_names=tuple(served_model_name or ()),
            api_keys=tuple(api_key or ()),
            admin_key=admin_key,
            chat_template=str(chat_template) if chat_template else None,
            cors_origins=tuple(cors_origin or ()),
            drain_seconds=drain_seconds,
        )
    try:
        run(config, server)
    except StartError as error:
        raise CliError(str(error)) from None


def parse_operators(choices: list[str]) -> dict[str, str]:
    """NAME=IMPLEMENTATION pairs as a mapping; the engine checks that they exist."""
    for choice in choices:
        name, equals, implementation = choice.partition("=")
        if not (name and equals and implementation):
            raise CliError(f"--operator {choice}: expected NAME=IMPLEMENTATION, as in mla_decode=reference.")
    return dict(choice.split("=", 1) for choice in choices)


def check_port(host: str, port: int) -> None:
    """Raises `CliError` if nobody can listen there, before a model is loaded for nothing."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise CliError(f"--host {host}: not an address of this machine ({error.strerror}).") from error
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise CliError(
                f"cannot listen on {host} port {port} ({error.strerror}): stop what runs there or take another --port."
            ) from error
