"""DeepSeek V3 and R1: V2 with sigmoid scores, and a bias that balances the choice of experts (arXiv:2412.19437)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvasir.engine.arch import deepseek_v2
from kvasir.engine.config_json import only
from kvasir.engine.spec import Spec

ARCHITECTURES = ("DeepseekV3ForCausalLM", "DeepseekV3Model", "DeepseekV3ForSequenceClassification")


def spec(c: Mapping[str, Any]) -> Spec:
    """A group is as good as its best two experts."""
    only(c, "topk_method", "noaux_tc")
    only(c, "scoring_func", "sigmoid")
    return deepseek_v2.build(
        c,
        scoring="sigmoid",
        groups=c.get("n_group") or 1,
        groups_used=c.get("topk_group") or 1,
        group_score="top2",
        renormalise=bool(c.get("norm_topk_prob", True)),
        choice_bias=True,
    )
