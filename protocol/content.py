"""What a buffer of weights holds, as one name: both ends make it of what they know, and so agree without sending it.

A worker makes it of tensors whose bytes it has verified itself. Source of the hash: BLAKE2b, RFC 7693.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from typing import NamedTuple

SIZE = struct.Struct("<Q")
RECORD = struct.Struct("<QQQ4Q32s")
"""offset, n_bytes, type, ne[4], hash."""


class Part(NamedTuple):
    """A tensor in a buffer. Units: bytes. `hash`: BLAKE3 of its bytes as the model file has them."""

    offset: int
    n_bytes: int
    type: int
    ne: tuple[int, int, int, int]
    hash: bytes


def content_name(n_bytes: int, parts: Iterable[Part]) -> bytes:
    """The 32-byte name of a buffer of `n_bytes` that holds these tensors, in whatever order they are told."""
    name = hashlib.blake2b(SIZE.pack(n_bytes), digest_size=32)
    for p in sorted(parts):
        name.update(RECORD.pack(p.offset, p.n_bytes, p.type, *p.ne, p.hash))
    return name.digest()
