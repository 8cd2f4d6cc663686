"""Launches of the CUDA device that also do what stood behind or in front of them: bits are those of the launches alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from protocol.dtypes import GGMLType, tensor_bytes
from protocol.errors import KernelError
from protocol.graph import Graph
from protocol.ops import GLU_KINDS
from tests.support.emulated import EmulatedDriver, compiler
from tests.support.row_graphs import Drawn, T
from tests.support.strategies import leaf
from workers.devices.cuda import elements
from workers.devices.cuda.binding import Binder
from workers.devices.cuda.device import CUDADevice
from workers.devices.cuda.weights import CUDABuffer
from workers.kernels.cuda import attention_launches
from workers.kernels.cuda.launches import MakesColumns
from workers.kernels.cuda.product_launches import Product
from workers.kernels.cuda.row_launches import Gate
from workers.ticks import nothing

pytestmark = pytest.mark.skipif(not compiler()[0], reason=compiler()[1])


@pytest.fixture(scope="module")
def device() -> CUDADevice:
    return CUDADevice("cuda", EmulatedDriver())


class Held(Drawn):
    """A graph of inputs and of what buffers hold."""

    def __init__(self, device: CUDADevice) -> None:
        super().__init__()
        self.device = device
        self.buffers: dict[int, CUDABuffer] = {}

    def held(self, type_id: GGMLType, ne: tuple[int, int]) -> int:
        """Random weights in a buffer of their own."""
        n, number = tensor_bytes(type_id, (*ne, 1, 1)), len(self.buffers) + 1
        buffer = self.buffers[number] = self.device.alloc(n)
        self.device.write(buffer, 0, self._values(type_id, (*ne, 1, 1)).tobytes())
        self.device.finish(buffer, 0, n, int(type_id), (*ne, 1, 1))
        return self._add(replace(leaf(type_id, (*ne, 1, 1)), buffer=number))

    def product(self, x: int, n_rows: int, type_id: GGMLType = T.Q8_0) -> int:
        """Of new weights and x."""
        ne = self.tensors[x].ne
        return self.node("MUL_MAT", T.F32, (n_rows, *ne[1:]), self.held(type_id, (ne[0], n_rows)), x)

    def results(self, *outputs: int) -> tuple[list[bytes], list[str]]:
        """What the graph gives, and its launches."""
        graph = Graph(tuple(self.tensors), tuple(self.inputs), outputs)
        plan = self.device.compile(graph, self.buffers)
        titles = [s.argument.title() for s in plan.bind(nothing).launches]
        assert plan.fallbacks == ()
        return [bytes(out) for out in plan.run(self.data, nothing)], titles


def check(d: Held, outputs: Sequence[int], titles: list[str]) -> None:
    """The launches have these titles, and give what they give where each node has its own."""
    got, said = d.results(*outputs)
    assert said == titles
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Binder, "last", lambda *_: None)
        alone, of_each = d.results(*outputs)
    assert len(of_each) > len(titles) or of_each == titles
    assert got == alone


@pytest.mark.parametrize(("name", "n", "rows"), [
    ("RMS_NORM", 288, 3), ("NORM", 4352, 1), ("RMS_NORM", 8448, 1), ("RMS_NORM", 16640, 2),
])  # fmt: skip
def test_a_norm_makes_the_columns_of_the_product_behind_it(device: CUDADevice, name: str, n: int, rows: int) -> None:
    d = Held(device)
    normed = d.node(name, T.F32, (n, rows), d.input(T.F32, (n, rows)), eps=1e-5)
    y = d.node("MUL", T.F32, (n, rows), normed, d.held(T.F32, (n, 1)))
    product = d.product(y, 16)
    check(d, (product, y), [f"{name} * w", "MUL_MAT"])
    check(d, (product,), [f"{name} * w", "MUL_MAT"])


def test_rows_that_only_products_read_are_columns_only(device: CUDADevice) -> None:
    """Not where one is an output, is looked at in another way, or read by a product that takes no columns."""
    for case, written in (("products", False), ("output", True), ("view", True), ("other", True), ("wide", True)):
        d = Held(device)
        y = d.node("RMS_NORM", T.F32, (64, 3), d.input(T.F32, (64, 3)), eps=1e-5)
        outputs = [d.product(y, 16), d.product(y, 32)]
        if case == "view":
            outputs.append(d.node("ABS", T.F32, (64, 1), d.view(y, (64, 1, 1, 1), (4, 256, 256, 256))))
        elif case in ("other", "wide"):
            outputs.append(d.product(y, 16, T.F32 if case == "other" else T.BF16))
        elif case == "output":
            outputs.append(y)
        graph = Graph(tuple(d.tensors), tuple(d.inputs), tuple(outputs))
        norm = device.compile(graph, d.buffers).bind(nothing).launches[0].argument
        assert isinstance(norm, MakesColumns) and norm.columns and norm.only_columns is not written, case


@pytest.mark.parametrize(("n", "rows", "n_products"), [(512, 1, 1), (1312, 3, 1), (8224, 1, 1), (512, 1, 2), (1312, 13, 1)])
def test_a_product_makes_columns_of_gated_rows(device: CUDADevice, n: int, rows: int, n_products: int) -> None:
    """Where it is the only one that reads them, and they are few; else the gate does."""
    d, ne = Held(device), (n, rows)
    y = d.node("SWIGLU", T.F32, ne, d.input(T.F32, ne), d.input(T.F32, ne))
    outputs = [d.product(y, 48) for _ in range(n_products)]
    check(d, (*outputs, y), ["SWIGLU", "MUL_MAT"])
    graph = Graph(tuple(d.tensors), tuple(d.inputs), (*outputs, y))
    gate, product = (step.argument for step in device.compile(graph, d.buffers).bind(nothing).launches)
    assert isinstance(gate, Gate) and isinstance(product, Product)
    alone = n_products == 1 and rows < 13
    assert (bool(gate.peaks), bool(gate.columns), product.peaks) == (alone, not alone, gate.peaks)


@pytest.mark.parametrize(("name", "n", "rows"), [
    ("RMS_NORM", 288, 3), ("NORM", 4352, 1), ("L2_NORM", 8448, 1), ("RMS_NORM", 16640, 2), ("NORM", 2049, 3),
])  # fmt: skip
@pytest.mark.parametrize("inplace", [False, True])
def test_a_norm_adds_first(device: CUDADevice, name: str, n: int, rows: int, inplace: bool) -> None:
    """What was added is read later, as what goes past a layer."""
    d, ne = Held(device), (n, rows)
    x, z, w = d.input(T.F32, ne), d.input(T.F32, ne), d.held(T.F32, (n, 1))
    total = d.node("ADD", T.F32, ne, x, z, into=x if inplace else -1)
    y = d.node(name, T.F32, ne, total, eps=1e-5)
    scaled = d.node("MUL", T.F32, ne, y, w)
    check(d, (scaled, total), [f"ADD, {name} * w"] if name != "L2_NORM" else [f"ADD, {name}", "MUL"])


def test_a_sum_is_a_launch_where_the_norm_cannot_add(device: CUDADevice) -> None:
    """It repeats rows, is added once more, or the norm is of a part of it."""
    for case in ("repeats", "twice", "part"):
        d, ne = Held(device), (64, 3)
        x, z = d.input(T.F32, ne), d.input(T.F32, (64, 1 if case == "repeats" else 3))
        total = d.node("ADD", T.F32, ne, x, z)
        if case == "part":
            y = d.node("RMS_NORM", T.F32, (64, 1), d.view(total, (64, 1, 1, 1), (4, 256, 256, 256)), eps=1e-5)
        else:
            y = d.node("RMS_NORM", T.F32, ne, total, eps=1e-5)
        if case == "twice":
            y = d.node("ADD", T.F32, ne, d.node("MUL", T.F32, ne, y, z), total)
        check(d, (y, total), ["ADD", "RMS_NORM * w + z" if case == "twice" else "RMS_NORM"])


def test_a_norm_overwrites_no_addend_that_other_rows_still_read(device: CUDADevice) -> None:
    """The result is laid one row behind an addend, in memory that a node before it has given."""
    d, ne, nb = Held(device), (64, 3), (4, 256, 768, 768)
    whole = d.node("SCALE", T.F32, (64, 5), d.input(T.F32, (64, 5)), scale=2.0, bias=0.0)
    x, into = d.view(whole, (*ne, 1, 1), nb, 256), d.view(whole, (*ne, 1, 1), nb)
    total = d.node("ADD", T.F32, ne, d.input(T.F32, ne), x)
    y = d.node("RMS_NORM", T.F32, ne, total, into=into, eps=1e-5)
    check(d, (total, y), ["SCALE", "ADD", "RMS_NORM"])


@pytest.mark.parametrize(("name", "n", "rows"), [*((name, 288, 3) for name in GLU_KINDS), ("SWIGLU", 14336, 1),
                                                 ("GEGLU", 16640, 2)])  # fmt: skip
@pytest.mark.parametrize("halves", [False, True])
def test_gated_rows_have_columns(device: CUDADevice, name: str, n: int, rows: int, halves: bool) -> None:
    """And the bits of the kernel of elements."""
    d, ne, limits = Held(device), (n, rows), {"alpha": 1.7, "limit": 0.9} if name in ("SWIGLU_OAI", "SWIGLU_CLAMP") else {}
    sources = [d.input(T.F32, (2 * n, rows))] if halves else [d.input(T.F32, ne), d.input(T.F32, ne)]
    y = d.node(name, T.F32, ne, *sources, **limits)
    product = d.product(y, 16)
    got, titles = d.results(product, y)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elements, "MAX_GATED", 0)
        alone, of_each = d.results(product, y)
    assert titles == [name, "MUL_MAT"] and of_each == [name, "columns to F16", "MUL_MAT"]
    assert got == alone
    assert d.results(product)[0] == alone[:1]


ALL = "ROPE, ROPE, SET_ROWS, SET_ROWS of others"


class Layer(Held):
    """Queries and keys that are turned, keys and values that are kept in cells."""

    N_CELLS = 20

    def __init__(self, device: CUDADevice, n_tokens: int, cells_type: GGMLType, d: int = 32, heads: tuple[int, int] = (4, 2),
                 **params: float) -> None:  # fmt: skip
        super().__init__(device)
        self.d, self.n_tokens, self.cells_type = d, n_tokens, cells_type
        self.params = {"n_dims": d, "mode": 0, "freq_base": 10000.0, "n_offs": 0, **params}
        self.positions = self.input(T.I32, (n_tokens,), np.arange(5, 5 + n_tokens, dtype=np.int32))
        self.ids_of = self.ids(self.N_CELLS, n_tokens, type_id=T.I64)
        self.q, self.k, self.v = (self.input(T.F32, (d, n, n_tokens)) for n in (*heads, heads[1]))
        self.outputs = [self.turned(self.q), self.turned(self.k)]

    def turned(self, x: int, into: int = -1, **params: float) -> int:
        return self.node("ROPE", T.F32, self.tensors[x].ne, x, self.positions, into=into, **self.params | params)

    def kept(self, x: int, ids: int | None = None, width: int = 0) -> None:
        """Rows of x go to new cells."""
        n = self.d * self.tensors[x].ne[1]
        rows = self.view(x, (n, self.n_tokens, 1, 1), (4, 4 * n, *[4 * n * self.n_tokens] * 2))
        cells = self.input(self.cells_type, (n, self.N_CELLS))
        self.outputs.append(self.node("SET_ROWS", self.cells_type, (n, self.N_CELLS), rows,
                                      self.ids_of if ids is None else ids, cells, into=cells))  # fmt: skip


@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize("cells_type", [T.F32, T.F16, T.BF16, T.Q8_0])
@pytest.mark.parametrize("params", [{}, {"mode": 2}, {"mode": 2, "n_dims": 20, "n_offs": 4}, {"n_dims": 8}], ids=str)
def test_keys_and_values_are_kept_by_what_turns(
    device: CUDADevice, n_tokens: int, cells_type: GGMLType, params: dict[str, float]
) -> None:
    d = Layer(device, n_tokens, cells_type, **params)
    d.kept(d.outputs[1])
    d.kept(d.v)
    rest = ["ROPE, ROPE", "SET_ROWS Q8_0 twice"] if cells_type == T.Q8_0 else [ALL]
    check(d, d.outputs, ["ROPE table", *rest])


def test_what_the_launch_of_positions_does_not_take(device: CUDADevice) -> None:
    """Other angles, other tokens, what is no row of it, what it would read while it is written."""
    d = Layer(device, 3, T.F16)
    d.outputs.append(d.turned(d.v, mode=2))
    check(d, d.outputs, ["ROPE table", "ROPE, ROPE", "ROPE table", "ROPE"])
    d = Layer(device, 3, T.F16)
    d.kept(d.outputs[1])
    d.kept(d.v, d.ids(d.N_CELLS, 3))
    check(d, d.outputs, ["ROPE table", "ROPE, ROPE, SET_ROWS", "SET_ROWS"])
    d = Layer(device, 3, T.F16)
    d.kept(d.v)
    d.kept(d.outputs[1])
    check(d, d.outputs, ["ROPE table", "ROPE, ROPE", "SET_ROWS twice"])
    d = Layer(device, 3, T.F16, d=31, n_dims=30)
    d.kept(d.outputs[1])
    d.kept(d.v)
    check(d, d.outputs, ["ROPE table", "ROPE, ROPE, SET_ROWS", "SET_ROWS"])
    d = Layer(device, 3, T.F16)
    del d.tensors[-1]
    d.outputs[1:] = [d.turned(d.outputs[0])]
    check(d, d.outputs, ["ROPE table", "ROPE", "ROPE"])


@pytest.mark.parametrize("n_dims", [32, 16])
def test_what_is_turned_in_its_place(device: CUDADevice, n_dims: int) -> None:
    """Where a part of a row is not turned, nobody looks at it who could keep it."""
    d = Layer(device, 3, T.F16, n_dims=n_dims)
    del d.tensors[-2:]
    q, k = (d.node("SCALE", T.F32, d.tensors[x].ne, x, scale=2.0, bias=0.0) for x in (d.q, d.k))
    d.outputs = [d.turned(q, q), d.turned(k, k)]
    d.kept(d.outputs[1])
    d.kept(d.v)
    rest = [ALL] if n_dims == 32 else ["ROPE, ROPE", "SET_ROWS twice"]
    check(d, d.outputs, ["SCALE", "SCALE", "ROPE table", *rest])


@pytest.mark.parametrize("bad", [-1, 20, 1 << 40])
def test_a_cell_that_is_none_is_told_of_the_node_that_named_it(device: CUDADevice, bad: int) -> None:
    for joined in (True, False):
        d = Layer(device, 3, T.F16 if joined else T.Q8_0)
        d.data[d.inputs.index(d.ids_of)] = np.array([4, bad, 7], np.int64).tobytes()
        d.kept(d.outputs[1])
        d.kept(d.v)
        with pytest.raises(KernelError, match=rf"node {d.outputs[2]} \(SET_ROWS\)"):
            d.results(*d.outputs)


@pytest.mark.parametrize("d", [32, 64, 128, 256])
@pytest.mark.parametrize("n_tokens", [1, 4])
@pytest.mark.parametrize("params", [{"mode": 0}, {"mode": 2}, {"mode": 2, "n_dims": 20, "n_offs": 4}], ids=str)
def test_what_turns_norms_first(device: CUDADevice, d: int, n_tokens: int, params: dict[str, float]) -> None:
    layer = Layer(device, n_tokens, T.F16, d, **params)
    del layer.tensors[-2:]
    layer.outputs = []
    for x in (layer.q, layer.k):
        ne = layer.tensors[x].ne
        normed = layer.node("RMS_NORM", T.F32, ne, x, eps=1e-5)
        layer.outputs.append(layer.turned(layer.node("MUL", T.F32, ne, normed, layer.held(T.F32, (d, 1)))))
    layer.kept(layer.outputs[1])
    layer.kept(layer.v)
    check(layer, layer.outputs, ["ROPE table", ALL.replace("ROPE", "RMS_NORM * w, ROPE")])
    got, _ = layer.results(*layer.outputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_launches, "MAX_NORMED", 0)
        alone, of_each = layer.results(*layer.outputs)
    assert of_each[:2] == ["RMS_NORM * w", "ROPE table"] and got == alone


def test_a_norm_that_is_wanted_or_long_is_a_launch_in_front_of_what_turns(device: CUDADevice) -> None:
    for case in ("wanted", "long", "weights"):
        d = Layer(device, 2, T.F16, 512 if case == "long" else 32)
        del d.tensors[-2:]
        ne = d.tensors[d.q].ne
        w = d.input(T.F32, (ne[0],)) if case == "weights" else d.held(T.F32, (ne[0], 1))
        y = d.node("MUL", T.F32, ne, d.node("RMS_NORM", T.F32, ne, d.q, eps=1e-5), w)
        d.outputs = [d.turned(y), *([y] if case == "wanted" else [])]
        check(d, d.outputs, ["RMS_NORM * w", "ROPE table", "ROPE"])
