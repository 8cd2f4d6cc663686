"""Launches of the CUDA device that also do what stood behind or in front of them: bits are those of the launches alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from protocol.dtypes import GGMLType, tensor_bytes
from protocol.graph import Graph
from tests.support.emulated import EmulatedDriver, compiler
from tests.support.row_graphs import Drawn, T
from tests.support.strategies import leaf
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
        patch.setattr(Binder, "makes_columns", lambda *_: False)
        alone, of_each = d.results(*outputs)
    assert len(of_each) > len(titles)
    assert got == alone


@pytest.mark.parametrize(("name", "n", "rows"), [
    ("RMS_NORM", 288, 3), ("NORM", 4352, 1), ("RMS_NORM", 8448, 1), ("RMS_NORM", 16640, 2),
])  # fmt: skip
def test_a_norm_makes_the_columns_of_the_product_behind_it(device: CUDADevice, name: str, n: int, rows: int) -> None:
    d = Held(device)
    normed = d.node(name, T.F32, (n, rows), d.input(T.F32, (n, rows)), eps=1e-5)
    y = d.node("MUL", T.F32, (n, rows), normed, d.held(T.F32, (n, 1)))
    check(d, (d.product(y, 16), y), [f"{name} * w", "MUL_MAT"])
