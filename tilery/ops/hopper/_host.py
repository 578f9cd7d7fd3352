"""What every host function needs: the device of its operands made current, and workspaces that outlive graphs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def on_its_device(function: F) -> F:
    """Calls `function` with the device of its first argument, a tensor, as the current one: kernels launch there."""

    name = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        first: Tensor = arguments[0] if arguments else named[name]
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return function(*arguments, **named)
        with torch.cuda.device(first.device):
            return function(*arguments, **named)

    return call  # type: ignore[return-value]


def kept_for_ever(make: F) -> F:
    """`make`, called once for each set of arguments; what it returns is never freed, as captured graphs point to it.

    Raises `RuntimeError` where a CUDA graph is being captured and nothing is kept yet: memory would be the graph's, and
    its zeros would only be recorded.
    """
    kept: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(make)
    def take(*key: Any) -> Any:
        if key not in kept:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("call the kernel once with these shapes before a CUDA graph captures it")
            kept[key] = make(*key)
        return kept[key]

    return take  # type: ignore[return-value]
