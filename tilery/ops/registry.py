"""Which implementation of which operator runs here, and why.

`@operator` declares an operator by its reference; `@implementation` adds a faster way for a target. `select(platform)`
binds the best valid implementation of each operator once, so a call costs an attribute look-up. Every rejected
implementation keeps its reason: `tilery kernels list --explain OP` prints them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

MODULES = (
    "attention",
    "cache",
    "elementwise",
    "indexer",
    "linear",
    "mla",
    "moe",
    "paged",
    "products",
    "quant",
    "topk",
    "native",
    "tiled",
    "scheduled",
    "scheduled_paged",
    "scheduled_products",
)
"""The modules of this package that declare operators and implementations; the last five say what they miss where they
cannot run."""

PRODUCTS = ("linear", "heads_linear", "heads_absorb", "experts_swiglu")
"""The operators that multiply by weights."""

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Platform:
    """What this process computes on. `bf16_matmul`: matrix products are faster in bf16 than in fp32."""

    device: str
    isa: str
    bf16_matmul: bool
    threads: int

    @staticmethod
    def detect(device: str = "cpu") -> Platform:
        """Looks at the machine; `device` is "cpu" or "cuda"."""
        if device == "cpu":
            bf16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
            return Platform("cpu", torch.backends.cpu.get_cpu_capability(), bf16, torch.get_num_threads())
        major, minor = torch.cuda.get_device_capability()
        return Platform("cuda", f"sm_{major}{minor}", True, torch.get_num_threads())


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator. `unavailable(platform)` returns None, or why it cannot run there."""

    operator: str
    name: str
    target: str
    function: Callable[..., Any]
    rank: int
    unavailable: Callable[[Platform], str | None]


@dataclass
class _Entry:
    contract: str
    implementations: dict[str, Implementation] = field(default_factory=dict)


_OPERATORS: dict[str, _Entry] = {}


def operator(function: F) -> F:
    """Declares an operator named after `function`, which is its reference: exact, any device, not fast."""
    name = function.__name__
    reference = Implementation(name, "reference", "any", function, 0, lambda _: None)
    _OPERATORS[name] = _Entry(function.__doc__ or "", {"reference": reference})
    return function


def _same_device(target: str) -> Callable[[Platform], str | None]:
    if target == "any":
        return lambda platform: None
    return lambda platform: None if platform.device == target else f"needs {target}, this is {platform.device}"


def implementation(
    of: str, name: str, target: str, rank: int = 1, unavailable: Callable[[Platform], str | None] | None = None
) -> Callable[[F], F]:
    """Adds `function` to operator `of`; among the valid ones the highest `rank` is chosen."""

    def add(function: F) -> F:
        device = _same_device(target)

        def reason(platform: Platform) -> str | None:
            return device(platform) or (unavailable(platform) if unavailable else None)

        _OPERATORS[of].implementations[name] = Implementation(of, name, target, function, rank, reason)
        return function

    return add


class Operators(SimpleNamespace):
    """The chosen function of every operator, as attributes; `platform` and `chosen` tell what was picked."""

    platform: Platform
    chosen: dict[str, str]

    @property
    def narrow_weights(self) -> bool:
        """Whether products take bf16 and FP8 weights with fp32 activations, so that nothing need be widened."""
        return all(self.chosen[name] == "native" for name in PRODUCTS)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no operator named {name!r}; there are: {', '.join(sorted(_OPERATORS))}")


def _load() -> None:
    for module in MODULES:
        importlib.import_module(f"tilery.ops.{module}")


def _rank(entry: _Entry, platform: Platform) -> list[tuple[Implementation, str | None]]:
    rows = [(impl, impl.unavailable(platform)) for impl in entry.implementations.values()]
    return sorted(rows, key=lambda row: (row[1] is not None, -row[0].rank))


def select(platform: Platform | None = None, overrides: Mapping[str, str] | None = None) -> Operators:
    """Binds every operator to its best valid implementation on `platform`.

    `overrides` maps operator to implementation name; "*" names the default for all that have it here (so `{"*":
    "reference"}` runs everything through the references). Raises `ValueError` for a name that does not exist or
    cannot run here, with the reason.
    """
    _load()
    platform = platform or Platform.detect()
    overrides = dict(overrides or {})
    unknown = [name for name in overrides if name != "*" and name not in _OPERATORS]
    if unknown:
        raise ValueError(f"unknown operator {unknown[0]!r}; there are: {', '.join(sorted(_OPERATORS))}")
    wildcard = overrides.get("*")
    if wildcard is not None:
        named = [entry.implementations[wildcard] for entry in _OPERATORS.values() if wildcard in entry.implementations]
        if not named:
            raise ValueError(f"no operator has an implementation {wildcard!r}")
        if not any(one.target in ("any", platform.device) for one in named):
            raise ValueError(f"no operator has an implementation {wildcard!r} for {platform.device}")
    bound = Operators(platform=platform, chosen={})
    for name, entry in _OPERATORS.items():
        best = _rank(entry, platform)[0][0]
        wanted = overrides.get(name)
        if wanted is None and wildcard in entry.implementations:
            for_this = entry.implementations[str(wildcard)].target in ("any", platform.device)
            wanted = wildcard if for_this else None
        if wanted is not None:
            if wanted not in entry.implementations:
                names = ", ".join(entry.implementations)
                raise ValueError(f"operator {name!r} has no implementation {wanted!r}; it has: {names}")
            best = entry.implementations[wanted]
            if reason := best.unavailable(platform):
                raise ValueError(f"implementation {wanted!r} of {name!r} cannot run here: {reason}")
        setattr(bound, name, best.function)
        bound.chosen[name] = best.name
    return bound


@dataclass(frozen=True)
class ImplInfo:
    name: str
    target: str
    available: bool
    reason: str
    chosen: bool


@dataclass(frozen=True)
class OperatorInfo:
    name: str
    contract: str
    implementations: list[ImplInfo]


def list_operators(platform: Platform | None = None) -> list[OperatorInfo]:
    """Every operator with its implementations, best first, and why each was chosen or rejected."""
    _load()
    platform = platform or Platform.detect()
    infos = []
    for name, entry in sorted(_OPERATORS.items()):
        rows = []
        for position, (impl, reason) in enumerate(_rank(entry, platform)):
            chosen = position == 0
            text = reason or ("the fastest valid one here" if chosen else "valid, but ranked lower")
            rows.append(ImplInfo(impl.name, impl.target, reason is None, text, chosen))
        infos.append(OperatorInfo(name, entry.contract, rows))
    return infos
