"""Random models of every architecture as GGUF files: what they must hold, what they may, and what they should not.

`base` makes the least that an architecture needs. `varied` adds optional tensors, keys present and absent, and with some
luck something odd. Nothing here decides what is right: a test says so, or llama.cpp does (tests/peer/models.py).
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

F32, F16, BF16 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16
Array = npt.NDArray[np.float32]
ARCHS = ("llama", "mistral3", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3", "smollm3", "olmo2", "granite",
         "gpt2", "gpt-oss", "mamba2")  # fmt: skip
EXPERTS = ("llama", "mistral3", "granite", "qwen3moe", "gpt-oss")
"""Those that may have experts; the last two always do."""
NORMED_QK = ("qwen3", "qwen3moe", "gemma3", "olmo2")
WHOLE_WIDTH = ("qwen2", "phi3", "olmo2", "gpt2")
"""Those whose heads are as wide together as the model."""


@dataclass
class Model:
    """A model that can be written. `keys` stand after the architecture's name; `tensors` have NumPy's order.

    Attributes:
        types: of tensors that are not float32.
        done: in words, what is unusual about it.
    """

    arch: str
    keys: dict[str, Any]
    tensors: dict[str, Array]
    types: dict[str, gguf.GGMLQuantizationType] = field(default_factory=dict)
    n_vocab: int = 0
    done: list[str] = field(default_factory=list)

    def copy(self) -> Model:
        return copy.deepcopy(self)

    def without(self, *keys: str) -> Model:
        new = self.copy()
        for key in keys:
            new.keys.pop(key, None)
        return new

    def having(self, **keys: Any) -> Model:
        """With other keys; `__` stands for a dot."""
        new = self.copy()
        new.keys |= {name.replace("__", "."): value for name, value in keys.items()}
        return new


def numbered(seed: int, number: int, archs: Sequence[str] = ARCHS) -> tuple[Model, random.Random]:
    """The same model for the same numbers, and what goes on at random from there."""
    rng = random.Random(f"{seed} {number}")
    return varied(archs[number % len(archs)], rng), rng


def fingerprint(m: Model) -> bytes:
    """16 bytes that tell whether another NumPy makes the same model."""
    h = hashlib.blake2b(repr((m.arch, m.keys, m.types, m.n_vocab)).encode(), digest_size=16)
    for name, data in m.tensors.items():
        h.update(name.encode() + repr(data.shape).encode() + np.ascontiguousarray(data).tobytes())
    return h.digest()


def write(path: Path, m: Model) -> Path:
    w = gguf.GGUFWriter(path, m.arch)
    for name, value in m.keys.items():
        key = f"{m.arch}.{name}"
        if isinstance(value, bool):
            w.add_bool(key, value)
        elif isinstance(value, int):
            (w.add_uint32 if value >= 0 else w.add_int32)(key, value)
        elif isinstance(value, float):
            w.add_float32(key, value)
        elif isinstance(value, str):
            w.add_string(key, value)
        else:
            w.add_array(key, value)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list([f"tok{i}" for i in range(m.n_vocab)])
    w.add_token_types([1] * m.n_vocab)
    w.add_token_merges(["t o"])
    w.add_eos_token_id(0)
    for name, data in m.tensors.items():
        kind = m.types.get(name, F32)
        w.add_tensor(name, data if kind == F32 else gguf.quants.quantize(data, kind), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


class _Maker:
    def __init__(self, rng: random.Random) -> None:
        self.tensors: dict[str, Array] = {}
        self.numbers = np.random.default_rng(rng.getrandbits(32))

    def matrix(self, name: str, *shape: int) -> None:
        data = self.numbers.standard_normal(shape).astype(np.float32)
        self.tensors[name + ".weight"] = data / np.float32(np.sqrt(shape[-1]))

    def norm(self, name: str, n: int) -> None:
        self.tensors[name + ".weight"] = (1 + 0.1 * self.numbers.standard_normal(n)).astype(np.float32)

    def bias(self, name: str, *shape: int) -> None:
        self.tensors[name + ".bias"] = (0.1 * self.numbers.standard_normal(shape)).astype(np.float32)


def _mamba2(rng: random.Random) -> Model:
    n_embd, n_head, d_head = rng.choice([(32, 4, 16), (32, 8, 8), (32, 3, 16), (64, 2, 64), (64, 8, 16)])
    n_group = rng.choice([1, 2]) if n_head * d_head == 2 * n_embd else 1
    d_inner, d_state, d_conv = n_head * d_head, rng.choice([8, 16, 40]), rng.choice([3, 4])
    n_layer, n_vocab, channels = rng.randint(1, 5), rng.choice([60, 100, 128]), d_inner + 2 * n_group * d_state
    keys: dict[str, Any] = {
        "context_length": 512, "embedding_length": n_embd, "block_count": n_layer, "feed_forward_length": 0,
        "attention.head_count": 0, "ssm.conv_kernel": d_conv, "ssm.inner_size": d_inner, "ssm.state_size": d_state,
        "ssm.time_step_rank": n_head, "ssm.group_count": n_group,
        "attention.layer_norm_rms_epsilon": rng.choice([1e-5, 1e-2]),
    }  # fmt: skip
    m = _Maker(rng)
    m.matrix("token_embd", n_vocab, n_embd)
    m.norm("output_norm", n_embd)
    for i in range(n_layer):
        p = f"blk.{i}."
        m.norm(p + "attn_norm", n_embd)
        m.matrix(p + "ssm_in", d_inner + channels + n_head, n_embd)
        m.matrix(p + "ssm_conv1d", channels, d_conv)
        m.bias(p + "ssm_conv1d", channels)
        m.tensors[p + "ssm_dt.bias"] = m.numbers.uniform(-4, 1, n_head).astype(np.float32)
        m.tensors[p + "ssm_a"] = -np.exp(m.numbers.uniform(-1, 2, (n_head, 1))).astype(np.float32)
        m.tensors[p + "ssm_d"] = m.numbers.standard_normal((n_head, 1)).astype(np.float32)
        m.norm(p + "ssm_norm", d_inner)
        m.tensors[p + "ssm_norm.weight"] = m.tensors[p + "ssm_norm.weight"].reshape(n_group, -1)
        m.matrix(p + "ssm_out", n_embd, d_inner)
    return Model("mamba2", keys, m.tensors, n_vocab=n_vocab)


def base(arch: str, rng: random.Random, experts: bool | None = None) -> Model:
    """The keys and tensors that an architecture cannot do without, in random sizes."""
    if arch == "mamba2":
        return _mamba2(rng)
    n_head = rng.choice([1, 2, 4])
    n_kv = n_head if arch == "gpt2" else rng.choice([h for h in (1, 2, 4) if n_head % h == 0])
    n_embd = rng.choice([64, 96, 128])
    d = n_embd // n_head if arch in WHOLE_WIDTH else rng.choice([16, 32, 48])
    n_layer, n_ff, n_vocab = rng.randint(1, 7), rng.choice([64, 96, 160]), rng.choice([60, 100, 128])
    moe = arch in ("qwen3moe", "gpt-oss") or (arch in EXPERTS and (rng.random() < 0.3 if experts is None else experts))
    keys: dict[str, Any] = {
        "context_length": 512, "embedding_length": n_embd, "block_count": n_layer, "feed_forward_length": n_ff,
        "attention.head_count": n_head, "attention.head_count_kv": n_kv,
    }  # fmt: skip
    if d != n_embd // n_head:
        keys |= {"attention.key_length": d, "attention.value_length": d}
    keys["attention.layer_norm_epsilon" if arch == "gpt2" else "attention.layer_norm_rms_epsilon"] = rng.choice([1e-5, 1e-2])
    if arch == "granite":
        keys |= {"logit_scale": 4.0, "rope.scaling.finetuned": rng.random() < 0.8}
    n_expert = rng.choice([2, 4, 8]) if moe else 0
    if moe:
        keys |= {"expert_count": n_expert, "expert_used_count": rng.randint(1, n_expert)}
    if arch == "gpt-oss":
        keys |= {"attention.sliding_window": rng.choice([3, 7, 40]), "expert_feed_forward_length": n_ff}
    if arch == "qwen3moe":
        keys["expert_feed_forward_length"] = n_ff

    m = _Maker(rng)
    gpt2, oss = arch == "gpt2", arch == "gpt-oss"
    m.matrix("token_embd", n_vocab, n_embd)
    if gpt2:
        m.matrix("position_embd", 512, n_embd)
    if arch in ("olmo2", "gpt-oss"):
        m.matrix("output", n_vocab, n_embd)
    m.norm("output_norm", n_embd)
    q, kv = n_head * d, n_kv * d
    for i in range(n_layer):
        p = f"blk.{i}."
        if arch != "olmo2":
            m.norm(p + "attn_norm", n_embd)
            m.norm(p + ("post_attention_norm" if oss else "ffn_norm"), n_embd)
        if arch in ("gemma2", "gemma3", "olmo2"):
            m.norm(p + "post_attention_norm", n_embd)
            m.norm(p + "post_ffw_norm", n_embd)
        if gpt2:
            m.matrix(p + "attn_qkv", q + 2 * kv, n_embd)
        else:
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                m.matrix(p + f"attn_{name}", rows, n_embd)
        if arch in NORMED_QK:
            m.norm(p + "attn_q_norm", q if arch == "olmo2" else d)
            m.norm(p + "attn_k_norm", kv if arch == "olmo2" else d)
        m.matrix(p + "attn_output", n_embd, q)
        if oss:
            m.tensors[p + "attn_sinks.weight"] = m.numbers.standard_normal(n_head).astype(np.float32)
        if moe:
            m.matrix(p + "ffn_gate_inp", n_expert, n_embd)
            m.matrix(p + "ffn_gate_exps", n_expert, n_ff, n_embd)
            m.matrix(p + "ffn_up_exps", n_expert, n_ff, n_embd)
            m.matrix(p + "ffn_down_exps", n_expert, n_embd, n_ff)
        else:
            if arch not in ("gpt2", "phi3"):
                m.matrix(p + "ffn_gate", n_ff, n_embd)
            m.matrix(p + "ffn_up", n_ff * (2 if arch == "phi3" else 1), n_embd)
            m.matrix(p + "ffn_down", n_embd, n_ff)
    model = Model(arch, keys, m.tensors, n_vocab=n_vocab)
    if gpt2:
        biased = ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
        for name in ["output_norm", *(f"blk.{i}.{x}" for i in range(n_layer) for x in biased)]:
            add_bias(model, name, m.numbers)
    if oss:
        for i in range(n_layer):
            for x in ("attn_output", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
                add_bias(model, f"blk.{i}.{x}", m.numbers)
    return model


def add_bias(m: Model, name: str, numbers: np.random.Generator) -> None:
    shape = m.tensors[name + ".weight"].shape
    m.tensors[name + ".bias"] = (0.1 * numbers.standard_normal(shape if len(shape) == 1 else shape[:-1])).astype(np.float32)


def fuse(m: Model, biases: str = "separate") -> Model:
    """Queries, keys and values in one weight; their biases, where there are some, `separate` or `fused`."""
    new = m.copy()
    for i in range(m.keys["block_count"]):
        for kind in ("weight", "bias"):
            names = [f"blk.{i}.attn_{x}.{kind}" for x in "qkv"]
            if not all(n in new.tensors for n in names) or (kind == "bias" and biases == "separate"):
                continue
            new.tensors[f"blk.{i}.attn_qkv.{kind}"] = np.concatenate([new.tensors.pop(n) for n in names])
    return new


def scale(m: Model, name: str, numbers: np.random.Generator) -> None:
    """A `.scale` beside a weight; one an expert where there are experts."""
    n = m.keys["expert_count"] if name.endswith("_exps") else 1
    m.tensors[name + ".scale"] = (0.5 + numbers.random(n)).astype(np.float32)


def folded(m: Model) -> Model:
    """The same model with every `.scale` multiplied into its weight, and into the bias where the scale comes after it."""
    new = m.copy()
    for name in [t.removesuffix(".scale") for t in m.tensors if t.endswith(".scale")]:
        by = new.tensors.pop(name + ".scale")
        weight = new.tensors[name + ".weight"]
        new.tensors[name + ".weight"] = weight * (by[:, None, None] if weight.ndim == 3 else by)
        dense = name.rsplit(".", 1)[-1] in ("ffn_gate", "ffn_up", "ffn_down")
        if dense and name + ".bias" in new.tensors:
            new.tensors[name + ".bias"] = new.tensors[name + ".bias"] * by
    return new


# -- variations --------------------------------------------------------------------------------------------------------

Choice = Callable[[random.Random], Any]


def _of(*values: Any) -> Choice:
    return lambda rng: rng.choice(values)


KEYS: dict[str, Choice] = {
    "rope.scaling.yarn_beta_fast": _of(8.0, 20.0), "rope.scaling.yarn_beta_slow": _of(0.5, 2.0),
    "rope.scaling.yarn_log_multiplier": _of(0.0, 0.5, 1.0), "rope.scaling.yarn_ext_factor": _of(-1.0, 0.0, 0.5),
    "rope.scaling.yarn_attn_factor": _of(0.7, 1.0), "attention.scale": _of(0.0, 0.2),
    "final_logit_softcapping": _of(5.0, 20.0), "attn_logit_softcapping": _of(3.0, 30.0),
    "router_logit_softcapping": _of(2.0), "expert_weights_scale": _of(0.0, 2.5), "expert_weights_norm": _of(True, False),
    "expert_gating_func": _of(1, 2), "attention.temperature_length": _of(4, 16),
    "attention.temperature_scale": _of(0.0, 0.2, 1.5), "attention.sliding_window": _of(1, 5, 20),
    "attention.sliding_window_pattern": _of(0, 1, 2, 3), "rope.freq_base": _of(500.0, 1e6),
    "rope.freq_base_swa": _of(300.0, 5e4), "rope.scaling.type": _of("none", "linear", "yarn", "yarn", "longrope"),
    "rope.scaling.factor": _of(0.0, 0.5, 1.0, 4.0, 16.0), "rope.scale_linear": _of(2.0),
    "rope.scaling.attn_factor": _of(0.8, 1.0, 1.3), "rope.scaling.original_context_length": _of(0, 16, 255, 256, 400, 4096),
    "rope.scaling.finetuned": _of(True, False), "logit_scale": _of(0.5, 3.0), "residual_scale": _of(0.0, 0.3),
    "embedding_scale": _of(0.0, 5.0), "attention.clamp_kqv": _of(0.5), "attention.max_alibi_bias": _of(4.0),
    "interleave_moe_layer_step": _of(2), "expert_shared_count": _of(1), "leading_dense_block_count": _of(1),
    "rope.scaling.alpha": _of(2.0), "attention.value_scale": _of(0.5), "attention.output_scale": _of(0.5),
    "use_parallel_residual": _of(True), "attention.layer_norm_epsilon": _of(1e-3), "attention.temperature_offset": _of(1.0),
    "attention.layer_norm_rms_epsilon": _of(1e-3), "vocab_size": _of(7), "no_rope_layer_interval": _of(2),
    "tensor_data_layout": _of("reference"), "rope.dimension_sections": lambda rng: [1, 1, 1, 1],
    "swiglu_clamp_exp": lambda rng: [0.5] * 7, "expert_feed_forward_length": _of(48),
}  # fmt: skip
"""Keys that a file may hold, of whatever architecture."""
REQUIRED_KEYS = (
    "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "logit_scale", "feed_forward_length",
    "attention.sliding_window", "expert_feed_forward_length", "expert_used_count", "context_length",
)  # fmt: skip


def varied(arch: str, rng: random.Random) -> Model:
    """A random model: optional tensors and keys in most, something odd in some."""
    m = base(arch, rng)
    numbers = np.random.default_rng(rng.getrandbits(32))
    n_layer, n_head = m.keys["block_count"], max(1, m.keys["attention.head_count"])
    d = m.keys.get("attention.key_length") or m.keys["embedding_length"] // n_head
    for key in rng.sample(sorted(KEYS), rng.choice([0, 1, 2, 4, 8])):
        if key == "expert_feed_forward_length" and arch in ("qwen3moe", "gpt-oss"):
            continue
        m.keys[key] = KEYS[key](rng)
        m.done.append(f"{key}={m.keys[key]}")
    if rng.random() < 0.2:
        m.keys["attention.sliding_window_pattern"] = [rng.random() < 0.5 for _ in range(n_layer)]
        m.done.append("an array of windows")
    if rng.random() < 0.2:
        m.keys["attention.sliding_window"] = rng.choice([2, 6])
        m.done.append("a window")
    if arch in ("gemma2", "gemma3", "phi3") and rng.random() < 0.3:
        m.keys["rope.dimension_count"] = d // 2
        m.done.append("half of a head turned")
    if "output.weight" not in m.tensors and rng.random() < (0.03 if arch == "gemma2" else 0.5):
        m.tensors["output.weight"] = numbers.standard_normal(m.tensors["token_embd.weight"].shape).astype(np.float32) / 8
        m.done.append("an output of its own")
    if arch != "gpt2" and rng.random() < 0.5:
        _biases(m, rng, numbers)
    if rng.random() < (0.4 if arch in ("llama", "mistral3", "granite", "phi3") else 0.03):
        n = m.keys.get("rope.dimension_count", d) // 2
        long = arch == "phi3" or rng.random() < 0.5
        names = [("factors_long", "factors_short"), ("factors_short",), ("factors_long",)] if long else [("freqs",)]
        for name in rng.choice(names):
            m.tensors[f"rope_{name}.weight"] = (1 + numbers.random(n)).astype(np.float32)
            m.done.append(f"rope_{name}")
        if rng.random() < (0.8 if long else 0.1):
            m.keys["rope.scaling.type"] = "longrope"
            m.done.append("longrope")
    if arch == "granite" and "expert_count" in m.keys and rng.random() < 0.5:
        _shared_experts(m, rng, numbers)
    if "expert_count" in m.keys and rng.random() < 0.1:
        for i in range(n_layer):
            del m.tensors[f"blk.{i}.ffn_gate_exps.weight"]
            m.tensors.pop(f"blk.{i}.ffn_gate_exps.bias", None)
        m.done.append("experts without gates")
    if arch != "gpt2" and rng.random() < 0.3:
        m = fuse(m, rng.choice(["separate", "fused"]))
        m.done.append("fused")
    if rng.random() < 0.2:
        weights = [t.removesuffix(".weight") for t in m.tensors if t.endswith(".weight") and m.tensors[t].ndim > 1
                   and ((t.startswith("blk.") and "gate_inp" not in t) or rng.random() < 0.05)]  # fmt: skip
        for name in rng.sample(weights, min(len(weights), rng.choice([1, 2, 5]))):
            scale(m, name, numbers)
            m.done.append(f"{name}.scale")
    if rng.random() < 0.12:
        _odd(m, rng, numbers)
    kind = rng.choice([F32, F32, F16, F16, F16, BF16])
    if kind != F32 and arch != "mamba2":  # whose gates and states magnify what llama.cpp rounds before such products
        m.types = {t: kind for t, x in m.tensors.items() if x.ndim > 1 and x.shape[-1] % 32 == 0
                   and rng.random() < 0.7}  # fmt: skip
    return m


def _biases(m: Model, rng: random.Random, numbers: np.random.Generator) -> None:
    kinds = ["attn_q", "attn_k", "attn_v"]
    if rng.random() < 0.2:
        kinds = rng.choice([["attn_q"], ["attn_output"], ["ffn_up"], ["ffn_down", "ffn_gate"], ["output"], ["ffn_gate_inp"],
                            ["attn_norm"], ["ffn_up_exps"], ["attn_q", "attn_k", "attn_v", "attn_output"]])  # fmt: skip
    for kind in kinds:
        for name in [t.removesuffix(".weight") for t in m.tensors if t.removesuffix(".weight").rsplit(".", 1)[-1] == kind]:
            add_bias(m, name, numbers)
    m.done.append(f"biases of {' '.join(kinds)}")


def _shared_experts(m: Model, rng: random.Random, numbers: np.random.Generator) -> None:
    n_embd, n = m.keys["embedding_length"], rng.choice([32, 64])
    if rng.random() < 0.9:
        m.keys["expert_shared_feed_forward_length"] = n
    for i in range(m.keys["block_count"]):
        for name, shape in (("gate", (n, n_embd)), ("up", (n, n_embd)), ("down", (n_embd, n))):
            x = numbers.standard_normal(shape).astype(np.float32) / 8
            m.tensors[f"blk.{i}.ffn_{name}_shexp.weight"] = x
    m.done.append("shared experts")


def _odd(m: Model, rng: random.Random, numbers: np.random.Generator) -> None:
    """Something that no converter writes."""
    kind = rng.choice(["key gone", "tensor gone", "tensor more", "shape", "input_scale", "known", "refused"])
    if kind == "key gone":
        key = rng.choice([k for k in REQUIRED_KEYS if k in m.keys])
        del m.keys[key]
        m.done.append(f"without {key}")
    elif kind == "tensor gone":
        name = rng.choice(list(m.tensors))
        del m.tensors[name]
        m.done.append(f"without {name}")
    elif kind == "tensor more":
        name = rng.choice(["blk.0.attn_sinks.weight", "blk.0.attn_q_norm.weight", "blk.0.layer_out_norm.weight",
                           "extra.weight", "blk.99.attn_norm.weight", "token_types.weight", "blk.0.attn_rot_embd.weight",
                           "output.bias", "blk.0.exp_probs_b.bias", "token_embd_norm.weight",
                           "blk.0.attn_qkv.weight"])  # fmt: skip
        if name not in m.tensors:
            m.tensors[name] = numbers.random(32).astype(np.float32)
            m.done.append(f"with {name}")
    elif kind == "shape":
        name = rng.choice(list(m.tensors))
        x = m.tensors[name]
        m.tensors[name] = np.ascontiguousarray(x[:1] if x.shape[0] > 1 else np.concatenate([x, x]))
        m.done.append(f"{name} of another shape")
    elif kind == "input_scale":
        name = rng.choice([t.removesuffix(".weight") for t in m.tensors if t.endswith(".weight")])
        n = m.keys.get("expert_count", 1) if name.endswith("_exps") else 1
        m.tensors[name + ".input_scale"] = np.ones(n, np.float32)
        m.done.append(f"{name}.input_scale")
    elif kind == "known":
        n_embd = m.keys["embedding_length"]
        m.tensors["cls.output.weight"] = numbers.random((1, n_embd)).astype(np.float32)
        m.done.append("cls.output")
    else:
        key, value = rng.choice([("attention.causal", True), ("nextn_predict_layers", 0), ("expert_group_count", 0),
                                 ("rope.scaling.type", "ntk"), ("attention.key_length_swa", 8), ("rope.scaling.type", "su")])
        m.keys[key] = value
        m.done.append(f"{key}={value}")
