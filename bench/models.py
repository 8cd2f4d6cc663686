"""Random-weight models for measuring: the shapes of real ones, bytes from a seeded generator, a vocabulary that loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from tokenizers import pre_tokenizers

from protocol.dtypes import TYPES, GGMLType


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


def write_model(path: Path, mix: str = "Q4_0", shape: Shape = LARGE, seed: int = 1) -> None:
    """Write a GGUF file unless it is there. Norms are ones, matrices are of a type, or of a mix of types."""
    if path.exists():
        return
    rng = np.random.default_rng(seed)
    s = shape
    w = gguf.GGUFWriter(path.with_suffix(".part"), "llama")
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
    kv = s.n_embd // s.n_head * s.n_head_kv

    def matrix(name: str, rows: int, width: int, n_expert: int = 0) -> None:
        type_id = _type_of(name, mix, s.n_layer)
        data = _random_blocks(rng, type_id, rows * max(1, n_expert), width)
        if n_expert:
            data = data.reshape(n_expert, rows, -1)
        raw = None if type_id == GGMLType.F16 else gguf.GGMLQuantizationType(int(type_id))
        w.add_tensor(name, data, raw_dtype=raw)

    matrix("token_embd.weight", s.n_vocab, s.n_embd)
    matrix("output.weight", s.n_vocab, s.n_embd)
    w.add_tensor("output_norm.weight", np.ones(s.n_embd, np.float32))
    for i in range(s.n_layer):
        p = f"blk.{i}."
        w.add_tensor(p + "attn_norm.weight", np.ones(s.n_embd, np.float32))
        w.add_tensor(p + "ffn_norm.weight", np.ones(s.n_embd, np.float32))
        matrix(p + "attn_q.weight", s.n_embd, s.n_embd)
        matrix(p + "attn_k.weight", kv, s.n_embd)
        matrix(p + "attn_v.weight", kv, s.n_embd)
        matrix(p + "attn_output.weight", s.n_embd, s.n_embd)
        if s.n_expert:
            router = rng.standard_normal((s.n_expert, s.n_embd), np.float32) / np.sqrt(s.n_embd)
            w.add_tensor(p + "ffn_gate_inp.weight", router.astype(np.float32))
            matrix(p + "ffn_gate_exps.weight", s.n_ff, s.n_embd, s.n_expert)
            matrix(p + "ffn_up_exps.weight", s.n_ff, s.n_embd, s.n_expert)
            matrix(p + "ffn_down_exps.weight", s.n_embd, s.n_ff, s.n_expert)
            continue
        matrix(p + "ffn_gate.weight", s.n_ff, s.n_embd)
        matrix(p + "ffn_up.weight", s.n_ff, s.n_embd)
        matrix(p + "ffn_down.weight", s.n_embd, s.n_ff)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    path.with_suffix(".part").rename(path)
