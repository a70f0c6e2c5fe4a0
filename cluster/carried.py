"""Text that a client keeps for us and sends back, where a dialect has a field for it that only its writer can read.

It hides nothing: what it says is the client's own conversation.
"""

from __future__ import annotations

import base64
import binascii

_MARK = "kvasir1."


def carry(text: str) -> str:
    """As it is given out."""
    return _MARK + base64.urlsafe_b64encode(text.encode()).decode()


def carried(given: str) -> str | None:
    """The text again; None: another server wrote it."""
    if not given.startswith(_MARK):
        return None
    try:
        return base64.urlsafe_b64decode(given[len(_MARK) :].encode()).decode()
    except (binascii.Error, ValueError):
        return None
