"""The marks by which families of models tell their thoughts from their answers."""

from __future__ import annotations

from collections.abc import Mapping

from kvasir.cluster.answer_parts import ThoughtFormat

THOUGHT_FORMATS: Mapping[str, ThoughtFormat] = {
    form.name: form
    for form in (
        ThoughtFormat("gemma4", ("<|channel>thought\n", "<|channel>"), "<channel|>"),
        ThoughtFormat("mistral", ("[THINK]",), "[/THINK]"),
        ThoughtFormat("seed_oss", ("<seed:think>",), "</seed:think>"),
        ThoughtFormat("cohere", ("<|START_THINKING|>",), "<|END_THINKING|>"),
        ThoughtFormat("granite", ("Here is my thought process:",), "Here is my response:"),
        ThoughtFormat("think", ("<think>",), "</think>"),
        ThoughtFormat("deepseek_r1", ("<think>",), "</think>", always=True),
    )
}
"""The first whose end mark a chat template holds is what it teaches."""

THOUGHT_ALIASES = {
    "qwen3": "think",
    "deepseek_v3": "think",
    "glm45": "think",
    "olmo3": "deepseek_r1",
    "minimax_m2": "deepseek_r1",
    "nemotron": "deepseek_r1",
    "step3": "deepseek_r1",
}
