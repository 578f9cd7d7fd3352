"""The engine's settings: one frozen record, checked when it is made."""

from __future__ import annotations

from enum import StrEnum

import msgspec

MAX_SPECULATIVE_TOKENS = 7
"""The newest token and its drafts are verified as decode, which takes 8 tokens (`models.step.DECODE_TOKENS`); longer
ones would be computed as a prefill, at a cost that they cannot win back."""


class Device(StrEnum):
    AUTO = "auto"  # cuda where torch can use an NVIDIA GPU, else cpu
    CPU = "cpu"
    CUDA = "cuda"


class DType(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class CacheDType(StrEnum):
    AUTO = (
        "auto"  # fp8 for an FP8 checkpoint of a sparse model in bfloat16, as it was made to run; else the model's dtype
    )
    MODEL = "model"  # the model's dtype
    FP8 = "fp8"  # the field's packed rows: 656 bytes of MLA latent, 132 bytes of indexer key


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Raises `ValueError` that names the field and what it must be."""

    model: str
    """A folder with config.json and safetensors, or the name of a bundled model."""
    device: Device = Device.AUTO
    """Where the model and its cache live and compute; of several GPUs the first that CUDA_VISIBLE_DEVICES shows."""
    dtype: DType = DType.BFLOAT16
    cache_dtype: CacheDType = CacheDType.AUTO
    max_model_len: int | None = None
    """Tokens, prompt and output together; None: what config.json says, or what the cache holds if that is less."""
    cache_tokens: int | None = None
    """Tokens the KV cache holds, rounded up to whole blocks; None: 65,536 on a CPU, what `max_running` requests of full
    length need on a GPU, and less if memory is short."""
    block_size: int = 64
    max_batch_tokens: int = 2048
    """Token budget of one step, prefill and decode together."""
    max_running: int = 64
    """Requests that hold cache blocks at the same time."""
    max_waiting: int = 4096
    """Queue length beyond which requests are refused with 503."""
    enable_prefix_cache: bool = True
    speculative_tokens: int = 0
    """Draft tokens of the MTP layer per step; 0: off."""
    speculative_auto_off: bool = True
    """Switch drafts off while they lose time, try again later."""
    cache_salt: str = ""
    """Mixed into every prefix hash: deployments with different salts never agree on a hash."""
    aging_seconds: float = 10.0
    """A waiting request gains one priority level per this many seconds."""
    threads: int | None = None
    """CPU threads for tensor work; None: the cores this process may run on."""
    operators: dict[str, str] = {}
    """Operator -> implementation to use in place of the registry's choice; "*" for all that have it."""
    seed: int = 0
    """Makes unseeded requests repeatable across engine runs when not 0."""
    progress: bool = True
    """Show a progress bar while weights load."""

    def __post_init__(self) -> None:
        for name in ("block_size", "max_batch_tokens", "max_running", "max_waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("max_model_len", "cache_tokens", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.max_model_len == 1:
            raise ValueError("max_model_len must be at least 2, for one token of prompt and one of output, got 1.")
        if not self.aging_seconds > 0:
            raise ValueError(f"aging_seconds must be above 0 (inf switches ageing off), got {self.aging_seconds}.")
        if not 0 <= self.speculative_tokens <= MAX_SPECULATIVE_TOKENS:
            raise ValueError(
                f"speculative_tokens must be between 0 and {MAX_SPECULATIVE_TOKENS}, got {self.speculative_tokens}."
            )
        if self.max_running > self.max_batch_tokens:
            raise ValueError(
                f"max_running ({self.max_running}) must be at most max_batch_tokens ({self.max_batch_tokens}): "
                "each running request needs one token of every step's budget."
            )
