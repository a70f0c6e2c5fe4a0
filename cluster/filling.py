"""Prompts of models that fill gaps: what stands before the gap, what stands behind it, then the answer."""

from __future__ import annotations

from kvasir.cluster.call import Text
from kvasir.engine.errors import ClientError
from kvasir.engine.tokenizer import Tokenizer

_FILLING = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<PRE>", "<SUF>", "<MID>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<|fim▁begin|>", "<|fim▁hole|>", "<|fim▁end|>"),
)
"""Tokens of such models: before the prompt, before the suffix, before the answer. Qwen and CodeGemma, StarCoder, Code Llama
(twice), DeepSeek."""


def filling_tokens(tokenizer: Tokenizer | None) -> tuple[str, str, str] | None:
    """The model's; None when it wasn't trained to fill gaps."""
    known = (words for words in _FILLING if tokenizer and all(tokenizer.token_id(word) is not None for word in words))
    return next(known, None)


def filled(prompt: Text, tokenizer: Tokenizer, model: str) -> str:
    """The whole text that the model reads. ClientError when it can't do that."""
    if not prompt.suffix:
        return prompt.text
    tokens = filling_tokens(tokenizer)
    if tokens is None:
        raise ClientError(f"model {model!r} does not support insert: it has no tokens for it", param="suffix")
    before, behind, middle = tokens
    return f"{before}{prompt.text}{behind}{prompt.suffix}{middle}"
