"""A stage of a model, and its graph under construction: weights by name and shape, the memory, the inputs.

Source: the GGUF key table and llama.cpp's model graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ggmq.archs.builder import GraphBuilder, T, pad
from ggmq.archs.hparams import HParams
from ggmq.archs.memory import Cells, LayerMemory
from ggmq.gguf import GGUF, TensorInfo
from protocol.content import Part
from protocol.dtypes import GGMLType, row_bytes
from protocol.errors import FormatError


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
class Stage:
    """Consecutive layers on one device. `first` embeds tokens, `last` makes logits."""

    device: int
    layers: range
    first: bool
    last: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """What the graphs of one step are made for: sizes, so that one graph serves many steps.

    Attributes:
        n_tokens: in the order of their sequences; in a model with states the same number of each.
        n_seqs: sequences that they are of.
        n_pages: pages that a sequence may have.
        n_argmax: the first rows of the output: a token's id each.
        n_top, top_k: the rows behind them: ids and logits of the top_k tokens with the largest.
        n_logits: the rows behind those: all logits.
        n_hidden: the rows behind those: the hidden state behind the last norm. Without any rows only the memory is filled.
        in_order: the rows are those of all tokens, in their order.
        windows, has_states: what the layers keep.
        n_ctx: context of a sequence, in tokens.
        hidden: type of the activations that cross from stage to stage, F32 or F16.
    """

    n_tokens: int
    n_seqs: int = 1
    n_pages: int = 1
    n_argmax: int = 0
    n_top: int = 0
    top_k: int = 0
    n_logits: int = 0
    n_hidden: int = 0
    in_order: bool = False
    windows: tuple[int, ...] = (0,)
    has_states: bool = False
    n_ctx: int = 0
    hidden: GGMLType = GGMLType.F32

    @property
    def n_outputs(self) -> int:
        return self.n_argmax + self.n_top + self.n_logits + self.n_hidden

    def numbers(self) -> dict[str, int]:
        """The whole numbers that come with a step, in their order: how many by name. They are one input, of one frame."""
        n, n_seqs = self.n_tokens, self.n_seqs
        out = {"tokens": n, "positions": n, "n_seen": n}
        if n_seqs > 1:
            out["rows"] = n
        if not self.in_order:
            out["out_ids"] = self.n_outputs
        for window in self.windows:
            out |= {f"cells.{window}": n, f"pages.{window}": n_seqs * self.n_pages}
        if self.has_states:
            out |= {"state_from": n_seqs, "state_to": n_seqs}
        return out


class Traits(Protocol):
    """What a graph must know of its architecture."""

    gguf: GGUF
    hp: HParams
    biases: frozenset[str]
    needs_biases: frozenset[str]

    def attn_temperature(self) -> tuple[float, int]: ...


class StageGraph:
    """A graph under construction with the stage's weights, memory and inputs at hand.

    Attributes:
        used: names of the tensors in it.
        idle: names of tensors that may be there and that no product here needs.
    """

    def __init__(self, arch: Traits, placed: dict[str, Placed], memory: dict[int, LayerMemory], batch: Batch) -> None:
        self.arch, self.placed, self.memory, self.batch = arch, placed, memory, batch
        self.b = GraphBuilder()
        self.used: set[str] = set()
        self.idle: set[str] = set()
        self._numbers: dict[str, T] = {}

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

    def numbers(self, name: str, *ne: int) -> T:
        """Whole numbers that come with the step, int32 of shape `ne`: a part of the one input that has them all."""
        known = self._numbers.get(name)
        if known is None:
            counts = self.batch.numbers()
            whole = self.b.input("numbers", GGMLType.I32, (sum(counts.values()),))
            before = list(counts)[: list(counts).index(name)]
            strides = [4 * ne[0]] * (len(ne) - 1)
            known = self._numbers[name] = self.b.view(whole, ne, strides, 4 * sum(counts[x] for x in before))
        return known

    def positions(self) -> T:
        return self.numbers("positions", self.batch.n_tokens)

    def temperature(self) -> T | None:
        if not self.arch.attn_temperature()[0]:
            return None
        return self.b.input("temperature", GGMLType.F32, (1, 1, self.batch.n_tokens))

    # -- the memory of the sequences -----------------------------------------------------------------------------------

    def attend(
        self, q: T, k: T, v: T | None, il: int, scale: float, softcap: float = 0.0, sinks: T | None = None, d_v: int = 0
    ) -> T:
        """Write this batch's keys and values to their cells, and attend over all that a token sees.

        With `d_v` the layer keeps a latent, and the values are the first d_v elements of its keys.
        Shapes: q [d, n_head, n_tokens], k and v [d, n_head_kv, n_tokens] to [d_v, n_head, n_tokens].
        """
        b, memory, batch = self.b, self.memory[il], self.batch
        keeps = memory.keeps
        assert isinstance(keeps, Cells)  # layers that attend have cells
        cells = self.numbers(f"cells.{keeps.window}", batch.n_tokens)
        stored = [self._store(memory, name, x, cells) for name, x in (("k", k), ("v", v)) if x is not None]
        pages = self.numbers(f"pages.{keeps.window}", batch.n_pages, batch.n_seqs)
        n_seen = self.numbers("n_seen", batch.n_tokens)
        rows = self.numbers("rows", batch.n_tokens) if batch.n_seqs > 1 else None
        keys, values = stored[0], stored[-1]
        if d_v:
            t = b.tensors[keys]
            values = b.view(keys, (d_v, *t.ne[1:3]), t.nb[1:3], 0)
        return b.paged_attn(b.permute(q, 0, 2, 1, 3), keys, values, pages, n_seen, rows, sinks, scale, softcap, keeps.window)

    def _store(self, memory: LayerMemory, name: str, x: T, cells: T) -> T:
        """Write rows [d, n_head, n_tokens] to their cells. Returns all cells, [d, n_cells, n_head]."""
        b, t = self.b, self.b.tensors[x]
        d, n_head, n = t.ne[:3]
        kind, width, n_cells, offset = memory.parts()[name]
        flat = b.reshape(x, d * n_head, n) if t.contiguous else b.view(x, (d * n_head, n), (t.nb[2],), 0)
        written = b.set_rows(b.leaf(kind, (width, n_cells), memory.buffer, offset), flat, cells)
        per_head = row_bytes(kind, d)
        heads = b.view(written, (d, n_head, n_cells), (per_head, row_bytes(kind, width)), 0)
        return b.permute(heads, 0, 2, 1, 3)

    def read_state(self, il: int, name: str) -> T:
        """The states of the batch's sequences, as they were before it: float32 [n, n_seqs]."""
        return self.b.get_rows(*self.states(il, name))

    def write_state(self, il: int, name: str, new: T) -> T:
        """Keep their states as they are behind it: float32 [n, n_seqs]."""
        return self.b.set_rows(self.states(il, name)[0], new, self.numbers("state_to", self.batch.n_seqs))

    def states(self, il: int, name: str) -> tuple[T, T]:
        """The states in all slots, float32 [n, n_slots], and the slots of those that the batch's sequences go on from."""
        memory = self.memory[il]
        kind, n, n_slots, offset = memory.parts()[name]
        slots = self.numbers("state_from", self.batch.n_seqs)
        return self.b.leaf(kind, (n, n_slots), memory.buffer, offset), slots


def _short(ne: tuple[int, ...]) -> list[int]:
    """A shape without the ones at its end."""
    return list(ne[: max((i + 1 for i, n in enumerate(ne) if n != 1), default=1)])
