"""Gemma 3 of 4B and more, which also sees; here its text model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import gemma3_text
from kvasir.engine.config_json import text
from kvasir.engine.spec import Spec

ARCHITECTURES = ("Gemma3ForConditionalGeneration",)


def spec(c: Mapping[str, Any]) -> Spec:
    """The facts of its text_config."""
    return gemma3_text.spec(text(c, "gemma3_text"), ignored=(r"vision_tower\.", r"multi_modal_projector\."))
