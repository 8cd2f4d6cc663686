"""Whether tests can have a GPU."""

from __future__ import annotations

from functools import lru_cache

from workers.devices.cuda.finding import ask_cupy, ask_driver, reason

NAME = "CUDA0"


@lru_cache
def missing() -> str:
    """Why there is none; empty when there is one. CuPy is imported only where a driver shows a GPU."""
    driver = ask_driver()
    if not driver.capabilities:
        return f"no GPU: {driver.trouble or 'the driver shows none'}"
    return reason(NAME, ask_cupy(), driver)
