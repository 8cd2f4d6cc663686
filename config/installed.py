"""How this installation's own programs are started: as they are here, whatever the folder holds in which a user works."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def module_command(module: str) -> list[str]:
    """What runs one of our modules. `-P`: a `protocol.py` in the current folder is none of ours."""
    return [sys.executable, "-P", "-m", module]


def module_environment() -> dict[str, str]:
    """The environment of a process that is to find this installation's packages."""
    root = str(Path(__file__).resolve().parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)}
