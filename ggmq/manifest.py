"""Hashes of a model's tensors: made once per file, kept beside the cache, keyed by path, size and mtime."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

from blake3 import blake3

from ggmq.gguf import GGUF

FORMAT = 1


def manifest_folder() -> Path:
    """`$LLAMA_CACHE/ggmq-manifests`, else under `$XDG_CACHE_HOME`, else `~/.cache`."""
    base = os.environ.get("LLAMA_CACHE") or os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ggmq-manifests"


def _identity(g: GGUF) -> str:
    parts = []
    for p in g.paths:
        s = p.stat()
        parts.append([str(p.resolve()), s.st_size, s.st_mtime_ns])
    return json.dumps([FORMAT, parts])


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
    for t in g:
        hashes[t.name] = blake3(g.data(t.name), max_threads=blake3.AUTO).digest()
        if progress is not None:
            progress(t.n_bytes)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=".part-")
        with open(fd, "w") as f:
            json.dump({"identity": identity, "hashes": {n: h.hex() for n, h in hashes.items()}}, f)
        os.replace(name, path)
    return hashes
