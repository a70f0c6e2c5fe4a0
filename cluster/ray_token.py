"""The token that guards the ports of a Ray of our own: nobody else on the machine may read it."""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path


def keep_private() -> None:
    """Ray writes a new token where every user of the machine can read it: write it first, for us alone, and close one that
    lies open since an earlier start. A token or a mode of the user's own (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH,
    RAY_AUTH_MODE) is his business."""
    own = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if own or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    path = Path.home() / ".ray" / "auth_token"  # where Ray looks for it
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_CREAT | os.O_RDWR, 0o600), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # of two that start at once one writes
            os.fchmod(file.fileno(), 0o600)
            if not file.read():
                file.write(secrets.token_hex(32))
    except OSError:  # such as in a home that can't be written: Ray's processes have their environment from us
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
