"""What the architectures share: the pieces that layers are made of, and the stage around them.

An architecture is a file of its own with a class that names its choices and writes one layer. Weights are looked up by
their GGUF names, and held against the shape that the metadata gives them. Source: the GGUF key table and llama.cpp's model
graphs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

from ggmq.archs.builder import GraphBuilder, T
from ggmq.archs.hparams import Rope, read_hparams
from ggmq.archs.keys import Keys
from ggmq.archs.memory import Cells, Keeps, LayerMemory, Room, fits, room_for
from ggmq.archs.stage import Batch, Placed, Stage, StageGraph
from ggmq.gguf import GGUF, TensorInfo
from protocol.dtypes import TYPES, GGMLType
from protocol.errors import ConfigError, FormatError, GraphError
from protocol.graph import Graph
from protocol.rules import ROPE_NEOX
from protocol.validation import validate

QKV = frozenset({"attn_q", "attn_k", "attn_v", "attn_qkv"})
LONG_ROPE = frozenset({"rope_factors_long.weight", "rope_factors_short.weight"})


class Arch:
    """One model's graphs. A subclass writes `layer`; the names below are its choices.

    Attributes:
        rope_mode: ggml's mode number: 0 turns neighbouring pairs, 2 (neox) halves.
        turns_part: the file may have only the first dimensions of a head turned.
        swa_period: every n-th layer sees the whole context, the others a window; 0 for none.
        tied: whether the output's weights are the embedding's: True, False, or None where that is so if the file has none.
        biases: which weights may have a bias; one that the file has is applied.
        needs_biases: which must have one.
    """

    rope_mode = 0
    turns_part = False
    swa_period = 0
    tied: bool | None = None
    biases = QKV
    needs_biases: frozenset[str] = frozenset()

    def __init__(self, g: GGUF) -> None:
        self.gguf = g
        self.hp = read_hparams(g)
        self.keys = Keys(g, self.hp.arch)
        self.swa_layers = self._swa_layers()

    # -- choices that some architectures make otherwise ----------------------------------------------------------------

    def _swa_layers(self) -> tuple[bool, ...]:
        """For each layer whether it sees only the window; the file may say, else the period does."""
        n, key = self.hp.n_layer, "attention.sliding_window_pattern"
        if not self.swa_period or not self.hp.n_swa:
            return (False,) * n
        if self.keys.is_array(key):
            return tuple(bool(x) for x in self.keys.per_layer(key, n, 0, 1))
        period = self.keys.integer(key, 0, 1 << 31, self.swa_period)
        return tuple(period == 0 or il % period < period - 1 for il in range(n))

    @property
    def unused(self) -> frozenset[str]:
        """Tensors that a file may hold and no text needs."""
        return frozenset()

    def windowed_rope(self) -> Rope:
        """How positions turn the layers that see only the window."""
        r = self.hp.rope
        return replace(r, freq_base=r.freq_base_swa or r.freq_base, freq_scale=r.freq_scale_train)

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
        x = s.b.get_rows(s.w("token_embd.weight", self.hp.n_embd, self.hp.n_vocab), tokens)
        return s.b.scale(x, self.embed_scale()) if self.embed_scale() != 1.0 else x

    def head(self, s: StageGraph, x: T) -> T:
        """Logits of what the last norm gives."""
        own = self.tied is False or (self.tied is None and s.has("output.weight"))
        name = "output" if own else "token_embd"
        y = s.product(name, x, self.hp.n_vocab)
        if own and s.placed["output.weight"].info.type == GGMLType.NVFP4:
            y = s.scaled(name, y)
        x = s.biased(name, y)
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

    def rotate(self, s: StageGraph, x: T, il: int) -> T:
        """Rotary positions for [d, n_head, n_tokens]."""
        r = self.windowed_rope() if self.swa_layers[il] else self.hp.rope
        if not s.b.tensors[x].contiguous:
            x = s.b.cont(x)
        return s.b.rope(
            x, s.positions(), self.rope_factors(s), n_dims=r.n_dims, mode=self.rope_mode, n_ctx_orig=r.n_ctx_orig,
            freq_base=r.freq_base, freq_scale=r.freq_scale, ext_factor=r.ext_factor, attn_factor=r.attn_factor,
            beta_fast=r.beta_fast, beta_slow=r.beta_slow,
        )  # fmt: skip

    def rope_factors(self, s: StageGraph) -> T | None:
        """What each frequency is divided by; None for nothing."""
        return None

    def long_rope_factors(self, s: StageGraph) -> T | None:
        """Those for the context that a sequence has, short or long. Source: Ding et al. (LongRoPE)."""
        long = s.batch.n_ctx > self.hp.rope.n_ctx_short
        return s.opt(f"rope_factors_{'long' if long else 'short'}.weight", self.hp.rope.n_dims // 2)

    def projections(self, s: StageGraph, x: T, il: int) -> list[T]:
        """Queries, keys and values [d * heads, n_tokens], from separate weights or views of fused ones."""
        hp, b, p = self.hp, s.b, f"blk.{il}."
        sizes = {"attn_q": hp.d_k * hp.n_head[il], "attn_k": hp.d_k * hp.n_head_kv[il], "attn_v": hp.d_v * hp.n_head_kv[il]}
        if not s.has(p + "attn_qkv.weight"):
            return [s.linear(p + name, x, size) for name, size in sizes.items()]
        fused, out, at = s.linear(p + "attn_qkv", x, sum(sizes.values())), [], 0
        whole = s.has(p + "attn_qkv.bias")
        for name, size in sizes.items():
            y = b.view(fused, (size, b.ne(x)[1]), (b.tensors[fused].nb[1],), 4 * at)
            out.append(y if whole else s.biased(p + name, y))
            at += size
        return out

    def qkv(self, s: StageGraph, x: T, il: int) -> tuple[T, T, T]:
        """Queries, keys and values [d, heads, n_tokens]."""
        hp, n = self.hp, s.b.ne(x)[1]
        q, k, v = self.projections(s, x, il)
        return (s.heads(q, hp.d_k, hp.n_head[il], n), s.heads(k, hp.d_k, hp.n_head_kv[il], n),
                s.heads(v, hp.d_v, hp.n_head_kv[il], n))  # fmt: skip

    def attend(
        self, s: StageGraph, q: T, k: T, v: T, il: int, scale: float, softcap: float = 0.0, sinks: T | None = None
    ) -> T:
        """Keep k and v, attend over all that is seen, project. Returns [n_embd, n_tokens]."""
        hp, b = self.hp, s.b
        temperature = s.temperature()
        if temperature is not None:
            q = b.mul(q, temperature)
        y = s.attend(q, k, v, il, scale, softcap, sinks)
        y = b.reshape(y, hp.d_v * hp.n_head[il], b.ne(q)[2])
        return s.linear(f"blk.{il}.attn_output", y, hp.n_embd)

    def n_ff(self, il: int) -> int:
        n = self.hp.n_ff[il]
        if not n:
            raise self.keys.wrong("feed_forward_length", "the width of the feed-forward layers", "nothing")
        return n

    def ffn(self, s: StageGraph, x: T, il: int, act: str = "SWIGLU") -> T:
        """act(gate x) * (up x), projected down."""
        p, n = f"blk.{il}.", self.n_ff(il)
        up = s.ffn_linear(p + "ffn_up", x, n)
        return s.ffn_linear(p + "ffn_down", s.b.glu(act, s.ffn_linear(p + "ffn_gate", x, n), up), self.hp.n_embd)

    def ffn_without_gate(self, s: StageGraph, x: T, il: int, act: str) -> T:
        """act(up x), projected down; a GLU splits up x in halves."""
        p, n = f"blk.{il}.", self.n_ff(il)
        glu = act.endswith("GLU")
        up = s.ffn_linear(p + "ffn_up", x, 2 * n if glu else n)
        return s.ffn_linear(p + "ffn_down", s.b.glu(act, up) if glu else s.b.unary(act, up), self.hp.n_embd)

    def moe(
        self, s: StageGraph, x: T, il: int, n_ff: int, *, softmax_weight: bool = False, norm_weights: bool = True,
        act: Callable[[GraphBuilder, T, T], T] | None = None,
    ) -> T:  # fmt: skip
        """The router's best experts on each token, weighted. Source: Shazeer et al.; Jiang et al. (Mixtral).

        `n_ff`: width of an expert. `softmax_weight`: the softmax runs over the chosen experts only (gpt-oss), not over all.
        """
        hp, b, p = self.hp, s.b, f"blk.{il}."
        n, used = b.ne(x)[1], hp.n_expert_used
        if not used:
            raise self.keys.wrong("expert_count", "at least one expert", 0)
        logits = s.biased(p + "ffn_gate_inp", s.product(p + "ffn_gate_inp", x, hp.n_expert))
        probs = logits if softmax_weight else b.soft_max(logits)
        chosen = b.top_k(probs, used)
        weights = b.get_rows(b.reshape(probs, 1, hp.n_expert, n), chosen)
        weights = b.reshape(weights, used, n)
        if softmax_weight:
            weights = b.soft_max(weights)
        elif norm_weights:
            weights = b.div(weights, b.clamp(b.sum_rows(weights), 6.103515625e-5, math.inf))
        weights = b.reshape(weights, 1, used, n)
        column = b.reshape(x, hp.n_embd, 1, n)
        up = s.linear_id(p + "ffn_up_exps", column, chosen, n_ff)
        if act is not None:
            y = act(b, s.linear_id(p + "ffn_gate_exps", column, chosen, n_ff), up)
        elif s.has(p + "ffn_gate_exps.weight"):
            y = b.glu("SWIGLU", s.linear_id(p + "ffn_gate_exps", column, chosen, n_ff), up)
        else:
            y = b.unary("SILU", up)
        y = b.mul(s.linear_id(p + "ffn_down_exps", y, chosen, hp.n_embd), weights)
        row = 4 * hp.n_embd
        parts = [b.view(y, (hp.n_embd, n), (row * used,), i * row) for i in range(used)]
        total = parts[0]
        for part in parts[1:]:
            total = b.add(total, part)
        return total if used > 1 else b.cont(total)

    # -- the whole -----------------------------------------------------------------------------------------------------

    @property
    def used(self) -> frozenset[str]:
        """The tensors of the file that the graphs use. Errors: FormatError for one that they cannot use."""
        return self._used_and_idle[0]

    @cached_property
    def _used_and_idle(self) -> tuple[frozenset[str], frozenset[str]]:
        """Tensors that the graphs use, and those that they pass over knowingly.

        Errors: FormatError for one that is missing, has another shape, or a type that its op does not take.
        """
        hp = self.hp
        stage, placed, at = Stage(0, range(hp.n_layer), True, True), {}, 0
        for t in self.gguf:
            placed[t.name] = Placed(t, 1, at)
            at += t.n_bytes
        room = self.room(1)
        memory = self.layer_memory(stage.layers, room, 2)
        used: set[str] = set()
        contexts = (0, 1 << 31) if LONG_ROPE & placed.keys() else (1,)
        for n_ctx in contexts:
            batch = Batch(1, n_logits=1, in_order=True, windows=room.windows, has_states=room.has_states, n_ctx=n_ctx)
            s = StageGraph(self, placed, memory, batch)
            graph = self._graph(s, stage)
            used |= s.used
        try:
            validate(graph)
        except GraphError as e:
            names = {(p.buffer, p.offset): name for name, p in placed.items()}
            leaves = [graph.tensors[i] for i in graph.tensors[e.tensor].src]
            found = ", ".join(n for t in leaves if (n := names.get((t.buffer, t.offset))) is not None)
            raise FormatError(f"{self.gguf.path.name}: {found}: {e}; architecture {hp.arch} cannot run it") from None
        return frozenset(used), frozenset(s.idle)

    def check(self) -> None:
        """See that this is a model that can be run, before anything is sent.

        Errors: FormatError for a tensor that the graphs cannot use, and for one that no graph uses: what is left out would
            change the answer.
        """
        hp = self.hp
        if not self.turns_part and hp.rope.n_dims != hp.d_k:
            raise self.keys.wrong("rope.dimension_count", f"the whole of a head ({hp.d_k})", hp.rope.n_dims)
        if any(self.swa_layers):  # layers of both kinds have the same heads here
            for key, same in (("attention.key_length_swa", hp.d_k), ("attention.value_length_swa", hp.d_v),
                              ("rope.dimension_count_swa", hp.rope.n_dims)):  # fmt: skip
                self.keys.integer(key, same, same, same)
        used, idle = self._used_and_idle
        allowed = used | self.unused | idle
        left = [t.name for t in self.gguf if t.name not in allowed]
        if left:
            others = f" and {len(left) - 1} others" if len(left) > 1 else ""
            raise FormatError(f"{self.gguf.path.name}: tensor {left[0]}{others}: architecture {hp.arch} does not use such a "
                              "tensor; without it the answers would be wrong")  # fmt: skip

    # -- the stage -----------------------------------------------------------------------------------------------------

    def stage_weights(self, stage: Stage) -> list[TensorInfo]:
        """The tensors that a stage needs, in file order."""
        first = ("token_embd.", "position_embd.")
        last = ["output_norm.", "output."] + ([] if "output.weight" in self.gguf.tensors else ["token_embd."])
        out = []
        for t in self.gguf:
            if t.name not in self.used:
                continue
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

    def memory(self, il: int) -> Keeps:
        """What a layer keeps of a sequence."""
        hp, n = self.hp, self.hp.n_head_kv[il]
        return Cells(n * hp.d_k, n * hp.d_v, hp.d_k, hp.n_swa if self.swa_layers[il] else 0)

    def room(
        self, n_ctx: int, n_seq: int = 1, n_batch: int = 512, k_type: GGMLType = GGMLType.F16,
        v_type: GGMLType = GGMLType.F16, n_tokens: int = 0,
    ) -> Room:  # fmt: skip
        """Room for so many sequences of `n_ctx` tokens; n_tokens: as `room_for`'s.

        Errors: ConfigError for a type that heads of this width cannot be held in.
        """
        layers = [self.memory(il) for il in range(self.hp.n_layer)]
        for kind in (k_type, v_type):
            if not all(fits(kind, keeps) for keeps in layers):
                raise ConfigError(f"{self.gguf.path.name}: heads of {self.hp.d_k} elements: expected a multiple of "
                                  f"{TYPES[kind].block} for a KV cache of type {kind.name}; use f16")  # fmt: skip
        return room_for(layers, n_ctx, n_seq, n_batch, k_type, v_type, n_tokens)

    def layer_memory(self, layers: range, room: Room, buffer: int) -> dict[int, LayerMemory]:
        """The memory of each layer, in buffers that are numbered from `buffer` on."""
        return {il: LayerMemory(self.memory(il), room, buffer + i) for i, il in enumerate(layers)}

    def build(
        self, stage: Stage, placed: dict[str, Placed], memory: dict[int, LayerMemory], batch: Batch
    ) -> tuple[Graph, list[str]]:
        """The graph of a stage for a batch, and the names of its inputs in order."""
        s = StageGraph(self, placed, memory, batch)
        return self._graph(s, stage), s.b.input_names

    def _graph(self, s: StageGraph, stage: Stage) -> Graph:
        batch = s.batch
        if stage.first:
            x = self.embed(s, s.numbers("tokens", batch.n_tokens))
        else:
            x = s.b.input("hidden", batch.hidden, (self.hp.n_embd, batch.n_tokens))
            x = x if batch.hidden == GGMLType.F32 else s.b.dup(x, GGMLType.F32)
        for il in stage.layers:
            x = self.layer(s, x, il)
        if stage.last and not batch.n_outputs:
            return s.b.graph([])
        if stage.last:
            if not batch.in_order:
                x = s.b.get_rows(x, s.numbers("out_ids", batch.n_outputs))
            return s.b.graph(self._outputs(s, self.norm(s, "output_norm", x)))
        if batch.hidden != GGMLType.F32:
            x = s.b.dup(x, batch.hidden)
        elif s.b.tensors[x].view_src >= 0 or s.b.tensors[x].op == "NONE":
            x = s.b.cont(x)
        return s.b.graph([x])

    def _outputs(self, s: StageGraph, hidden: T) -> list[T]:
        """What a batch asks for: the rows' ids, then ids and logits of the largest, then all logits, then hidden states."""
        b, batch, out = s.b, s.batch, list[T]()
        at = batch.n_outputs - batch.n_hidden
        if at:
            logits, first = self.head(s, _rows(b, hidden, 0, at)), batch.n_argmax + batch.n_top
            if batch.n_argmax:
                out.append(b.argmax(_rows(b, logits, 0, batch.n_argmax)))
            if batch.n_top:
                x = _rows(b, logits, batch.n_argmax, batch.n_top)
                ids = b.top_k(x, batch.top_k)
                out += [ids, b.get_rows(b.reshape(x, 1, b.ne(logits)[0], batch.n_top), ids)]
            if batch.n_logits:
                out.append(_rows(b, logits, first, batch.n_logits))
        if batch.n_hidden:
            out.append(_rows(b, hidden, at, batch.n_hidden))
        return out


def _rows(b: GraphBuilder, x: T, first: int, n: int) -> T:
    """n rows of x [width, ...] from `first` on."""
    width, n_rows = b.ne(x)[:2]
    return x if n == n_rows else b.view(x, (width, n), (4 * width,), 4 * width * first)


NEOX = ROPE_NEOX
