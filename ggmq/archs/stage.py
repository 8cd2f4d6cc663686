"""A stage of a model, and its graph under construction: weights by name and shape, the cache, the inputs.

Source: the GGUF key table and llama.cpp's model graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ggmq.archs.builder import GraphBuilder, T, pad
from ggmq.gguf import TensorInfo
from protocol.content import Part
from protocol.dtypes import GGMLType
from protocol.errors import FormatError

if TYPE_CHECKING:
    from ggmq.archs.base import Arch


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a weight lies on a stage's device."""

    info: TensorInfo
    buffer: int
    offset: int

    def part(self, digest: bytes) -> Part:
        """What it is to whoever keeps the buffer. `digest`: its bytes' BLAKE3."""
        t = self.info
        return Part(self.offset, t.n_bytes, int(t.type), t.ne, digest)


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
        n_ctx: context of a sequence, in tokens.
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
    n_ctx: int = 0
    hidden: GGMLType = GGMLType.F32


BEYOND_F16 = 1e30
"""Becomes infinity as float16."""


class StageGraph:
    """A graph under construction with the stage's weights, cache and inputs at hand.

    Attributes:
        used: names of the tensors in it.
        idle: names of tensors that may be there and that no product here needs.
    """

    def __init__(self, arch: Arch, placed: dict[str, Placed], caches: dict[int, KVCache], batch: Batch) -> None:
        self.arch, self.placed, self.caches, self.batch = arch, placed, caches, batch
        self.b = GraphBuilder()
        self.used: set[str] = set()
        self.idle: set[str] = set()
        self._masks: dict[bool, T] = {}

    def has(self, name: str) -> bool:
        return name in self.placed

    def opt(self, name: str, *ne: int) -> T | None:
        """A tensor of the file, if it is there. Errors: FormatError when its shape is not `ne`."""
        p = self.placed.get(name)
        if p is None:
            return None
        if p.info.ne != pad(ne):
            raise FormatError(f"{self.arch.gguf.path.name}: tensor {name}: expected shape {list(ne)} by the metadata, got "
                              f"{_short(p.info.ne)}")  # fmt: skip
        self.used.add(name)
        return self.b.leaf(p.info.type, p.info.ne, p.buffer, p.offset)

    def w(self, name: str, *ne: int) -> T:
        """A weight. Errors: FormatError when the file lacks it, or it has another shape."""
        t = self.opt(name, *ne)
        if t is None:
            raise FormatError(f"{self.arch.gguf.path.name}: tensor {name} is missing; "
                              f"architecture {self.arch.hp.arch} cannot run without it")  # fmt: skip
        return t

    def product(self, name: str, x: T, n_out: int) -> T:
        """Product with `name.weight` [n_in, n_out]."""
        return self.b.mul_mat(self.w(name + ".weight", self.b.ne(x)[0], n_out), x)

    def scaled(self, name: str, y: T) -> T:
        """y times `name.scale`, if there is one: what converters take out of a weight's blocks (NVFP4)."""
        self.idle.add(name + ".input_scale")
        scale = self.opt(name + ".scale", 1)
        return y if scale is None else self.b.mul(y, scale)

    def biased(self, name: str, y: T) -> T:
        """y plus `name.bias`, if the architecture takes one there and the file has it."""
        bias = self._bias(name, self.b.ne(y)[0])
        return y if bias is None else self.b.add(y, bias)

    def _bias(self, name: str, *ne: int) -> T | None:
        kind = name.rsplit(".", 1)[-1]
        if kind in self.arch.needs_biases:
            return self.w(name + ".bias", *ne)
        return self.opt(name + ".bias", *ne) if kind in self.arch.biases else None

    def linear(self, name: str, x: T, n_out: int) -> T:
        return self.biased(name, self.scaled(name, self.product(name, x, n_out)))

    def ffn_linear(self, name: str, x: T, n_out: int) -> T:
        """The same in a dense feed-forward layer, where a scale that is no part of the weight comes after the bias."""
        if self.has(name + ".weight") and self.placed[name + ".weight"].info.type == GGMLType.NVFP4:
            return self.linear(name, x, n_out)
        return self.scaled(name, self.biased(name, self.product(name, x, n_out)))

    def linear_id(self, name: str, x: T, ids: T, n_out: int) -> T:
        """The same with the experts that `ids` chooses; scale and bias are one an expert."""
        b, n_expert, n = self.b, self.arch.hp.n_expert, self.b.ne(x)[2]
        y = b.mul_mat_id(self.w(name + ".weight", b.ne(x)[0], n_out, n_expert), x, ids)
        self.idle.add(name + ".input_scale")
        scale = self.opt(name + ".scale", n_expert)
        if scale is not None:
            each = b.repeat(b.reshape(scale, 1, n_expert), 1, n_expert, n)
            y = b.mul(y, b.get_rows(each, ids))
        bias = self._bias(name, n_out, n_expert)
        return y if bias is None else b.add_id(y, bias, ids)

    def heads(self, x: T, d: int, n_head: int, n: int) -> T:
        """[d * n_head, n] as [d, n_head, n]; x may be a view of a wider tensor."""
        t = self.b.tensors[x]
        return self.b.reshape(x, d, n_head, n) if t.contiguous else self.b.view(x, (d, n_head, n), (4 * d, t.nb[1]), 0)

    def rms_norm(self, name: str, x: T) -> T:
        y = self.b.rms_norm(x, self.arch.hp.norm_rms_eps)
        return self.biased(name, self.b.mul(y, self.w(name + ".weight", self.b.ne(x)[0])))

    def layer_norm(self, name: str, x: T) -> T:
        y = self.b.norm(x, self.arch.hp.norm_eps)
        return self.biased(name, self.b.mul(y, self.w(name + ".weight", self.b.ne(x)[0])))

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


def _short(ne: tuple[int, ...]) -> list[int]:
    """A shape without the ones at its end."""
    return list(ne[: max((i + 1 for i, n in enumerate(ne) if n != 1), default=1)])
