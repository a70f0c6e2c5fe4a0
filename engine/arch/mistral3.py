"""Mistral Small 3.1 and later, Ministral 3: a Mistral that also sees; here its text model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import mistral
from kvasir.engine.config_json import text
from kvasir.engine.spec import Spec

ARCHITECTURES = ("Mistral3ForConditionalGeneration",)


def spec(c: Mapping[str, Any]) -> Spec:
    """The facts of its text_config."""
    return mistral.spec(text(c, "mistral", "ministral3"), ignored=(r"vision_tower\.", r"multi_modal_projector\."))
