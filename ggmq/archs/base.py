"""What the architectures share: hyperparameters, the pieces that layers are made of, and the stage around them.

An architecture is a file of its own with a class that names its choices and writes one layer. Weights are looked up by
their GGUF names; a bias that the file has is applied. Source: the GGUF key table and llama.cpp's model graphs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ggmq.archs.builder import GraphBuilder, T
from ggmq.gguf import GGUF, TensorInfo
from protocol.dtypes import GGMLType
from protocol.errors import FormatError
from protocol.graph import Graph
from protocol.ops import ROPE_NEOX

MAX_LAYERS = 4096
MAX_HEADS = 65_536


@dataclass(frozen=True, slots=True)
class Rope:
    """How positions turn queries and keys. Source: Su et al.; Peng et al. (YaRN)."""

    n_dims: int
    freq_base: float
    freq_base_swa: float
    freq_scale: float
    ext_factor: float
    attn_factor: float
    beta_fast: float
    beta_slow: float
    n_ctx_orig: int


@dataclass(frozen=True, slots=True)
class HParams:
    """Sizes and constants of a model, read strictly from its metadata.

    Attributes:
        n_head, n_head_kv: one number a layer.
        d_k, d_v: width of a head's keys and values.
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
    norm_eps: float
    norm_rms_eps: float
    n_expert: int
    n_expert_used: int
    expert_weights_scale: float
    attention_scale: float
    attn_softcap: float
    final_softcap: float
    n_swa: int
    rope: Rope


def _per_layer(g: GGUF, key: str, n_layer: int, default: int | None) -> tuple[int, ...]:
    v = g.metadata.get(key)
    if v is not None and v.is_array:
        values = tuple(int(x) for x in g.numbers(key))
        if len(values) != n_layer:
            raise FormatError(f"{g.path.name}: byte {v.offset}: {key}: expected one value a layer ({n_layer}), "
                              f"got {len(values)}")  # fmt: skip
        return values
    one = g.integer(key) if default is None else g.integer(key, default)
    return (one,) * n_layer


def _bounded(g: GGUF, key: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        v = g.metadata.get(key)
        where = f"byte {v.offset}" if v is not None else "metadata"
        raise FormatError(f"{g.path.name}: {where}: key {key}: expected {low} to {high}, got {value}")
    return value


def read_hparams(g: GGUF) -> HParams:
    """Errors: FormatError names the key that is missing or out of range."""
    arch = g.text("general.architecture")

    def key(name: str) -> str:
        return f"{arch}.{name}"

    def integer(name: str, low: int, high: int, default: int | None = None) -> int:
        value = g.integer(key(name)) if default is None else g.integer(key(name), default)
        return _bounded(g, key(name), value, low, high)

    n_layer = integer("block_count", 1, MAX_LAYERS)
    n_embd = integer("embedding_length", 1, 1 << 20)
    embd = g.tensors.get("token_embd.weight")
    if embd is None:
        raise FormatError(f"{g.path.name}: tensor token_embd.weight is missing; the file holds no model "
                          "(a vocabulary alone can be used with `ggmq tokenize`)")  # fmt: skip
    if embd.ne[0] != n_embd:
        raise FormatError(f"{g.path.name}: token_embd.weight: expected rows of {n_embd}, got {embd.ne[0]}")
    n_head = _per_layer(g, key("attention.head_count"), n_layer, None)
    n_head_kv = _per_layer(g, key("attention.head_count_kv"), n_layer, n_head[0])
    for h, hk in zip(n_head, n_head_kv, strict=True):
        _bounded(g, key("attention.head_count"), h, 1, MAX_HEADS)
        _bounded(g, key("attention.head_count_kv"), hk, 1, h)
        if h % hk:
            raise FormatError(f"{g.path.name}: {h} heads are no multiple of {hk} key heads")
    d_k = integer("attention.key_length", 1, 1 << 16, n_embd // n_head[0])
    d_v = integer("attention.value_length", 1, 1 << 16, n_embd // n_head[0])
    n_ctx_train = integer("context_length", 1, 1 << 30)
    return HParams(
        arch=arch, n_vocab=embd.ne[1], n_ctx_train=n_ctx_train, n_embd=n_embd, n_layer=n_layer, n_head=n_head,
        n_head_kv=n_head_kv, d_k=d_k, d_v=d_v,
        norm_eps=g.number(key("attention.layer_norm_epsilon"), 0.0),
        norm_rms_eps=g.number(key("attention.layer_norm_rms_epsilon"), 0.0),
        n_expert=integer("expert_count", 0, 1 << 16, 0),
        n_expert_used=integer("expert_used_count", 0, max(0, g.integer(key("expert_count"), 0)), 0),
        expert_weights_scale=g.number(key("expert_weights_scale"), 0.0),
        attention_scale=g.number(key("attention.scale"), 0.0),
        attn_softcap=g.number(key("attn_logit_softcapping"), 0.0),
        final_softcap=g.number(key("final_logit_softcapping"), 0.0),
        n_swa=integer("attention.sliding_window", 0, 1 << 30, 0),
        rope=_read_rope(g, arch, n_ctx_train, d_k),
    )  # fmt: skip


def _read_rope(g: GGUF, arch: str, n_ctx_train: int, d_k: int) -> Rope:
    base = g.number(f"{arch}.rope.freq_base", 10000.0)
    factor = g.number(f"{arch}.rope.scaling.factor", g.number(f"{arch}.rope.scale_linear", 0.0))
    kind = g.text(f"{arch}.rope.scaling.type", "linear")
    scale = 1.0 if factor == 0 or kind == "none" else 1.0 / factor
    attn = g.number(f"{arch}.rope.scaling.attn_factor", 1.0)
    ext = g.number(f"{arch}.rope.scaling.yarn_ext_factor", -1.0)
    if ext < 0:
        ext = 1.0 if kind == "yarn" else 0.0
    if ext:
        # the ROPE op multiplies by 1 + 0.1 ln(1 / scale) itself; only what differs from that stays here
        log_mul = g.number(f"{arch}.rope.scaling.yarn_log_multiplier", 0.0)
        own = 1 + 0.1 * math.log(1 / scale) if scale < 1 else 1.0
        wanted = own / (1 + 0.1 * log_mul * math.log(1 / scale)) if log_mul and scale < 1 else own
        attn *= wanted / (1 + 0.1 * math.log(1 / scale))
    return Rope(
        n_dims=_bounded(g, f"{arch}.rope.dimension_count", g.integer(f"{arch}.rope.dimension_count", d_k), 0, d_k),
        freq_base=base,
        freq_base_swa=g.number(f"{arch}.rope.freq_base_swa", base),
        freq_scale=scale, ext_factor=ext, attn_factor=attn,
        beta_fast=g.number(f"{arch}.rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=g.number(f"{arch}.rope.scaling.yarn_beta_slow", 1.0),
        n_ctx_orig=g.integer(f"{arch}.rope.scaling.original_context_length", n_ctx_train),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a weight lies on a stage's device."""

    info: TensorInfo
    buffer: int
    offset: int


@dataclass(frozen=True, slots=True)
class KVCache:
    """Where a layer's keys and values lie. Shapes: [d * n_head_kv, n_cells], type F16."""

    buffer: int
    k_offset: int
    v_offset: int
    n_cells: int


@dataclass(frozen=True, slots=True)
class Stage:
    """Consecutive layers on one device. `first` embeds tokens, `last` makes logits."""

    device: int
    layers: range
    first: bool
    last: bool


@dataclass(slots=True)
class Batch:
    """What the graph of one step is made for.

    Attributes:
        n_tokens, n_kv, n_outputs: tokens in it, cache cells seen, rows of logits wanted (0: only the cache is filled).
        argmax: token ids instead of logits.
        top_k: ids and logits of so many tokens instead of all; 0: all.
        many: tokens may be of any sequence: each sees the cells from its sequence's first to its own; else of the one
            whose cells begin at 0.
        hidden: type of the activations that cross from stage to stage, F32 or F16.
    """

    n_tokens: int
    n_kv: int
    n_outputs: int
    argmax: bool = False
    top_k: int = 0
    many: bool = False
    hidden: GGMLType = GGMLType.F32


class Arch:
    """One model's graphs. A subclass writes `layer`; the names below are its choices.

    Attributes:
        rope_mode: ggml's mode number: 0 turns neighbouring pairs, 2 (neox) halves.
        swa_period: every n-th layer sees the whole context, the others a window; 0 for none.
    """

    rope_mode = 0
    swa_period = 0

    def __init__(self, g: GGUF) -> None:
        self.gguf = g
        self.hp = read_hparams(g)
        self.swa_layers = self._swa_layers()

    # -- choices that some architectures make otherwise ----------------------------------------------------------------

    def _swa_layers(self) -> tuple[bool, ...]:
        """For each layer whether it sees only the window; the file may say, else the period does."""
        hp = self.hp
        if not self.swa_period or not hp.n_swa:
            return (False,) * hp.n_layer
        key = f"{hp.arch}.attention.sliding_window_pattern"
        v = self.gguf.metadata.get(key)
        if v is not None and v.is_array:
            return tuple(bool(x) for x in _per_layer(self.gguf, key, hp.n_layer, None))
        period = self.gguf.integer(key, self.swa_period)
        return tuple(period > 1 and il % period < period - 1 for il in range(hp.n_layer))

    def kq_scale(self) -> float:
        return self.hp.attention_scale or 1.0 / math.sqrt(self.hp.d_k)

    def embed_scale(self) -> float:
        return 1.0

    def logit_scale(self) -> float:
        return 1.0

    def attn_temperature(self) -> tuple[float, int]:
        """Scale and length of the query temperature over long positions; (0, _) for none."""
        return 0.0, 0

    def embed(self, s: StageGraph, tokens: T) -> T:
        x = s.b.get_rows(s.w("token_embd.weight"), tokens)
        return s.b.scale(x, self.embed_scale()) if self.embed_scale() != 1.0 else x

    def head(self, s: StageGraph, x: T) -> T:
        """Final norm and logits."""
        x = self.norm(s, "output_norm", x)
        x = s.linear("output" if s.has("output.weight") else "token_embd", x)
        if self.logit_scale() != 1.0:
            x = s.b.scale(x, self.logit_scale())
        if self.hp.final_softcap:
            x = s.b.scale(x, 1.0 / self.hp.final_softcap)
            x = s.b.scale(s.b.unary("TANH", x), self.hp.final_softcap)
        return x

    def norm(self, s: StageGraph, name: str, x: T) -> T:
        return s.rms_norm(name, x)

    def layer(self, s: StageGraph, x: T, il: int) -> T:
        raise NotImplementedError

    # -- pieces --------------------------------------------------------------------------------------------------------

    def rotate(self, s: StageGraph, x: T, il: int, plain: bool = False) -> T:
        """Rotary positions for [d, n_head, n_tokens]; `plain` leaves context scaling out."""
        r, swa = self.hp.rope, self.swa_layers[il]
        factors = self.rope_factors(s, il)
        return s.b.rope(
            x, s.positions(), factors, n_dims=r.n_dims, mode=self.rope_mode, n_ctx_orig=r.n_ctx_orig,
            freq_base=r.freq_base_swa if swa else r.freq_base, freq_scale=1.0 if plain else r.freq_scale,
            ext_factor=0.0 if plain else r.ext_factor, attn_factor=1.0 if plain else r.attn_factor,
            beta_fast=r.beta_fast, beta_slow=r.beta_slow,
        )  # fmt: skip

    def rope_factors(self, s: StageGraph, il: int) -> T | None:
        return s.opt("rope_freqs.weight")

    def qkv(self, s: StageGraph, x: T, il: int) -> tuple[T, T, T]:
        """Queries, keys and values [d, heads, n_tokens], from separate or fused weights."""
        hp, b, p = self.hp, s.b, f"blk.{il}."
        nh, nk, n = hp.n_head[il], hp.n_head_kv[il], b.ne(x)[1]
        if s.has(p + "attn_qkv.weight"):
            qkv = s.linear(p + "attn_qkv", x)
            row = 4 * b.ne(qkv)[0]
            q = b.view(qkv, (hp.d_k, nh, n), (4 * hp.d_k, row), 0)
            k = b.view(qkv, (hp.d_k, nk, n), (4 * hp.d_k, row), 4 * hp.d_k * nh)
            v = b.view(qkv, (hp.d_v, nk, n), (4 * hp.d_v, row), 4 * hp.d_k * (nh + nk))
            return q, k, v
        q = b.reshape(s.linear(p + "attn_q", x), hp.d_k, nh, n)
        k = b.reshape(s.linear(p + "attn_k", x), hp.d_k, nk, n)
        v = b.reshape(s.linear(p + "attn_v", x), hp.d_v, nk, n)
        return q, k, v

    def attend(
        self, s: StageGraph, q: T, k: T, v: T, il: int, scale: float, softcap: float = 0.0, sinks: T | None = None
    ) -> T:
        """Write k and v to the cache, attend over it, project. Returns [n_embd, n_tokens]."""
        hp, b = self.hp, s.b
        temperature = s.temperature()
        if temperature is not None:
            q = b.mul(q, temperature)
        keys, values = s.store(k, v, il)
        y = b.flash_attn(b.permute(q, 0, 2, 1, 3), keys, values, s.mask(self.swa_layers[il]), sinks, scale, softcap)
        y = b.reshape(y, hp.d_v * hp.n_head[il], b.ne(q)[2])
        return s.linear(f"blk.{il}.attn_output", y)

    def ffn(self, s: StageGraph, x: T, il: int, act: str = "SWIGLU") -> T:
        """act(gate x) * (up x), projected down; without a gate, `act` works on up x (a GLU splits it in halves)."""
        p = f"blk.{il}."
        up = s.linear(p + "ffn_up", x)
        if s.has(p + "ffn_gate.weight"):
            y = s.b.glu(act, s.linear(p + "ffn_gate", x), up)
        elif act.endswith("GLU"):
            y = s.b.glu(act, up)
        else:
            y = s.b.unary(act, up)
        return s.linear(p + "ffn_down", y)

    def moe(
        self, s: StageGraph, x: T, il: int, *, softmax_weight: bool = False, norm_weights: bool = True,
        act: Callable[[GraphBuilder, T, T], T] | None = None,
    ) -> T:  # fmt: skip
        """The router's best experts on each token, weighted. Source: Shazeer et al.; Jiang et al. (Mixtral).

        `softmax_weight`: the softmax runs over the chosen experts only (gpt-oss), not over all.
        """
        hp, b, p = self.hp, s.b, f"blk.{il}."
        n, used = b.ne(x)[1], hp.n_expert_used
        logits = s.linear(p + "ffn_gate_inp", x)
        probs = logits if softmax_weight else b.soft_max(logits)
        chosen = b.top_k(probs, used)
        weights = b.get_rows(b.reshape(probs, 1, hp.n_expert, n), chosen)
        weights = b.reshape(weights, used, n)
        if softmax_weight:
            weights = b.soft_max(weights)
        elif norm_weights:
            weights = b.div(weights, b.clamp(b.sum_rows(weights), 6.103515625e-5, math.inf))
        if hp.expert_weights_scale not in (0.0, 1.0):
            weights = b.scale(weights, hp.expert_weights_scale)
        weights = b.reshape(weights, 1, used, n)
        column = b.reshape(x, hp.n_embd, 1, n)
        up = s.linear_id(p + "ffn_up_exps", column, chosen)
        gate = s.linear_id(p + "ffn_gate_exps", column, chosen)
        y = act(b, gate, up) if act is not None else b.glu("SWIGLU", gate, up)
        y = b.mul(s.linear_id(p + "ffn_down_exps", y, chosen), weights)
        row = 4 * hp.n_embd
        parts = [b.view(y, (hp.n_embd, n), (row * used,), i * row) for i in range(used)]
        total = parts[0]
        for part in parts[1:]:
            total = b.add(total, part)
        return total if used > 1 else b.cont(total)

    # -- the stage -----------------------------------------------------------------------------------------------------

    def stage_weights(self, stage: Stage) -> list[TensorInfo]:
        """The tensors that a stage needs, in file order."""
        first = ("token_embd.", "position_embd.", "token_types.")
        last = ["output_norm.", "output."] + ([] if "output.weight" in self.gguf.tensors else ["token_embd."])
        out = []
        for t in self.gguf:
            if t.name.startswith("blk."):
                number = t.name.split(".", 2)[1]
                use = number.isdigit() and int(number) in stage.layers
            elif t.name.startswith("rope_"):
                use = len(stage.layers) > 0
            else:
                use = (stage.first and t.name.startswith(first)) or (stage.last and t.name.startswith(tuple(last)))
            if use:
                out.append(t)
        return out

    def kv_bytes(self, il: int, n_cells: int) -> int:
        """Bytes of one layer's keys and values."""
        return 2 * n_cells * self.hp.n_head_kv[il] * (self.hp.d_k + self.hp.d_v)

    def build(
        self, stage: Stage, placed: dict[str, Placed], caches: dict[int, KVCache], batch: Batch
    ) -> tuple[Graph, list[str]]:
        """The graph of a stage for a batch, and the names of its inputs in order."""
        s = StageGraph(self, placed, caches, batch)
        if stage.first:
            x = self.embed(s, s.b.input("tokens", GGMLType.I32, (batch.n_tokens,)))
        else:
            x = s.b.input("hidden", batch.hidden, (self.hp.n_embd, batch.n_tokens))
            x = x if batch.hidden == GGMLType.F32 else s.b.dup(x, GGMLType.F32)
        for il in stage.layers:
            x = self.layer(s, x, il)
        if stage.last and not batch.n_outputs:
            return s.b.graph([]), s.b.input_names
        if stage.last:
            if batch.n_outputs < batch.n_tokens:
                x = s.b.get_rows(x, s.b.input("out_ids", GGMLType.I32, (batch.n_outputs,)))
            x = self.head(s, x)
            if batch.argmax:
                x = s.b.argmax(x)
            elif batch.top_k:
                ids = s.b.top_k(x, batch.top_k)
                values = s.b.get_rows(s.b.reshape(x, 1, *s.b.ne(x)[:2]), ids)
                return s.b.graph([ids, values]), s.b.input_names
        elif batch.hidden != GGMLType.F32:
            x = s.b.dup(x, batch.hidden)
        elif s.b.tensors[x].view_src >= 0 or s.b.tensors[x].op == "NONE":
            x = s.b.cont(x)
        return s.b.graph([x]), s.b.input_names


BEYOND_F16 = 1e30
"""Becomes infinity as float16."""


class StageGraph:
    """A graph under construction with the stage's weights, cache and inputs at hand."""

    def __init__(self, arch: Arch, placed: dict[str, Placed], caches: dict[int, KVCache], batch: Batch) -> None:
        self.arch, self.placed, self.caches, self.batch = arch, placed, caches, batch
        self.b = GraphBuilder()
        self._masks: dict[bool, T] = {}

    def has(self, name: str) -> bool:
        return name in self.placed

    def opt(self, name: str) -> T | None:
        p = self.placed.get(name)
        return None if p is None else self.b.leaf(p.info.type, p.info.ne, p.buffer, p.offset)

    def w(self, name: str) -> T:
        """A weight. Errors: FormatError when the file lacks it."""
        t = self.opt(name)
        if t is None:
            raise FormatError(f"{self.arch.gguf.path.name}: tensor {name} is missing; "
                              f"architecture {self.arch.hp.arch} cannot run without it")  # fmt: skip
        return t

    def linear(self, name: str, x: T) -> T:
        """Product with `name.weight`, plus `name.bias` if there is one."""
        y = self.b.mul_mat(self.w(name + ".weight"), x)
        bias = self.opt(name + ".bias")
        return y if bias is None else self.b.add(y, bias)

    def linear_id(self, name: str, x: T, ids: T) -> T:
        """The same with the experts that `ids` chooses."""
        y = self.b.mul_mat_id(self.w(name + ".weight"), x, ids)
        bias = self.opt(name + ".bias")
        return y if bias is None else self.b.add_id(y, bias, ids)

    def rms_norm(self, name: str, x: T) -> T:
        y = self.b.mul(self.b.rms_norm(x, self.arch.hp.norm_rms_eps), self.w(name + ".weight"))
        bias = self.opt(name + ".bias")
        return y if bias is None else self.b.add(y, bias)

    def layer_norm(self, name: str, x: T) -> T:
        y = self.b.mul(self.b.norm(x, self.arch.hp.norm_eps), self.w(name + ".weight"))
        bias = self.opt(name + ".bias")
        return y if bias is None else self.b.add(y, bias)

    def positions(self) -> T:
        return self.b.input("positions", GGMLType.I32, (self.batch.n_tokens,))

    def temperature(self) -> T | None:
        if not self.arch.attn_temperature()[0]:
            return None
        return self.b.input("temperature", GGMLType.F32, (1, 1, self.batch.n_tokens))

    def mask(self, swa: bool) -> T:
        """float16 [n_kv, n_tokens]: 0 where a token sees a cell, minus infinity where not."""
        known = self._masks.get(swa)
        if known is None:
            known = self._masks[swa] = self._mask(swa)
        return known

    def _mask(self, swa: bool) -> T:
        """Made here, of where a token's cell is and where its sequence's cells begin: no mask crosses the wire."""
        b, n_kv, n = self.b, self.batch.n_kv, self.batch.n_tokens
        cell = b.repeat(b.arange(n_kv), n_kv, n)
        ahead = b.sub(cell, b.input("cell", GGMLType.F32, (1, n)))
        seen = b.unary("STEP", b.scale(ahead, -1.0, 0.5))
        if swa:
            seen = b.mul(seen, b.unary("STEP", b.scale(ahead, 1.0, self.arch.hp.n_swa - 0.5)))
        if self.batch.many:
            since = b.sub(cell, b.input("first_cell", GGMLType.F32, (1, n)))
            seen = b.mul(seen, b.unary("STEP", b.scale(since, 1.0, 0.5)))
        return b.dup(b.scale(seen, BEYOND_F16, -BEYOND_F16), GGMLType.F16)

    def store(self, k: T, v: T, il: int) -> tuple[T, T]:
        """Write this batch's keys and values to their cells. Returns the cells seen, [d, n_kv, n_head_kv]."""
        hp, b, c = self.arch.hp, self.b, self.caches[il]
        nk, n, n_kv = hp.n_head_kv[il], self.batch.n_tokens, self.batch.n_kv
        cells = b.input("cells", GGMLType.I64, (n,))
        out = []
        for x, d, offset in ((k, hp.d_k, c.k_offset), (v, hp.d_v, c.v_offset)):
            t = b.tensors[x]
            flat = b.reshape(x, d * nk, n) if t.contiguous else b.view(x, (d * nk, n), (t.nb[2],), 0)
            cache = b.set_rows(b.leaf(GGMLType.F16, (d * nk, c.n_cells), c.buffer, offset), flat, cells)
            row = 2 * d * nk
            out.append(b.permute(b.view(cache, (d, nk, n_kv), (2 * d, row), 0), 0, 2, 1, 3))
        return out[0], out[1]


NEOX = ROPE_NEOX
