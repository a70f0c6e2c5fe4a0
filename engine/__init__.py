"""One replica of Kvasir: `from kvasir.engine import LLM, AsyncLLM, SamplingParams`.

`LLM` and `AsyncLLM` are loaded on first use: a gateway imports this package without paying for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvasir.engine.config import EngineConfig
from kvasir.engine.request import Request, SamplingParams

if TYPE_CHECKING:
    from kvasir.engine.llm import LLM, AsyncLLM

__all__ = ["LLM", "AsyncLLM", "EngineConfig", "Request", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "AsyncLLM"):
        from kvasir.engine import llm

        return getattr(llm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
