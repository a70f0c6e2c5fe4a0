"""Cores that this process has."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may use, by its affinity and its container's quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    limit, period = quota.read_text().split() if quota.exists() else ("max", "1")
    return cores if limit == "max" else max(1, min(cores, int(limit) // int(period)))


def binding() -> str:
    """How OpenMP is told to bind threads to cores, as NAME=value; empty: it isn't, and the system moves them."""
    told = ((name, os.environ.get(name, "")) for name in ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PROC_BIND"))
    return next((f"{name}={value}" for name, value in told if value and value.lower() != "false"), "")
