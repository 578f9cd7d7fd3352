"""Puts the adapters in the place of the original functions inside other engines: `install()`, or as a vLLM plug-in.

vLLM calls `plugin` in every process it starts (entry point group `vllm.general_plugins`). It does nothing unless the
environment variable TILERY_ADAPTERS names what to replace: `flash_mla`, `deep_gemm`, or both, separated by a comma.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from tilery.adapters.unsupported import Unsupported

VARIABLE = "TILERY_ADAPTERS"

FUNCTIONS = {
    "flash_mla": ("flash_mla_with_kvcache", "flash_mla_sparse_fwd"),
    "deep_gemm": (
        "fp8_gemm_nt", "m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_gemm_nt_masked",
        "fp8_m_grouped_gemm_nt_masked", "fp8_mqa_logits", "fp8_paged_mqa_logits",
    ),
}  # fmt: skip
"""What each adapter replaces. Functions that only make metadata stay the originals': theirs serve both."""

PLACES = {
    "flash_mla": (
        "flash_mla", "flash_mla.flash_mla_interface", "vllm.third_party.flashmla.flash_mla_interface",
        "vllm.v1.attention.ops.flashmla", "vllm.attention.ops.flashmla", "sgl_kernel.flash_mla",
    ),
    "deep_gemm": ("deep_gemm", "vllm.third_party.deep_gemm"),
}  # fmt: skip
"""Modules in which vLLM, SGLang and the libraries themselves hold the functions; absent ones are passed over."""

log = logging.getLogger(__name__)


def install(adapters: Sequence[str] = ("flash_mla", "deep_gemm")) -> list[str]:
    """Replaces the functions of `adapters` wherever they are found and returns their names, `module.function`.

    A call that no kernel here takes goes to the function that stood there. Safe to call again. Call it before the
    engine imports names out of these modules. Raises `ValueError` for an unknown adapter.
    """
    replaced = []
    for adapter in adapters:
        if adapter not in FUNCTIONS:
            raise ValueError(f"unknown adapter {adapter!r}; expected one of {', '.join(FUNCTIONS)}")
        ours = importlib.import_module(f"tilery.adapters.{adapter}")
        for place in PLACES[adapter]:
            module = _module(place)
            if module is not None:
                replaced += _replace(module, ours, FUNCTIONS[adapter])
    return replaced


def plugin() -> None:
    """vLLM's entry point: installs what TILERY_ADAPTERS names, or says in the log why it cannot."""
    names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    if not names:
        return
    reason = unavailable()
    if reason is not None:
        log.warning("%s=%s is ignored: %s", VARIABLE, ",".join(names), reason)
        return
    replaced = install(names)
    log.warning(
        "Tilery's kernels stand in for %s", ", ".join(replaced) or "nothing: none of the libraries is installed"
    )


def unavailable() -> str | None:
    """Why the kernels cannot run in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package is missing"
    import torch

    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return None if major == 9 else f"the kernels need compute capability 9.0, this device has {major}.{minor}"


def _module(name: str) -> ModuleType | None:
    """A module, imported; None if it or what it needs is missing."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        log.debug("%s is not there: %s", name, error)
        return None


def _replace(module: ModuleType, ours: ModuleType, names: Sequence[str]) -> list[str]:
    replaced = []
    for name in names:
        original = getattr(module, name, None)
        if original is None:
            continue
        if not hasattr(original, "tilery_original"):
            setattr(module, name, _with_fallback(getattr(ours, name), original))
        replaced.append(f"{module.__name__}.{name}")
    return replaced


def _with_fallback(function: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    said: set[str] = set()
    parameters = inspect.signature(function)

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return function(*arguments, **named)
        except Unsupported as refusal:
            reason = refusal
        except TypeError as error:
            try:
                parameters.bind(*arguments, **named)
            except TypeError:
                reason = Unsupported(f"{function.__name__} is called in a way that is not known here ({error}).")
            else:
                raise
        if str(reason) not in said:
            said.add(str(reason))
            log.info("%s The library's own is called.", reason)
        return original(*arguments, **named)

    call.tilery_original = original  # type: ignore[attr-defined]
    return call
