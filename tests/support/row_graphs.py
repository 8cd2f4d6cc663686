"""Graphs of the ops that move, order and combine rows, with what random nodes seldom have: strides, repeats, other types,
long rows, neighbours that are one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from protocol.dtypes import TYPES, GGMLType, contiguous_nb
from protocol.graph import Graph, Shape, Tensor
from protocol.ops import OPS
from tests.support.strategies import leaf, node_name, params_of
from workers.kernels.quantize import quantize
from workers.tensors import f32_to_bf16

T = GGMLType
FLOATS = (T.F32, T.F16, T.BF16)
INTEGERS: dict[int, Any] = {T.I8: np.int8, T.I16: np.int16, T.I32: np.int32, T.I64: np.int64}


def shape_of(ne: Sequence[int]) -> Shape:
    a, b, c, d = (*ne, 1, 1, 1)[:4]
    return a, b, c, d


class Drawn:
    """A graph as it grows; `data` are the bytes of its inputs."""

    def __init__(self, seed: int = 1) -> None:
        self.rng = np.random.default_rng(seed)
        self.tensors: list[Tensor] = []
        self.inputs: list[int] = []
        self.data: list[bytes] = []

    def _add(self, t: Tensor) -> int:
        self.tensors.append(t)
        return len(self.tensors) - 1

    def input(self, type_id: int, ne: Sequence[int], values: npt.NDArray[Any] | None = None) -> int:
        """A leaf of these values, or of random ones."""
        shape = shape_of(ne)
        self.inputs.append(self._add(leaf(type_id, shape)))
        self.data.append((self._values(type_id, shape) if values is None else values).tobytes())
        return self.inputs[-1]

    def _values(self, type_id: int, shape: Shape) -> npt.NDArray[Any]:
        n, block = int(np.prod(shape)), TYPES[type_id].block
        if type_id in INTEGERS:
            return self.rng.integers(-100, 100, n).astype(INTEGERS[type_id])
        values = self.rng.standard_normal(n).astype(np.float32) * 2
        if block > 1:
            return quantize(type_id, values.reshape(-1, block))
        return {T.F32: values, T.F16: values.astype(np.float16), T.BF16: f32_to_bf16(values)}[GGMLType(type_id)]

    def view(self, i: int, ne: Sequence[int], nb: Sequence[int], offset: int = 0) -> int:
        t = self.tensors[i]
        shared = {"src": (i,), "view_src": i, "view_offs": offset, "params": leaf(0, (1, 1, 1, 1)).params}
        return self._add(replace(t, op="VIEW", ne=shape_of(ne), nb=shape_of(nb), **shared))  # type: ignore[arg-type]

    def padded(self, type_id: int, ne: Sequence[int], offset: int = 0) -> int:
        """With a gap behind each row, a number of elements in."""
        room = shape_of((ne[0] + max(4, offset) * TYPES[type_id].block, *ne[1:]))
        return self.view(self.input(type_id, room), ne, contiguous_nb(type_id, room), offset * TYPES[type_id].bytes)

    def permuted(self, type_id: int, ne: Sequence[int], order: Sequence[int]) -> int:
        """Dimension d is dimension order[d] of what lies there."""
        room = [0] * 4
        for d, to in enumerate(order):
            room[to] = ne[d]
        nb = contiguous_nb(type_id, shape_of(room))
        return self.view(self.input(type_id, room), ne, [nb[to] for to in order])

    def node(self, name: str, type_id: int, ne: Sequence[int], *src: int, into: int = -1, **params: float) -> int:
        """`into`: the tensor whose bytes the result is."""
        t = replace(leaf(type_id, shape_of(ne)), op=node_name(OPS[name]), src=src, params=params_of(OPS[name], params))
        return self._add(t if into < 0 else replace(t, nb=self.tensors[into].nb, view_src=into))

    def ids(self, n: int, *ne: int, type_id: int = T.I32) -> int:
        """Indices below n; those of a row differ where there are enough."""
        count = int(np.prod(ne[1:]))
        rows = [self.rng.permutation(n)[: ne[0]] if ne[0] <= n else self.rng.integers(0, n, ne[0]) for _ in range(count)]
        return self.input(type_id, ne, np.array(rows, INTEGERS[type_id]))

    def graph(self) -> Graph:
        """With the last node as its output."""
        t = self.tensors[-1]
        if not t.contiguous:
            self.node("CONT", t.type, t.ne, len(self.tensors) - 1)
        return Graph(tuple(self.tensors), tuple(self.inputs), (len(self.tensors) - 1,))


def elements(d: Drawn, name: str, types: Sequence[int], swap: bool) -> None:
    """x and z, where z repeats in one way or another."""
    ne = (12, 6, 4, 2)
    x = d.permuted(types[0], ne, (1, 0, 2, 3)) if swap else d.padded(types[0], ne, 4)
    z = d.padded(types[1], (4, 1, 2, 1) if swap else (12, 3, 1, 2))
    d.node(name, types[0], ne, x, z)


def soft_max(d: Drawn, mask_type: int, max_bias: float) -> None:
    x = d.permuted(T.F32, (33, 5, 6, 2), (0, 2, 1, 3))
    mask, sinks = d.input(mask_type, (33, 7, 1, 2)), d.input(T.F32, (6,))
    d.node("SOFT_MAX", T.F32, (33, 5, 6, 2), x, mask, sinks, scale=0.5, max_bias=max_bias)


def copy(d: Drawn, of: int, to: int, ne: Sequence[int], order: Sequence[int] | None) -> None:
    x = d.permuted(of, ne, order) if order is not None else d.padded(of, ne)
    target = d.padded(to, (ne[0], ne[1] * ne[2], ne[3], 1))
    d.node("CPY", to, d.tensors[target].ne, x, target, into=target)


def set_rows(d: Drawn, of: int, to: int, id_type: int) -> None:
    x, target = d.padded(of, (64, 5, 2, 2)), d.padded(to, (64, 9, 2, 2))
    d.node("SET_ROWS", to, (64, 9, 2, 2), x, d.ids(9, 5, 1, 2, type_id=id_type), target, into=target)


def get_rows(d: Drawn, of: int) -> None:
    x = d.padded(of, (256, 7, 3, 2))
    d.node("GET_ROWS", T.I32 if of == T.I32 else T.F32, (256, 5, 3, 2), x, d.ids(7, 5, 3, 2))


def order(d: Drawn, name: str, n: int, k: int, kind: str) -> None:
    """Of two long rows."""
    x = d.rng.standard_normal((2, n)).astype(np.float32) * 4
    x = {"equal": np.zeros_like(x), "ties": np.round(x), "sorted": np.sort(x)}.get(kind, x)
    if kind == "strange":
        x[:, ::5], x[0, 1], x[1, 2], x[1, 3] = np.nan, np.inf, -np.inf, -0.0
    ne = {"ARGMAX": (2,), "TOP_K": (k, 2), "ARGSORT": (n, 2)}[name]
    d.node(name, T.I32, ne, d.input(T.F32, (n, 2), x), order=1)


def norm(d: Drawn, name: str, n: int, add: bool) -> None:
    """A norm times weights, plus what goes past it."""
    ne = (n, 3, 2, 1)
    x, w = d.padded(T.F32, ne), d.input(T.F32, (n,))
    y = d.node("MUL", T.F32, ne, d.node(name, T.F32, ne, x, eps=1e-5), w)
    if add:
        d.node("ADD", T.F32, ne, y, x)


def shares(d: Drawn, n_terms: int, n_more: int) -> None:
    """What experts give, added up, and more."""
    row, more = 4 * 64, [d.input(T.F32, ne) for ne in ((64, 5), (64,))[:n_more]]
    y = d.input(T.F32, (64, n_terms, 5))
    of = [d.view(y, (64, 5, 1, 1), (4, row * n_terms, *[5 * row * n_terms] * 2), i * row) for i in range(n_terms)]
    total = of[0]
    for i in [*of[1:], *more]:
        total = d.node("ADD", T.F32, (64, 5), total, i)


def convolution(d: Drawn, bias: bool, n_tokens: int) -> None:
    x, w, z = d.input(T.F32, (3 + n_tokens, 40, 2)), d.input(T.F32, (4, 40)), d.input(T.F32, (40,))
    ne = (40, n_tokens, 2)
    y = d.node("SSM_CONV", T.F32, ne, x, w)
    d.node("SILU", T.F32, ne, d.node("ADD", T.F32, ne, y, z) if bias else y)


def add_id(d: Drawn) -> None:
    d.node("ADD_ID", T.F32, (48, 3, 4), d.padded(T.F32, (48, 3, 4, 1)), d.input(T.F32, (48, 9)), d.ids(9, 3, 4))


def concat(d: Drawn, of: int, dim: int) -> None:
    ne = (20, 16, 3, 2)
    other = [9 if i == dim else n for i, n in enumerate(ne)]
    x, z = d.padded(of, ne), d.permuted(of, other, (1, 0, 2, 3))
    d.node("CONCAT", of, [n + 9 if i == dim else n for i, n in enumerate(ne)], x, z, dim=dim)


def repeat(d: Drawn, of: int, ne: Sequence[int]) -> None:
    d.node("REPEAT", of, (12, 6, 4, 2), d.padded(of, ne))


def diag_mask(d: Drawn) -> None:
    d.node("DIAG_MASK_INF", T.F32, (12, 6, 4, 2), d.padded(T.F32, (12, 6, 4, 2)), n_past=3)


def cumsum(d: Drawn) -> None:
    d.node("CUMSUM", T.F32, (5000, 2), d.input(T.F32, (5000, 2)))


def bounded_sums(d: Drawn) -> None:
    sums = d.node("SUM_ROWS", T.F32, (1, 3), d.padded(T.F32, (5000, 3, 1, 1)))
    d.node("CLAMP", T.F32, (1, 3), sums, low=-9.0, high=9.0)


Case = tuple[Callable[..., None], tuple[object, ...]]


def _cases() -> Iterator[Case]:
    for i, name in enumerate(("ADD", "SUB", "MUL", "DIV")):
        for swap in (False, True):
            yield elements, (name, (FLOATS[i % 3], FLOATS[(i + swap) % 3]), swap)
    yield from ((soft_max, a) for a in ((T.F32, 0.0), (T.F16, 8.0)))
    kinds = ((T.F32, T.F16), (T.F16, T.BF16), (T.BF16, T.BF16), (T.I32, T.F32), (T.F32, T.I32), (T.I64, T.I16),
             (T.I8, T.I8))  # fmt: skip
    yield from ((copy, (*a, (24, 16, 3, 2), by)) for a in kinds for by in (None, (1, 0, 2, 3), (2, 1, 0, 3)))
    blocks = ((T.Q8_0, T.Q8_0), (T.Q4_K, T.F16), (T.F32, T.Q8_0), (T.BF16, T.Q8_0), (T.MXFP4, T.F32))
    yield from ((copy, (*a, (256, 3, 2, 2), None)) for a in blocks)
    into = ((T.F32, T.F32), (T.F32, T.F16), (T.F16, T.BF16), (T.F32, T.Q8_0), (T.F16, T.Q8_0))
    yield from ((set_rows, (*a, by)) for a in into for by in (T.I32, T.I64))
    rows = (*FLOATS, T.I32, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K, T.IQ4_NL,
            T.IQ4_XS, T.MXFP4, T.TQ1_0, T.TQ2_0, T.NVFP4, T.Q1_0, T.Q2_0)  # fmt: skip
    yield from ((get_rows, (of,)) for of in rows)
    orders = (("ARGMAX", 20000, 0), ("ARGSORT", 9000, 0), ("TOP_K", 30000, 1), ("TOP_K", 30000, 50), ("TOP_K", 9000, 1024),
              ("TOP_K", 100, 8), ("TOP_K", 5000, 2000))  # fmt: skip
    yield from ((order, (*a, kind)) for a in orders for kind in ("plain", "equal", "ties", "sorted", "strange"))
    norms = (("RMS_NORM", 64, False), ("RMS_NORM", 2049, True), ("NORM", 4096, True), ("NORM", 7, False))
    yield from ((norm, a) for a in norms)
    yield from ((shares, a) for a in ((2, 0), (7, 1), (8, 2)))
    yield from ((convolution, a) for a in ((True, 1), (False, 70)))
    yield from ((concat, (FLOATS[dim % 3], dim)) for dim in range(4))
    yield from ((repeat, a) for a in ((T.F16, (4, 3, 1, 2)), (T.I64, (12, 1, 4, 1))))
    for plain in (add_id, diag_mask, cumsum, bounded_sums):
        yield plain, ()


def _said(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_said, value))
    return value.name if isinstance(value, GGMLType) else str(value)


CASES: dict[str, Case] = {" ".join((f.__name__, *map(_said, a))): (f, a) for f, a in _cases()}
"""What draws a graph, by its name."""


def drawn(name: str) -> tuple[Graph, list[bytes]]:
    """A graph, and the bytes of its inputs."""
    draw, values = CASES[name]
    d = Drawn()
    draw(d, *values)
    return d.graph(), d.data
