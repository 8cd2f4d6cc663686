"""Hyperparameters: sizes and constants of a model, read strictly from its metadata."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ggmq.archs.keys import Keys
from ggmq.gguf import GGUF
from protocol.errors import FormatError

MAX_LAYERS = 4096
MAX_HEADS = 65_536
MAX_WIDTH = 1 << 24
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class Rope:
    """How positions turn queries and keys. Source: Su et al.; Peng et al. (YaRN); Ding et al. (LongRoPE).

    Attributes:
        scaling: one of ROPE_SCALINGS.
        freq_scale_train: the file's factor, inverted, whatever the scaling.
        freq_base_swa: the file's base of windowed layers; 0 if it names none.
        n_ctx_orig: context before it was extended.
        n_ctx_short: longest context for which the short factors hold; 0 where a file says so.
    """

    scaling: str
    n_dims: int
    freq_base: float
    freq_scale: float
    ext_factor: float
    attn_factor: float
    beta_fast: float
    beta_slow: float
    n_ctx_orig: int
    n_ctx_short: int
    freq_base_swa: float
    freq_scale_train: float


@dataclass(frozen=True, slots=True)
class HParams:
    """What a file says of a model.

    Attributes:
        n_head, n_head_kv, n_ff: one number a layer.
        d_k, d_v: width of a head's keys and values; 0, as the number of heads, where nothing attends.
        n_ff_exp, n_ff_shexp: width of an expert, and of the shared ones together; 0 if the file does not say.
    """

    arch: str
    n_vocab: int
    n_ctx_train: int
    n_embd: int
    n_layer: int
    n_head: tuple[int, ...]
    n_head_kv: tuple[int, ...]
    d_k: int
    d_v: int
    n_ff: tuple[int, ...]
    n_ff_exp: int
    n_ff_shexp: int
    norm_eps: float
    norm_rms_eps: float
    n_expert: int
    n_expert_used: int
    attention_scale: float
    attn_softcap: float
    final_softcap: float
    n_swa: int
    rope: Rope


@dataclass(frozen=True, slots=True)
class SSM:
    """Sizes of layers with a selective state space. Source: Dao and Gu (Mamba-2).

    Attributes:
        n_head: GGUF's time_step_rank.
        n_group: heads of a group share what is written to their states and read from them.
        d_state: numbers that an element of a head keeps.
        d_conv: tokens that the convolution sees.
    """

    d_inner: int
    n_head: int
    n_group: int
    d_state: int
    d_conv: int

    @property
    def d_head(self) -> int:
        return self.d_inner // self.n_head

    @property
    def n_channels(self) -> int:
        """What is convolved: the inner elements, and for each group what is written to states and read from them."""
        return self.d_inner + 2 * self.n_group * self.d_state


def read_hparams(g: GGUF) -> HParams:
    """Errors: FormatError names the key that is missing, out of range, or asks for what is not done here."""
    keys = Keys(g, g.text("general.architecture"))
    n_layer = keys.integer("block_count", 1, MAX_LAYERS)
    n_embd = keys.integer("embedding_length", 1, 1 << 20)
    embd = g.tensors.get("token_embd.weight")
    if embd is None:
        raise FormatError(f"{g.path.name}: tensor token_embd.weight is missing; the file holds no model "
                          "(a vocabulary alone can be used with `ggmq tokenize`)")  # fmt: skip
    if embd.ne[0] != n_embd:
        raise FormatError(f"{g.path.name}: token_embd.weight: expected rows of {n_embd}, got {embd.ne[0]}")
    n_vocab = embd.ne[1]
    if "tokenizer.ggml.tokens" not in g.metadata and keys.integer("vocab_size", 1, 1 << 31, n_vocab) != n_vocab:
        raise keys.wrong("vocab_size", f"the rows of token_embd.weight ({n_vocab})", keys.integer("vocab_size", 1, 1 << 31))
    n_head, n_head_kv, d_k, d_v = (0,) * n_layer, (0,) * n_layer, 0, 0
    if keys.reads("attention.head_count"):
        n_head, n_head_kv, d_k, d_v = _read_heads(keys, n_layer, n_embd)
    n_ctx_train = keys.integer("context_length", 1, 1 << 30)
    n_expert = keys.integer("expert_count", 0, 1 << 16)
    _refuse_what_is_not_done(keys)
    return HParams(
        arch=keys.arch, n_vocab=n_vocab, n_ctx_train=n_ctx_train, n_embd=n_embd, n_layer=n_layer, n_head=n_head,
        n_head_kv=n_head_kv, d_k=d_k, d_v=d_v,
        n_ff=keys.per_layer("feed_forward_length", n_layer, 0, MAX_WIDTH, 0),
        n_ff_exp=max(keys.per_layer("expert_feed_forward_length", n_layer, 0, MAX_WIDTH, 0)),
        n_ff_shexp=keys.integer("expert_shared_feed_forward_length", 0, MAX_WIDTH, 0),
        norm_eps=keys.number("attention.layer_norm_epsilon", 0.0, low=0.0),
        norm_rms_eps=keys.number("attention.layer_norm_rms_epsilon", 0.0, low=0.0),
        n_expert=n_expert,
        n_expert_used=keys.integer("expert_used_count", min(1, n_expert), n_expert),
        attention_scale=keys.number("attention.scale", 0.0),
        attn_softcap=keys.number("attn_logit_softcapping", 0.0),
        final_softcap=keys.number("final_logit_softcapping", 0.0),
        n_swa=keys.integer("attention.sliding_window", 0, 1 << 30, 0),
        rope=_read_rope(keys, n_ctx_train, d_k),
    )  # fmt: skip


def _read_heads(keys: Keys, n_layer: int, n_embd: int) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """Heads of queries and of keys in each layer, and the width of a head's keys and values."""
    n_head = keys.per_layer("attention.head_count", n_layer, 1, MAX_HEADS)
    n_head_kv = n_head
    if "attention.head_count_kv" in keys:
        n_head_kv = keys.per_layer("attention.head_count_kv", n_layer, 1, MAX_HEADS)
    for h, hk in zip(n_head, n_head_kv, strict=True):
        if h % hk:
            raise keys.wrong("attention.head_count_kv", f"a divisor of {h} heads", hk)
    d_k = keys.integer("attention.key_length", 1, 1 << 16, n_embd // n_head[0])
    d_v = keys.integer("attention.value_length", 1, 1 << 16, n_embd // n_head[0])
    if d_k != d_v or not d_k:
        raise keys.wrong("attention.value_length", f"the width of keys ({d_k})", d_v)
    return n_head, n_head_kv, d_k, d_v


def read_ssm(keys: Keys) -> SSM:
    """Errors: FormatError names the key that is missing, out of range, or does not fit the others."""
    d_inner = keys.integer("ssm.inner_size", 1, MAX_WIDTH)
    n_head = keys.integer("ssm.time_step_rank", 1, MAX_HEADS)
    n_group = keys.integer("ssm.group_count", 1, MAX_HEADS)
    if d_inner % n_head:
        raise keys.wrong("ssm.time_step_rank", f"heads that divide the inner size ({d_inner})", n_head)
    if n_head % n_group or d_inner % n_group:
        raise keys.wrong("ssm.group_count", f"a divisor of {n_head} heads", n_group)
    d_state, d_conv = keys.integer("ssm.state_size", 1, 1 << 16), keys.integer("ssm.conv_kernel", 2, 1 << 10)
    return SSM(d_inner, n_head, n_group, d_state, d_conv)


def _refuse_what_is_not_done(keys: Keys) -> None:
    if not keys.boolean("attention.causal"):
        raise keys.wrong("attention.causal", "true: tokens see those before them only", "false")
    for key, most in (("nextn_predict_layers", 0), ("expert_group_count", 1)):
        keys.integer(key, 0, most)


def _read_rope(keys: Keys, n_ctx_train: int, d_k: int) -> Rope:
    scaling = keys.text("rope.scaling.type")
    if scaling not in ROPE_SCALINGS:
        raise keys.wrong("rope.scaling.type", f"one of {', '.join(ROPE_SCALINGS)}", repr(scaling))
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0, low=0.0), low=0.0)
    train = 1.0 if factor == 0 else 1.0 / factor
    scale = 1.0 if scaling == "none" else train
    attn = keys.number("rope.scaling.attn_factor", 1.0)
    yarn = scaling == "yarn"
    if yarn and scale != 1:
        # the ROPE op multiplies by 1 + 0.1 ln(1 / scale) itself; only what differs from that stays here
        by_the_op = 1 + 0.1 * math.log(1 / scale)
        if by_the_op <= 0:
            raise keys.wrong("rope.scaling.factor", "a factor that YaRN can stretch by", factor)
        log_mul = keys.number("rope.scaling.yarn_log_multiplier", 0.0, low=0.0)
        wanted = by_the_op / (1 + log_mul * (by_the_op - 1)) if scale < 1 else 1.0
        attn *= wanted / by_the_op
    n_ctx_short = keys.integer("rope.scaling.original_context_length", 0, 1 << 31, n_ctx_train)
    return Rope(
        scaling=scaling, n_dims=keys.integer("rope.dimension_count", 0, d_k, d_k),
        freq_base=keys.number("rope.freq_base", 1.0, low=1e-6), freq_scale=scale, ext_factor=float(yarn), attn_factor=attn,
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
        n_ctx_orig=n_ctx_short or n_ctx_train, n_ctx_short=n_ctx_short,
        freq_base_swa=keys.number("rope.freq_base_swa", 0.0), freq_scale_train=train,
    )  # fmt: skip
