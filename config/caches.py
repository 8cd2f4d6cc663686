"""Where what can be made again is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """`$LLAMA_CACHE/NAME`, else `$XDG_CACHE_HOME/NAME`, else `~/.cache/NAME`."""
    base = os.environ.get("LLAMA_CACHE") or os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / name
