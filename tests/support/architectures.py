"""Random models of every architecture with the tensors that llama.cpp expects, in sizes and options of one's choice."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np


@dataclass(frozen=True)
class Variant:
    """One model. `keys` are metadata after the architecture's name; floats and ints by their Python types."""

    arch: str
    n_embd: int = 64
    n_layer: int = 4
    n_head: int = 4
    n_head_kv: int = 2
    d: int = 16
    n_ff: int = 96
    n_expert: int = 0
    n_used: int = 0
    fused: bool = False
    bias: bool = False
    tied: bool = False
    keys: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    def __str__(self) -> str:
        return f"{self.arch}{'-' + self.name if self.name else ''}"


V = Variant
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
VARIANTS = [
    V("llama", n_head_kv=1), V("llama", d=24, tied=True, name="wide-heads"), V("llama", n_expert=8, n_used=3, name="moe"),
    V("llama", keys={"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, name="linear"),
    V("llama", keys=YARN, name="yarn"), V("llama", bias=True, name="biases"),
    V("mistral3", keys={**YARN, "rope.scaling.yarn_log_multiplier": 1.0}, name="yarn"),
    V("mistral3", keys={"attention.temperature_scale": 0.1, "rope.scaling.original_context_length": 16}, name="warm"),
    V("qwen2", bias=True, keys={"rope.freq_base": 1e6}), V("qwen3", d=32, keys={"rope.freq_base": 1e6}),
    V("qwen3moe", n_expert=16, n_used=4),
    V("gemma2", n_layer=5, keys={"attention.sliding_window": 7, "attn_logit_softcapping": 50.0,
                                 "final_logit_softcapping": 30.0}),
    V("gemma3", n_layer=8, keys={"attention.sliding_window": 5, "rope.freq_base": 1e6, "rope.scaling.type": "linear",
                                 "rope.scaling.factor": 8.0}),
    V("phi3", fused=True, n_head_kv=4), V("phi3", fused=True, name="gqa"),
    V("smollm3", n_layer=9), V("olmo2", n_head_kv=4),
    V("granite", keys={"embedding_scale": 12.0, "residual_scale": 0.22, "attention.scale": 0.0156, "logit_scale": 8.0}),
    V("gpt2", fused=True, bias=True, n_head_kv=4),
    V("gpt-oss", n_expert=8, n_used=2, bias=True, n_layer=5, keys={"attention.sliding_window": 6, **YARN}),
]  # fmt: skip
NORMED_QK = {"qwen3", "qwen3moe", "gemma3", "olmo2"}
N_VOCAB = 300


def write(path: Path, v: Variant, seed: int = 1) -> Path:
    rng = np.random.default_rng(seed)
    w = gguf.GGUFWriter(path, v.arch)
    w.add_context_length(128)
    w.add_embedding_length(v.n_embd)
    w.add_block_count(v.n_layer)
    w.add_feed_forward_length(v.n_ff)
    w.add_head_count(v.n_head)
    w.add_head_count_kv(v.n_head_kv)
    w.add_key_length(v.d)
    w.add_value_length(v.d)
    if "rope.dimension_count" not in v.keys:
        w.add_rope_dimension_count(v.d)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_layer_norm_eps(1e-5)
    w.add_vocab_size(N_VOCAB)
    if v.n_expert:
        w.add_expert_count(v.n_expert)
        w.add_expert_used_count(v.n_used)
        w.add_expert_feed_forward_length(v.n_ff)
    for name, value in v.keys.items():
        add = {float: w.add_float32, int: w.add_uint32, str: w.add_string, bool: w.add_bool}[type(value)]
        add(f"{v.arch}.{name}", value)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list([f"tok{i}" for i in range(N_VOCAB)])
    w.add_token_types([1] * N_VOCAB)
    w.add_token_merges(["t o"])
    w.add_eos_token_id(0)

    def matrix(name: str, *shape: int, bias: bool = False) -> None:
        data = rng.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(shape[-1]))
        w.add_tensor(name + ".weight", data)
        if bias:
            w.add_tensor(name + ".bias", (rng.standard_normal(shape[:-1]) * 0.1).astype(np.float32))

    def norm(name: str, n: int, bias: bool = False) -> None:
        w.add_tensor(name + ".weight", (1 + 0.1 * rng.standard_normal(n)).astype(np.float32))
        if bias:
            w.add_tensor(name + ".bias", (0.1 * rng.standard_normal(n)).astype(np.float32))

    gpt2, gemma = v.arch == "gpt2", v.arch.startswith("gemma")
    matrix("token_embd", N_VOCAB, v.n_embd)
    if gpt2:
        matrix("position_embd", 128, v.n_embd)
    if not (v.tied or gemma):
        matrix("output", N_VOCAB, v.n_embd)
    norm("output_norm", v.n_embd, gpt2)
    q, kv = v.n_head * v.d, v.n_head_kv * v.d
    for i in range(v.n_layer):
        p = f"blk.{i}."
        post = v.arch in ("gemma2", "gemma3", "olmo2")
        if v.arch != "olmo2":
            norm(p + "attn_norm", v.n_embd, gpt2)
            norm(p + ("post_attention_norm" if v.arch == "gpt-oss" else "ffn_norm"), v.n_embd, gpt2)
        if post:
            norm(p + "post_attention_norm", v.n_embd)
            norm(p + "post_ffw_norm", v.n_embd)
        if v.fused:
            matrix(p + "attn_qkv", q + 2 * kv, v.n_embd, bias=v.bias)
        else:
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                matrix(p + f"attn_{name}", rows, v.n_embd, bias=v.bias)
        if v.arch in NORMED_QK:
            norm(p + "attn_q_norm", q if v.arch == "olmo2" else v.d)
            norm(p + "attn_k_norm", kv if v.arch == "olmo2" else v.d)
        matrix(p + "attn_output", v.n_embd, q, bias=v.bias and v.arch != "qwen2")
        if v.arch == "gpt-oss":
            w.add_tensor(p + "attn_sinks.weight", rng.standard_normal(v.n_head).astype(np.float32))
        if v.n_expert:
            oss = v.arch == "gpt-oss"
            matrix(p + "ffn_gate_inp", v.n_expert, v.n_embd, bias=oss)
            matrix(p + "ffn_gate_exps", v.n_expert, v.n_ff, v.n_embd, bias=oss)
            matrix(p + "ffn_up_exps", v.n_expert, v.n_ff, v.n_embd, bias=oss)
            matrix(p + "ffn_down_exps", v.n_expert, v.n_embd, v.n_ff, bias=oss)
        elif v.arch == "phi3":
            matrix(p + "ffn_up", 2 * v.n_ff, v.n_embd)
            matrix(p + "ffn_down", v.n_embd, v.n_ff)
        else:
            if not gpt2:
                matrix(p + "ffn_gate", v.n_ff, v.n_embd)
            matrix(p + "ffn_up", v.n_ff, v.n_embd, bias=gpt2)
            matrix(p + "ffn_down", v.n_embd, v.n_ff, bias=gpt2)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path
