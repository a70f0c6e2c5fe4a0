"""How much is drawn at random."""

from __future__ import annotations

import os


def examples(count: int) -> int:
    """So many cases in every run; KVASIR_FUZZ_EXAMPLES (`make fuzz` sets it) when that is more."""
    return max(count, int(os.environ.get("KVASIR_FUZZ_EXAMPLES", "0")))
