"""GGUF files made byte by byte: valid ones of any architecture, and broken ones with one thing wrong."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10


def text(s: str | bytes) -> bytes:
    raw = s.encode() if isinstance(s, str) else s
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, ne: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack("<I", len(ne)) + struct.pack(f"<{len(ne)}Q", *ne) + struct.pack("<IQ", kind, offset)


def file(
    keys: list[bytes], tensors: list[bytes], data: bytes = b"", *, magic: bytes = b"GGUF", version: int = 3,
    n_tensors: int | None = None, n_keys: int | None = None,
) -> bytes:  # fmt: skip
    head = magic + struct.pack("<IQQ", version, len(tensors) if n_tensors is None else n_tensors,
                               len(keys) if n_keys is None else n_keys)  # fmt: skip
    body = head + b"".join(keys) + b"".join(tensors)
    return body + bytes(-len(body) % 32) + data


KEYS = [key("general.architecture", STRING, text("llama")), key("a.u32", U32, struct.pack("<I", 7)),
        key("a.list", ARRAY, struct.pack("<IQ", STRING, 2) + text("x") + text("yz"))]  # fmt: skip
TENSORS = [tensor("w", [32, 2]), tensor("v", [4], 0, 256)]
VALID = file(KEYS, TENSORS, bytes(256 + 16))


def tiny_model(path: Path, arch: str, seed: int = 1, n_layer: int = 3, n_ff: int = 96, **metadata: Any) -> Path:
    """A random F32 model of an architecture with the llama tensor names, and no vocabulary. Some of its weights have
    256 n_ff bytes."""
    rng = np.random.default_rng(seed)
    n_embd, n_head, n_kv, d, n_vocab = 64, 4, 2, 16, 50
    w = gguf.GGUFWriter(path, arch)
    w.add_context_length(128)
    w.add_embedding_length(n_embd)
    w.add_block_count(n_layer)
    w.add_feed_forward_length(n_ff)
    w.add_head_count(n_head)
    w.add_head_count_kv(n_kv)
    w.add_layer_norm_rms_eps(1e-5)
    for name, value in metadata.items():
        w.add_uint32(f"{arch}.{name.replace('__', '.')}", value)

    def add(name: str, *shape: int) -> None:
        w.add_tensor(name, (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32))

    add("token_embd.weight", n_vocab, n_embd)
    add("output.weight", n_vocab, n_embd)
    w.add_tensor("output_norm.weight", np.ones(n_embd, np.float32))
    for i in range(n_layer):
        p = f"blk.{i}."
        w.add_tensor(p + "attn_norm.weight", np.ones(n_embd, np.float32))
        w.add_tensor(p + "ffn_norm.weight", np.ones(n_embd, np.float32))
        add(p + "attn_q.weight", n_head * d, n_embd)
        add(p + "attn_k.weight", n_kv * d, n_embd)
        add(p + "attn_v.weight", n_kv * d, n_embd)
        add(p + "attn_output.weight", n_embd, n_head * d)
        add(p + "ffn_gate.weight", n_ff, n_embd)
        add(p + "ffn_up.weight", n_ff, n_embd)
        add(p + "ffn_down.weight", n_embd, n_ff)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path
