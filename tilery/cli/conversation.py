"""What `tilery chat` does once its options are read: keep the turns, stream the answers, obey the slash commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from tilery.cli.connection import NoServer, ServerError, Target, call_json, stream
from tilery.cli.errors import CliError

COMMANDS = """\
  /system TEXT   set the system message and start over (no text: show it)
  /reset         forget the conversation
  /help          this list
  /quit          leave (also Ctrl-D)
  Ctrl-C         stop the current answer"""


def first_model(target: Target, headers: dict[str, str]) -> str:
    """The name of the first model that the server lists. Raises `CliError` that says what to do."""
    try:
        models = call_json(target, "/v1/models", headers=headers, timeout=10.0)
        return str(models["data"][0]["id"])
    except NoServer as error:
        raise CliError(
            f"no server answers at {target.url} ({error}): start one with `tilery serve`, or give its --url."
        ) from error
    except ServerError as error:
        hint = "give its key with --api-key." if error.status == 401 else "is this an OpenAI-compatible server?"
        raise CliError(f"{target.url} refused ({error}): {hint}") from error
    except (KeyError, IndexError, TypeError) as error:
        raise CliError(f"{target.url}/v1/models lists no model: name one with --model.") from error


@dataclass
class Conversation:
    """The settings of one chat and what was said so far."""

    target: Target
    headers: dict[str, str]
    model: str
    thinking: bool
    max_tokens: int | None
    temperature: float
    system: str | None
    turns: list[dict[str, str]] = field(default_factory=list)

    def payload(self) -> dict[str, object]:
        opening = [{"role": "system", "content": self.system}] if self.system else []
        body: dict[str, object] = {
            "model": self.model,
            "messages": opening + self.turns,
            "temperature": self.temperature,
            "stream": True,
        }
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        if self.thinking:
            body["chat_template_kwargs"] = {"thinking": True}
        return body

    def ask(self, text: str, write: Callable[[str, bool], None]) -> None:
        """Sends the next turn and passes each piece of the answer to `write(piece, is_reasoning)`.

        A broken answer takes the user's turn back, so that the conversation stays as it was. Raises `NoServer` or
        `ServerError`. On Ctrl-C the part that came stays in the conversation.
        """
        self.turns.append({"role": "user", "content": text})
        answer: list[str] = []
        events = stream(self.target, "/v1/chat/completions", self.payload(), self.headers)
        try:
            for event in events:
                for choice in event.get("choices", ()):
                    delta = choice.get("delta", {})
                    reasoning = delta.get("reasoning") or delta.get("reasoning_content")
                    if reasoning:
                        write(reasoning, True)
                    if delta.get("content"):
                        answer.append(delta["content"])
                        write(delta["content"], False)
        except KeyboardInterrupt:
            write(" [stopped]", True)
        except (NoServer, ServerError):
            self.turns.pop()
            raise
        finally:
            events.close()  # type: ignore[attr-defined]  # a generator; closing it hangs up
        self.turns.append({"role": "assistant", "content": "".join(answer)})


def converse(conversation: Conversation) -> None:
    """Reads lines until the end of input. One failed answer does not end the chat."""
    terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("\n> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)")
            continue
        if line in ("/quit", "/exit"):
            return
        if line.startswith("/"):
            print(obey(conversation, line))
        elif line:
            try:
                conversation.ask(line, _write)
                print()
            except (NoServer, ServerError) as error:
                print(f"\nNo answer from {conversation.target.url}: {error}", file=sys.stderr)


def obey(conversation: Conversation, line: str) -> str:
    """Carries out one slash command and returns what to print."""
    command, _, rest = line.partition(" ")
    match command:
        case "/help":
            return COMMANDS
        case "/reset":
            conversation.turns.clear()
            return "The conversation starts over."
        case "/system" if rest.strip():
            conversation.system = rest.strip()
            conversation.turns.clear()
            return "System message set; the conversation starts over."
        case "/system":
            return conversation.system or "There is no system message: /system TEXT sets one."
        case _:
            return f"Unknown command {command}.\n{COMMANDS}"


def _write(piece: str, is_reasoning: bool) -> None:
    if is_reasoning and sys.stdout.isatty():
        piece = f"\x1b[2m{piece}\x1b[0m"
    print(piece, end="", flush=True)
