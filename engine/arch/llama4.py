"""Llama 4 Scout and Maverick, which also see; here their text model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import llama4_text
from kvasir.engine.config_json import text
from kvasir.engine.spec import Spec

ARCHITECTURES = ("Llama4ForConditionalGeneration",)


def spec(c: Mapping[str, Any]) -> Spec:
    """The facts of its text_config."""
    return llama4_text.spec(text(c, "llama4_text"), ignored=(r"vision_model\.", r"multi_modal_projector\."))
