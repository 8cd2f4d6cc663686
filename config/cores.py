"""Processor cores, as far as this process may use them."""

from __future__ import annotations

import os


def n_cores() -> int:
    """CPUs that the system lets this process run on; all of the host where it does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
