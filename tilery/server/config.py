"""The server's settings: one frozen record, checked when it is made."""

from __future__ import annotations

import msgspec


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Raises `ValueError` that names the field and what it must be."""

    host: str = "127.0.0.1"
    """Loopback by default: opening a model to the network is a decision."""
    port: int = 8000
    """0: any free port."""
    model_names: tuple[str, ...] = ()
    """Names that requests may use; the first one appears in answers. Empty: the engine's name for its model."""
    api_keys: tuple[str, ...] = ()
    """Any of these as `Authorization: Bearer KEY` opens the API; empty: open to all who reach it."""
    admin_key: str | None = None
    """Opens the administrative endpoints; None: they are closed (403)."""
    chat_template: str | None = None
    """A file with a Jinja template that replaces the model's own."""
    cors_origins: tuple[str, ...] = ()
    """Browser origins that may call the API; "*" allows all."""
    max_body_bytes: int = 32 * 1024 * 1024
    max_choices: int = 128
    """`n` of one prompt."""
    max_prompts: int = 1024
    """Prompts in one /v1/completions request."""
    max_stop: int = 16
    """Stop strings of one request."""
    max_spec_bytes: int = 256 * 1024
    """A schema, grammar, regular expression or list of choices that constrains the output."""
    retry_after_seconds: int = 1
    """What 503 answers advise."""
    drain_seconds: float = 30.0
    """How long running requests may finish after SIGTERM; then they are aborted."""
    keep_alive_seconds: int = 75
    """Idle connections stay open this long."""
    vllm_metrics: bool = True
    """Show metrics under vLLM's names as well."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be between 0 and 65535, got {self.port}.")
        for name in ("max_body_bytes", "max_choices", "max_prompts", "max_stop", "max_spec_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("drain_seconds", "keep_alive_seconds", "retry_after_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if any(not key for key in self.api_keys) or self.admin_key == "":
            raise ValueError("api_keys and admin_key must not be empty strings.")
