"""Tilery serves very large sparse mixture-of-experts models.

`tilery.LLM(model).generate(prompts, tilery.SamplingParams(...))` runs a model in this process; `tilery serve` puts the
same engine behind an OpenAI-compatible API. Importing this package imports neither torch nor a model: both come with
the first use of `LLM`.
"""

from typing import TYPE_CHECKING

from tilery.engine.messages import SamplingParams, StructuredOutput

if TYPE_CHECKING:
    from tilery.engine.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "StructuredOutput", "__version__"]


def __getattr__(name: str) -> object:
    if name == "LLM":
        from tilery.engine.llm import LLM

        return LLM
    raise AttributeError(f"module 'tilery' has no attribute {name!r}")
