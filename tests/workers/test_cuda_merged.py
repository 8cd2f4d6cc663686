"""Launches of the CUDA device that also do what stood behind or in front of them: bits are those of the launches alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from protocol.dtypes import GGMLType, tensor_bytes
from protocol.graph import Graph
from protocol.ops import GLU_KINDS
from tests.support.emulated import EmulatedDriver, compiler
from tests.support.row_graphs import Drawn, T
from tests.support.strategies import leaf
from workers.devices.cuda import elements
from workers.devices.cuda.binding import Binder
from workers.devices.cuda.device import CUDADevice
from workers.devices.cuda.weights import CUDABuffer
from workers.kernels.quantize import quantize
from workers.ticks import nothing

pytestmark = pytest.mark.skipif(not compiler()[0], reason=compiler()[1])

RNG = np.random.default_rng(8)


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
        values = RNG.standard_normal(ne[::-1]).astype(np.float32)
        data = values if type_id == T.F32 else quantize(type_id, values.reshape(-1, 32))
        n, number = tensor_bytes(type_id, (*ne, 1, 1)), len(self.buffers) + 1
        buffer = self.buffers[number] = self.device.alloc(n)
        self.device.write(buffer, 0, data.tobytes())
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
        titles = [s.argument.title() for part in plan.bind(nothing).parts if isinstance(part, list) for s in part]
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
    check(d, (d.product(y, 16), y), [f"{name} * w", "MUL_MAT"])


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
