"""One replica of Kvasir: `from kvasir.engine import LLM, AsyncLLM, PoolingParams, SamplingParams`.

`LLM` and `AsyncLLM` are loaded on first use: a gateway imports this package without paying for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvasir.engine.config import EngineConfig
from kvasir.engine.request import PoolingParams, Request, SamplingParams, StructuredOutput

if TYPE_CHECKING:
    from kvasir.engine.async_llm import AsyncLLM
    from kvasir.engine.entry_points import BeamSearchParams
    from kvasir.engine.llm import LLM

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "EngineConfig",
    "PoolingParams",
    "Request",
    "SamplingParams",
    "StructuredOutput",
]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from kvasir.engine.llm import LLM

        return LLM
    if name == "AsyncLLM":
        from kvasir.engine.async_llm import AsyncLLM

        return AsyncLLM
    if name == "BeamSearchParams":
        from kvasir.engine.entry_points import BeamSearchParams

        return BeamSearchParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
