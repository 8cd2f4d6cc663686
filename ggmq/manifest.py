"""Hashes of a model's tensors: made once per file, kept beside the cache, keyed by path, size and mtime."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from pathlib import Path

from blake3 import blake3

from config.caches import cache_folder
from ggmq.gguf import GGUF, TensorInfo
from protocol.errors import FormatError

FORMAT = 1
PIECE_BYTES = 1 << 20


def manifest_folder() -> Path:
    return cache_folder("ggmq-manifests")


def _identity(g: GGUF) -> str:
    parts = []
    for p in g.paths:
        s = p.stat()
        parts.append([str(p.resolve()), s.st_size, s.st_mtime_ns])
    return json.dumps([FORMAT, parts])


def _hash(g: GGUF, t: TensorInfo) -> bytes:
    """BLAKE3 of a tensor, read in pieces that stay in the processor's cache: that is faster than through a map."""
    digest, at = blake3(), 0
    room = memoryview(bytearray(min(t.n_bytes, PIECE_BYTES)))
    with open(g.paths[t.part], "rb", buffering=0) as f:
        while at < t.n_bytes:
            n = os.preadv(f.fileno(), [room[: t.n_bytes - at]], t.offset + at)
            if not n:
                where = f"{g.paths[t.part].name}: byte {t.offset + at}"
                raise FormatError(f"{where}: the file ends here; it changed while it was read")
            digest.update(room[:n])
            at += n
    return digest.digest()


def tensor_hashes(g: GGUF, progress: Callable[[int], None] | None = None) -> dict[str, bytes]:
    """BLAKE3 of every tensor, from the manifest if the file has not changed since, else computed with all cores.

    A manifest that cannot be read or written costs time, nothing else: workers verify what they get.
    """
    identity = _identity(g)
    path = manifest_folder() / (blake2b(identity.encode(), digest_size=16).hexdigest() + ".json")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        stored = json.loads(path.read_text())
        hashes = {name: bytes.fromhex(h) for name, h in stored["hashes"].items()}
        if stored["identity"] == identity and hashes.keys() == g.tensors.keys():
            return hashes
    hashes = {}
    n_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(n_threads) as pool:
        for t, digest in zip(g, pool.map(partial(_hash, g), g), strict=True):
            hashes[t.name] = digest
            if progress is not None:
                progress(t.n_bytes)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=".part-")
        with open(fd, "w") as f:
            json.dump({"identity": identity, "hashes": {n: h.hex() for n, h in hashes.items()}}, f)
        os.replace(name, path)
    return hashes
