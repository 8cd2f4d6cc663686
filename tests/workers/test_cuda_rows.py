"""Rows on the CUDA device: however they lie there is a kernel for them, unless the result overwrites what is still read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from protocol.dtypes import GGMLType
from protocol.errors import KernelError
from protocol.graph import Graph
from protocol.validation import validate
from tests.support.emulated import EmulatedDriver, compiler
from tests.support.row_graphs import CASES, Drawn, T, drawn
from workers.devices.cuda.device import CUDADevice
from workers.devices.reference import ReferenceDevice
from workers.ticks import nothing

pytestmark = pytest.mark.skipif(not compiler()[0], reason=compiler()[1])

BOUNDS = {T.F32: 1e-7, T.F16: 1e-6, T.BF16: 3e-5}
"""A result of 16 bits may be rounded the other way than by its definition, which has 64."""


@pytest.fixture(scope="module")
def device() -> CUDADevice:
    return CUDADevice("cuda", EmulatedDriver())


def run(device: CUDADevice, graph: Graph, data: Sequence[bytes]) -> tuple[bytes, tuple[str, ...]]:
    """The result, and what the host computed of it."""
    validate(graph)
    plan = device.compile(graph, {})
    return bytes(plan.run(data, nothing)[0]), plan.fallbacks


def by_definition(graph: Graph, data: Sequence[bytes]) -> bytes:
    return bytes(ReferenceDevice().compile(graph, {}).run(data, nothing)[0])


def numbers(graph: Graph, data: bytes) -> npt.NDArray[Any]:
    kind = graph.tensors[-1].type
    if kind == T.BF16:
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(data, np.float16 if kind == T.F16 else np.float32).astype(np.float64)


@pytest.mark.parametrize("name", CASES)
def test_kernels_do_what_the_definition_says(device: CUDADevice, name: str) -> None:
    graph, data = drawn(name)
    got, fallbacks = run(device, graph, data)
    want, bound = by_definition(graph, data), BOUNDS.get(GGMLType(graph.tensors[-1].type))
    assert fallbacks == ()
    if bound is None:  # integers, and blocks
        assert got == want
        return
    a, b = numbers(graph, got), numbers(graph, want)
    finite = np.isfinite(b)
    assert np.array_equal(a[~finite], b[~finite], equal_nan=True)
    assert ((a[finite] - b[finite]) ** 2).sum() <= bound * (b[finite] ** 2).sum()


@pytest.mark.parametrize("name", ["norm RMS_NORM 2049 True", "shares 8 2", "convolution True 1", "bounded_sums"])
def test_neighbours_are_one_kernel(name: str) -> None:
    driver = EmulatedDriver()
    graph, data = drawn(name)
    CUDADevice("cuda", driver).compile(graph, {}).run(data, nothing)
    assert driver.n_launches == 1


def test_a_row_does_not_depend_on_its_company(device: CUDADevice) -> None:
    x = np.random.default_rng(4).standard_normal((5, 3000)).astype(np.float32)
    for name in ("RMS_NORM", "NORM", "SOFT_MAX", "SUM_ROWS", "CUMSUM"):
        results = []
        for rows in (x, x[3:4]):
            d, ne = Drawn(), (3000, len(rows))
            d.node(name, T.F32, (1, ne[1]) if name == "SUM_ROWS" else ne, d.input(T.F32, ne, rows), eps=1e-5, max_bias=0.0)
            got, _ = run(device, d.graph(), d.data)
            results.append(np.frombuffer(got, np.float32).reshape(len(rows), -1))
        assert np.array_equal(results[0][3], results[1][0]), name


@pytest.mark.parametrize("name", ["ADD", "CPY", "SILU", "SET_ROWS"])
def test_what_is_overwritten_while_it_is_read_goes_to_the_host(device: CUDADevice, name: str) -> None:
    d, ne, nb = Drawn(), (16, 4, 1, 1), (4, 64, 256, 256)
    whole = d.node("SCALE", T.F32, (16 * 6,), d.input(T.F32, (16 * 6,)), scale=2.0, bias=0.0)
    x, y = d.view(whole, ne, nb), d.view(whole, ne, nb, 64)
    src = {"ADD": (x, x), "CPY": (x, y), "SILU": (x,)}.get(name) or (x, d.ids(4, 4), y)
    d.node(name, T.F32, ne, *src, into=y)
    graph = d.graph()
    got, fallbacks = run(device, graph, d.data)
    assert fallbacks == (name,) and got == by_definition(graph, d.data)


@pytest.mark.parametrize("bad", [-1, 9, 1 << 30])
@pytest.mark.parametrize("name", ["GET_ROWS", "SET_ROWS", "ADD_ID"])
def test_an_index_that_points_outside_is_told(device: CUDADevice, name: str, bad: int) -> None:
    d = Drawn()
    rows, few = d.input(T.F32, (8, 9)), d.input(T.F32, (8, 3))
    ids = d.input(T.I32, (3,), np.array([0, bad, 2], np.int32))
    if name == "GET_ROWS":
        d.node(name, T.F32, (8, 3), rows, ids)
    elif name == "SET_ROWS":
        d.node(name, T.F32, (8, 9), few, ids, rows, into=rows)
    else:
        d.node(name, T.F32, (8, 3), few, rows, ids)
    with pytest.raises(KernelError, match=rf"{name}.*points outside"):
        run(device, d.graph(), d.data)
