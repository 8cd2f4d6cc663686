"""Where the optional fixtures lie, and small things that many tests say."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from pathlib import Path

import numpy as np
import numpy.typing as npt
from blake3 import blake3

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("GGMQ_FIXTURES", ROOT.parent / "shared"))
BUNDLED = ROOT / "ggmq" / "data" / "stories.gguf"

MODELS = sorted(p.name for p in (SHARED / "models").glob("*.gguf"))
OPS = sorted(p.name for p in (SHARED / "ops").glob("*.msgpack"))
VOCABULARIES = sorted(p.name for p in (SHARED / "vocab").glob("*.gguf"))


def free_port() -> int:
    """A TCP port of this host that nobody listens on, below those that the system gives to connections: it stays free while
    a test's own process is started, killed and started again on it."""
    while True:
        port = random.randrange(10_000, 32_768)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def content_hash(data: bytes) -> bytes:
    """What names a weight of these bytes."""
    return blake3(data).digest()


def nmse(got: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """Sum of squared differences over sum of squares."""
    a, b = got.astype(np.float64), expected.astype(np.float64)
    return float(((a - b) ** 2).sum() / (b**2).sum())
