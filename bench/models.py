"""Random-weight models for measuring: the shapes of real ones, bytes from a seeded generator, a vocabulary that loads."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from tokenizers import pre_tokenizers

from protocol.dtypes import TYPES, GGMLType, row_bytes

ALIGN = 32
"""Where a GGUF file's tensors begin."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A llama-shaped model; with `n_expert` its layers have experts as Mixtral's."""

    n_embd: int = 2048
    n_layer: int = 16
    n_head: int = 32
    n_head_kv: int = 8
    n_ff: int = 5632
    n_vocab: int = 32_000
    n_ctx: int = 4096
    n_expert: int = 0
    n_expert_used: int = 0


LARGE = Shape()
"""0.85 G parameters."""
EXPERTS = Shape(n_embd=1024, n_layer=12, n_head=16, n_head_kv=4, n_ff=768, n_expert=16, n_expert_used=4)
"""0.55 G parameters, of which a token uses 0.22 G."""


def _random_blocks(rng: np.random.Generator, type_id: GGMLType, rows: int, width: int) -> np.ndarray:
    """Rows of blocks with random quants and scales that keep activations near 1."""
    info = TYPES[type_id]
    n = rows * width // info.block
    if type_id == GGMLType.F16:
        return (rng.standard_normal((rows, width), np.float32) / np.sqrt(width)).astype(np.float16)
    raw = rng.integers(0, 256, (n, info.bytes), np.uint8)
    spread = {GGMLType.Q4_0: 4.6, GGMLType.Q8_0: 74.0, GGMLType.Q4_K: 290.0, GGMLType.Q6_K: 1370.0}[type_id]
    at = info.bytes - 2 if type_id == GGMLType.Q6_K else 0
    raw[:, at : at + 2] = np.array([1 / (spread * np.sqrt(width))], np.float16).view(np.uint8)
    if type_id == GGMLType.Q4_K:
        raw[:, 2:4] = np.array([7.5 / (spread * np.sqrt(width))], np.float16).view(np.uint8)
        raw[:, 8:12] = raw[:, 4:8]  # minima as large as scales, so that a block's mean is near zero
    return raw.reshape(rows, width // info.block * info.bytes)


Q4_K_M = "Q4_K_M"
"""A mix as files that people download have it: Q6_K where it matters most, Q4_K elsewhere."""


def _type_of(name: str, mix: str, n_layer: int) -> GGMLType:
    """The type of a matrix in a mix; the mix of one type has the type's name."""
    if mix != Q4_K_M:
        return GGMLType[mix]
    if name == "output.weight":
        return GGMLType.Q6_K
    if name.endswith(("attn_v.weight", "ffn_down.weight")):
        il = int(name.split(".")[1])
        eighth = n_layer // 8
        if il < eighth or il >= 7 * eighth or (il - eighth) % 3 == 2:
            return GGMLType.Q6_K
    return GGMLType.Q4_K


def tensors(shape: Shape, mix: str) -> Iterator[tuple[str, GGMLType, tuple[int, ...]]]:
    """Name, type and shape of each, in NumPy's order. F32 are norms and routers."""
    s, kv = shape, shape.n_embd // shape.n_head * shape.n_head_kv

    def matrix(name: str, *shape: int) -> tuple[str, GGMLType, tuple[int, ...]]:
        return name, _type_of(name, mix, s.n_layer), shape

    yield matrix("token_embd.weight", s.n_vocab, s.n_embd)
    yield matrix("output.weight", s.n_vocab, s.n_embd)
    yield "output_norm.weight", GGMLType.F32, (s.n_embd,)
    for i in range(s.n_layer):
        p = f"blk.{i}."
        yield p + "attn_norm.weight", GGMLType.F32, (s.n_embd,)
        yield p + "ffn_norm.weight", GGMLType.F32, (s.n_embd,)
        yield matrix(p + "attn_q.weight", s.n_embd, s.n_embd)
        yield matrix(p + "attn_k.weight", kv, s.n_embd)
        yield matrix(p + "attn_v.weight", kv, s.n_embd)
        yield matrix(p + "attn_output.weight", s.n_embd, s.n_embd)
        experts, end = ((), "") if not s.n_expert else ((s.n_expert,), "_exps")
        if s.n_expert:
            yield p + "ffn_gate_inp.weight", GGMLType.F32, (s.n_expert, s.n_embd)
        yield matrix(f"{p}ffn_gate{end}.weight", *experts, s.n_ff, s.n_embd)
        yield matrix(f"{p}ffn_up{end}.weight", *experts, s.n_ff, s.n_embd)
        yield matrix(f"{p}ffn_down{end}.weight", *experts, s.n_embd, s.n_ff)


def weights(rng: np.random.Generator, type_id: GGMLType, shape: tuple[int, ...]) -> np.ndarray:
    """Random weights as GGUF has them; norms are ones."""
    if type_id != GGMLType.F32:
        data = _random_blocks(rng, type_id, math.prod(shape[:-1]), shape[-1])
        return data if len(shape) == 2 else data.reshape(*shape[:-1], -1)
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return (rng.standard_normal(shape, np.float32) / np.sqrt(shape[-1])).astype(np.float32)


def write_model(path: Path, mix: str = "Q4_0", shape: Shape = LARGE, seed: int = 1) -> None:
    """Write a GGUF file unless it is there. Norms are ones, matrices are of a type, or of a mix of types."""
    if path.exists():
        return
    rng = np.random.default_rng(seed)
    w = _begun(path.with_suffix(".part"), shape)
    for name, type_id, ne in tensors(shape, mix):
        plain = type_id in (GGMLType.F32, GGMLType.F16)
        w.add_tensor(name, weights(rng, type_id, ne), raw_dtype=None if plain else gguf.GGMLQuantizationType(int(type_id)))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    path.with_suffix(".part").rename(path)


def write_outline(path: Path, mix: str, shape: Shape) -> None:
    """The same file with zeros for weights, which take no room on the disk."""
    w = _begun(path, shape)
    n_bytes = 0
    for name, type_id, ne in tensors(shape, mix):
        size = math.prod(ne[:-1]) * row_bytes(type_id, ne[-1])
        plain = {GGMLType.F32: np.float32, GGMLType.F16: np.float16}.get(type_id)
        raw = None if plain else gguf.GGMLQuantizationType(int(type_id))
        bytes_of = ne if plain else (*ne[:-1], row_bytes(type_id, ne[-1]))
        w.add_tensor_info(name, bytes_of, np.dtype(plain or np.uint8), size, raw)
        n_bytes += -(-size // ALIGN) * ALIGN
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    w.close()
    os.truncate(path, -(-path.stat().st_size // ALIGN) * ALIGN + n_bytes)


def _begun(path: Path, s: Shape) -> gguf.GGUFWriter:
    """A writer that has the keys."""
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(s.n_ctx)
    w.add_embedding_length(s.n_embd)
    w.add_block_count(s.n_layer)
    w.add_feed_forward_length(s.n_ff)
    w.add_head_count(s.n_head)
    w.add_head_count_kv(s.n_head_kv)
    w.add_rope_dimension_count(s.n_embd // s.n_head)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(s.n_vocab)
    if s.n_expert:
        w.add_expert_count(s.n_expert)
        w.add_expert_used_count(s.n_expert_used)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list([*alphabet, *(f"tok{i}" for i in range(s.n_vocab - len(alphabet)))])
    w.add_token_types([int(gguf.TokenType.NORMAL)] * s.n_vocab)
    w.add_token_merges(["t o"])
    w.add_eos_token_id(0)
    return w
