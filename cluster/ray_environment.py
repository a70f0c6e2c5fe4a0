"""Imported before Ray, that reads its environment once: our defaults; what the user has set stays."""

from __future__ import annotations

import os

DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",  # our processes' lines reach the terminal as they are
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",  # a SIGTERM is no failure: no stack dump
    "RAY_DEDUP_LOGS": "0",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",  # nothing is gained by draining a group that hangs
}

for name, value in DEFAULTS.items():
    os.environ.setdefault(name, value)
