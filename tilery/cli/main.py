"""The `tilery` command: puts the sub-commands together and turns mistakes of the user into one line, exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import tilery
from tilery.cli import chat, generate, kernel_pages, kernels, serve
from tilery.cli.bench import ops as bench_ops
from tilery.cli.bench import serve as bench_serve
from tilery.cli.errors import CliError

UsageError = typer.BadParameter.__mro__[1]
"""typer's own, wherever this version of typer keeps it."""

HELP = """
Serve sparse mixture-of-experts models on any machine, from the kernel to the HTTP API.

[bold]Type first[/bold] (a small model comes with the package)

\b
  tilery generate "It was a dark night and"   a text, in this process
  tilery serve                                an OpenAI-style API on port 8000
  tilery chat                                 talk to it, in a second terminal

[bold]Then[/bold]

\b
  tilery serve ./DeepSeek-V3.2 --speculative-tokens 1
  tilery bench serve --num-prompts 200 --request-rate 4
  tilery kernels list

A model is a folder with config.json and *.safetensors, or the bundled tilery-books-26m. No environment variable is
needed. Each command explains its own options: tilery serve --help.
"""

app = typer.Typer(
    help=HELP,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
bench = typer.Typer(help="Measure a running server, or the kernels of a GPU.", no_args_is_help=False)
kernel_commands = typer.Typer(help="Look at the operators, the implementations chosen for this machine, and kernels.")

RUN = "Run a model"
MEASURE = "Measure and inspect"
app.command("serve", rich_help_panel=RUN)(serve.serve)
app.command("generate", rich_help_panel=RUN)(generate.generate)
app.command("chat", rich_help_panel=RUN)(chat.chat)
app.add_typer(bench, name="bench", rich_help_panel=MEASURE)
app.add_typer(kernel_commands, name="kernels", rich_help_panel=MEASURE)
bench.command("serve")(bench_serve.bench_serve)
bench.command("ops")(bench_ops.bench_ops)
kernel_commands.command("list")(kernels.list_kernels)
kernel_commands.command("show")(kernels.show_kernel)
kernel_commands.command("verify")(kernels.verify_kernels)
kernel_commands.command("profile")(kernel_pages.profile_kernel)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tilery {tilery.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    _help_if_alone(context)


@bench.callback(invoke_without_command=True)
def _bench_root(context: typer.Context) -> None:
    _help_if_alone(context)


@kernel_commands.callback(invoke_without_command=True)
def _kernels_root(context: typer.Context) -> None:
    _help_if_alone(context)


def _help_if_alone(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        text = context.get_help()
        if text:
            typer.echo(text)
        raise typer.Exit


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 0 done, 2 a mistake of the user, 130 interrupted."""
    try:
        code = app(arguments, prog_name="tilery", standalone_mode=False)
    except CliError as error:
        return _complain(f"tilery: {error}")
    except UsageError as error:  # type: ignore[misc]
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "tilery"
        return _complain(f"{command}: {error.format_message()} (see {command} --help)")
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # `tilery ... | head`
        sys.stderr.close()
        return 0
    return code if isinstance(code, int) else 0


def _complain(message: str) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return 2


def main() -> None:
    """The console script."""
    sys.exit(run())


if __name__ == "__main__":
    main()
