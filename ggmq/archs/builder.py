"""Builds ggml graphs with ggml's vocabulary: each method adds one node and returns its index.

Shapes are ggml's `ne`. The builder keeps to what the op table promises; a mistake here is found by `validate` before
anything is sent.
"""

from __future__ import annotations

from collections.abc import Sequence

from protocol.dtypes import GGMLType, contiguous_nb
from protocol.graph import Graph, Shape, Tensor, f32_bits
from protocol.ops import GLU_KINDS, UNARY_KINDS

T = int
"""A tensor of the graph under construction, by index."""


def pad(shape: Sequence[int]) -> Shape:
    ne = (*shape, 1, 1, 1, 1)
    return (ne[0], ne[1], ne[2], ne[3])


class GraphBuilder:
    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.inputs: list[int] = []
        self.input_names: list[str] = []
        self._leaves: dict[tuple[int, int], T] = {}

    def graph(self, outputs: Sequence[T]) -> Graph:
        return Graph(tuple(self.tensors), tuple(self.inputs), tuple(outputs))

    def ne(self, x: T) -> Shape:
        return self.tensors[x].ne

    def _add(self, t: Tensor) -> T:
        self.tensors.append(t)
        return len(self.tensors) - 1

    def _node(
        self, op: str, type_id: int, ne: Sequence[int], src: Sequence[T], params: Sequence[int] = ()
    ) -> T:
        shape = pad(ne)
        words = (*params, *(0,) * (16 - len(params)))
        return self._add(Tensor(type_id, op, shape, contiguous_nb(type_id, shape), words, tuple(src)))

    # -- leaves --------------------------------------------------------------------------------------------------------

    def input(self, name: str, type_id: int, ne: Sequence[int]) -> T:
        """A leaf whose bytes come with each GRAPH_COMPUTE; the same name gives the same leaf."""
        if name in self.input_names:
            return self.inputs[self.input_names.index(name)]
        shape = pad(ne)
        x = self._add(Tensor(type_id, "NONE", shape, contiguous_nb(type_id, shape)))
        self.inputs.append(x)
        self.input_names.append(name)
        return x

    def leaf(self, type_id: int, ne: Sequence[int], buffer: int, offset: int) -> T:
        """A leaf that lies in a buffer of the session."""
        known = self._leaves.get((buffer, offset))
        if known is None:
            shape = pad(ne)
            nb = contiguous_nb(type_id, shape)
            known = self._add(Tensor(type_id, "NONE", shape, nb, buffer=buffer, offset=offset))
            self._leaves[(buffer, offset)] = known
        return known

    # -- views ---------------------------------------------------------------------------------------------------------

    def _view(self, op: str, x: T, ne: Shape, nb: Shape, offset: int = 0, params: Sequence[int] = ()) -> T:
        t = self.tensors[x]
        root, start = (t.view_src, t.view_offs) if t.view_src >= 0 else (x, 0)
        words = (*params, *(0,) * (16 - len(params)))
        return self._add(Tensor(t.type, op, ne, nb, words, (x,), root, start + offset))

    def view(self, x: T, ne: Sequence[int], nb: Sequence[int], offset: int) -> T:
        """Shape `ne`; `nb` gives the strides of dimensions 1 to 3, in bytes; `offset` from the start of x."""
        t = self.tensors[x]
        shape = pad(ne)
        strides = [t.nb[0], *nb]
        while len(strides) < 4:
            strides.append(strides[-1] * shape[len(strides) - 1])
        return self._view("VIEW", x, shape, (strides[0], strides[1], strides[2], strides[3]), offset)

    def reshape(self, x: T, *ne: int) -> T:
        """Needs a contiguous x."""
        shape = pad(ne)
        return self._view("RESHAPE", x, shape, contiguous_nb(self.tensors[x].type, shape))

    def permute(self, x: T, *axes: int) -> T:
        """Dimension i of x becomes dimension axes[i]."""
        t = self.tensors[x]
        ne, nb = [0] * 4, [0] * 4
        for i, axis in enumerate(axes):
            ne[axis], nb[axis] = t.ne[i], t.nb[i]
        return self._view("PERMUTE", x, (ne[0], ne[1], ne[2], ne[3]), (nb[0], nb[1], nb[2], nb[3]), 0, axes)

    # -- ops -----------------------------------------------------------------------------------------------------------

    def _like(self, op: str, x: T, *more: T, params: Sequence[int] = ()) -> T:
        t = self.tensors[x]
        return self._node(op, t.type, t.ne, (x, *more), params)

    def add(self, a: T, b: T) -> T:
        return self._like("ADD", a, b)

    def mul(self, a: T, b: T) -> T:
        return self._like("MUL", a, b)

    def div(self, a: T, b: T) -> T:
        return self._like("DIV", a, b)

    def add_id(self, a: T, b: T, ids: T) -> T:
        return self._like("ADD_ID", a, b, ids)

    def scale(self, x: T, scale: float, bias: float = 0.0) -> T:
        return self._like("SCALE", x, params=(f32_bits(scale), f32_bits(bias)))

    def clamp(self, x: T, low: float, high: float) -> T:
        return self._like("CLAMP", x, params=(f32_bits(low), f32_bits(high)))

    def unary(self, kind: str, x: T) -> T:
        return self._like("UNARY", x, params=(UNARY_KINDS.index(kind),))

    def glu(self, kind: str, x: T, gate: T | None = None, alpha: float = 0.0, limit: float = 0.0) -> T:
        """act(x) * gate; without `gate`, x holds both in its halves."""
        t = self.tensors[x]
        params = (GLU_KINDS.index(kind), 0, f32_bits(alpha), f32_bits(limit))
        if gate is None:
            return self._node("GLU", t.type, (t.ne[0] // 2, *t.ne[1:]), (x,), params)
        return self._node("GLU", t.type, t.ne, (x, gate), params)

    def norm(self, x: T, eps: float) -> T:
        return self._like("NORM", x, params=(f32_bits(eps),))

    def rms_norm(self, x: T, eps: float) -> T:
        return self._like("RMS_NORM", x, params=(f32_bits(eps),))

    def sum_rows(self, x: T) -> T:
        return self._node("SUM_ROWS", GGMLType.F32, (1, *self.ne(x)[1:]), (x,))

    def argmax(self, x: T) -> T:
        return self._node("ARGMAX", GGMLType.I32, (self.ne(x)[1],), (x,))

    def top_k(self, x: T, k: int) -> T:
        return self._node("TOP_K", GGMLType.I32, (k, *self.ne(x)[1:]), (x,))

    def repeat(self, x: T, *ne: int) -> T:
        return self._node("REPEAT", self.tensors[x].type, ne, (x,))

    def dup(self, x: T, type_id: int) -> T:
        """x converted to another type."""
        return self._node("DUP", type_id, self.ne(x), (x,))

    def soft_max(self, x: T) -> T:
        return self._like("SOFT_MAX", x, params=(f32_bits(1.0), 0))

    def mul_mat(self, a: T, b: T) -> T:
        ne = self.ne(b)
        return self._node("MUL_MAT", GGMLType.F32, (self.ne(a)[1], ne[1], ne[2], ne[3]), (a, b))

    def mul_mat_id(self, a: T, b: T, ids: T) -> T:
        return self._node("MUL_MAT_ID", GGMLType.F32, (self.ne(a)[1], self.ne(ids)[0], self.ne(b)[2]), (a, b, ids))

    def get_rows(self, a: T, ids: T) -> T:
        ne = self.ne(ids)
        kind = GGMLType.I32 if self.tensors[a].type == GGMLType.I32 else GGMLType.F32
        return self._node("GET_ROWS", kind, (self.ne(a)[0], ne[0], ne[1], ne[2]), (a, ids))

    def set_rows(self, target: T, x: T, ids: T) -> T:
        t = self.tensors[target]
        root, start = (t.view_src, t.view_offs) if t.view_src >= 0 else (target, 0)
        return self._add(Tensor(t.type, "SET_ROWS", t.ne, t.nb, src=(x, ids, target), view_src=root, view_offs=start))

    def concat(self, a: T, b: T, dim: int) -> T:
        """a, then b along a dimension."""
        ne = [n + self.ne(b)[i] if i == dim else n for i, n in enumerate(self.ne(a))]
        return self._node("CONCAT", self.tensors[a].type, ne, (a, b), (dim,))

    def ssm_conv(self, x: T, w: T) -> T:
        """x [d_conv - 1 + n_tokens, n_channels, n_seqs] and w [d_conv, n_channels] to [n_channels, n_tokens, n_seqs]."""
        n, n_channels, n_seqs, _ = self.ne(x)
        return self._node("SSM_CONV", GGMLType.F32, (n_channels, n - self.ne(w)[0] + 1, n_seqs), (x, w))

    def ssm_scan(self, states: T, x: T, dt: T, a: T, b: T, c: T, ids: T) -> T:
        """From states [d_state, d_head, n_head, n_slots] by `ids` [n_seqs] on.

        One row: y, of x's shape [d_head, n_head, n_tokens, n_seqs], then the states [d_state, d_head, n_head, n_seqs].
        """
        d_head, n_head, n_tokens, n_seqs = self.ne(x)
        n = d_head * n_head * n_seqs * (n_tokens + self.ne(states)[0])
        return self._node("SSM_SCAN", GGMLType.F32, (n,), (states, x, dt, a, b, c, ids), (1,))

    def cont(self, x: T) -> T:
        return self._like("CONT", x)

    def rope(
        self, x: T, positions: T, factors: T | None, *, n_dims: int, mode: int, n_ctx_orig: int, freq_base: float,
        freq_scale: float, ext_factor: float, attn_factor: float, beta_fast: float, beta_slow: float,
    ) -> T:  # fmt: skip
        floats = (freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow)
        params = (0, n_dims, mode, 0, n_ctx_orig, *(f32_bits(f) for f in floats))
        return self._like("ROPE", x, positions, *(() if factors is None else (factors,)), params=params)

    def paged_attn(
        self, q: T, k: T, v: T, pages: T, n_seen: T, rows: T | None, sinks: T | None, scale: float, softcap: float,
        window: int,
    ) -> T:  # fmt: skip
        """q [d, n_tokens, n_head], k and v [d, n_cells, n_head_kv] to [d_v, n_head, n_tokens]."""
        ne = self.ne(q)
        more = [-1 if x is None else x for x in (rows, sinks)]
        while more and more[-1] < 0:
            more.pop()
        params = (f32_bits(scale), f32_bits(softcap), window)
        return self._node("PAGED_ATTN", GGMLType.F32, (self.ne(v)[0], ne[2], ne[1]), (q, k, v, pages, n_seen, *more), params)
