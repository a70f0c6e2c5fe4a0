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
        ThoughtFormat("minimax_m3", ("<mm:think>",), "</mm:think>"),
        ThoughtFormat("longcat", ("<longcat_think>",), "</longcat_think>"),
        ThoughtFormat("apertus", ("<|inner_prefix|>",), "<|inner_suffix|>"),
        ThoughtFormat("apriel", ("Here are my reasoning steps:\n",), "[BEGIN FINAL RESPONSE]"),
        ThoughtFormat("think", ("<think>",), "</think>"),
        ThoughtFormat("deepseek_r1", ("<think>",), "</think>", always=True),
    )
}
"""The first whose end mark a chat template holds is what it teaches."""

THOUGHT_ALIASES = {
    **dict.fromkeys(
        ("qwen3", "deepseek_v3", "deepseek_v4", "deepseek_v41", "glm45", "holo2", "hunyuan_a13b", "hy_v3", "kimi_k2", "mimo",
         "poolside_v1", "solar_open2"), "think",
    ),
    **dict.fromkeys(
        ("olmo3", "minimax_m2", "nemotron", "nemotron_v3", "step3", "step3p5", "ernie45"), "deepseek_r1",
    ),
    "cohere_command3": "cohere",
    "cohere_command4": "cohere",
    "openai_gptoss": "openai",
}  # fmt: skip
