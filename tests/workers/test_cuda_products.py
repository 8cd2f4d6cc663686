"""Products on the CUDA device, over kernels that run on the host: a column's sums are the same in any company."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from protocol.dtypes import TYPES, GGMLType, tensor_bytes
from protocol.graph import Graph
from tests.support import cuda_emulated, emulated, gpu
from tests.support.emulated import EmulatedDriver
from tests.support.fixtures import nmse
from tests.support.strategies import leaf
from workers.devices.cuda import open_cuda
from workers.devices.cuda.device import CUDADevice
from workers.devices.cuda.plan import CUDAPlan
from workers.devices.reference import ReferenceDevice
from workers.kernels.cuda.planes import KINDS
from workers.kernels.quantize import quantize
from workers.tensors import f32_to_bf16
from workers.ticks import nothing

pytestmark = pytest.mark.skipif(not emulated.compiler()[0], reason=emulated.compiler()[1])
F32 = GGMLType.F32


def weights_of(type_id: GGMLType, k: int, n_rows: int) -> bytes:
    values = np.random.default_rng(int(type_id)).standard_normal((n_rows, k)).astype(np.float32)
    if type_id == GGMLType.F16:
        return values.astype(np.float16).tobytes()
    if type_id == GGMLType.BF16:
        return f32_to_bf16(values).tobytes()
    return quantize(type_id, values.reshape(-1, TYPES[type_id].block)).tobytes()


def launches(plan: CUDAPlan) -> list[str]:
    return [type(step.argument).__name__ for step in plan.bind(nothing).launches]


SHAPES = [*((t, 1280, 144, 100) for t in KINDS), *((KINDS[i], 256, 16, 65) for i in (0, 4, 7, 9, 14)),
          *((KINDS[i], 2304, 48, 130) for i in (0, 4, 7, 9, 14))]  # fmt: skip


@pytest.mark.parametrize(("type_id", "k", "n_rows", "n"), SHAPES, ids=lambda v: getattr(v, "name", str(v)))
@pytest.mark.parametrize("on", [cuda_emulated.NAME, pytest.param(gpu.NAME, marks=pytest.mark.cuda)])
def test_a_column_is_the_same_alone_and_among_many(on: str, type_id: GGMLType, k: int, n_rows: int, n: int) -> None:
    """Also in large tiles, whose rows, columns and groups are no multiples of what a tile has."""
    reference = ReferenceDevice()
    device = open_cuda(on) if on == gpu.NAME else CUDADevice(on, EmulatedDriver(compares=k == 256))
    data, ne = weights_of(type_id, k, n_rows), (k, n_rows, 1, 1)
    assert len(data) == tensor_bytes(type_id, ne)
    buffers = {}
    for d in (device, reference):
        buffers[d] = d.alloc(len(data))
        d.write(buffers[d], 0, memoryview(data))
        d.finish(buffers[d], 0, len(data), int(type_id), ne)
    x = np.random.default_rng(5).standard_normal((n, k), np.float32)

    def product(d: object, columns: np.ndarray) -> tuple[np.ndarray, object]:
        m = len(columns)
        out = replace(leaf(F32, (n_rows, m, 1, 1)), op="MUL_MAT", src=(0, 1))
        graph = Graph((leaf(type_id, ne, buffer=1), leaf(F32, (k, m, 1, 1)), out), (1,), (2,))
        plan = d.compile(graph, {1: buffers[d]})  # type: ignore[attr-defined]
        (y,) = plan.run([columns.tobytes()], nothing)
        return np.frombuffer(bytes(y), np.float32).reshape(m, n_rows), plan

    many, plan = product(device, x)
    assert launches(plan)[-1] == "TileProduct"  # type: ignore[arg-type]
    for few in (x[:1], x[3:8], x[n - 20 :]):
        alone, plan = product(device, few)
        assert launches(plan)[-1] == "Product"  # type: ignore[arg-type]
        at = next(i for i in range(n) if np.array_equal(x[i], few[0]))
        assert np.array_equal(alone, many[at : at + len(few)])
    assert nmse(many, product(reference, x)[0]) < (1e-4 if type_id == GGMLType.BF16 else 1e-5)


def test_neighbours_with_the_same_columns_are_one_launch() -> None:
    """Four of them, whose rows begin in the middle of nothing; a fifth is one of its own."""
    device, reference = CUDADevice("cuda-emulated", EmulatedDriver()), ReferenceDevice()
    k, sizes = 256, (48, 16, 40, 64, 32)
    data = [weights_of(GGMLType.Q8_0, k, n) for n in sizes]
    results = []
    for d in (device, reference):
        buffers = {}
        for i, (n, raw) in enumerate(zip(sizes, data, strict=True), 1):
            buffers[i] = d.alloc(len(raw))
            d.write(buffers[i], 0, memoryview(raw))
            d.finish(buffers[i], 0, len(raw), int(GGMLType.Q8_0), (k, n, 1, 1))
        for m in (1, 3, 70):
            x = leaf(F32, (k, m, 1, 1))
            w = [leaf(GGMLType.Q8_0, (k, n, 1, 1), buffer=i) for i, n in enumerate(sizes, 1)]
            out = [replace(leaf(F32, (n, m, 1, 1)), op="MUL_MAT", src=(i, 0)) for i, n in enumerate(sizes, 1)]
            graph = Graph((x, *w, *out), (0,), tuple(range(6, 11)))
            plan = d.compile(graph, buffers)
            y = plan.run([np.random.default_rng(m).standard_normal((m, k), np.float32).tobytes()], nothing)
            results.append([np.frombuffer(bytes(part), np.float32).copy() for part in y])
            if isinstance(plan, CUDAPlan):
                assert launches(plan).count("Product") + launches(plan).count("TileProduct") <= 3
    for got, want in zip(results[:3], results[3:], strict=True):
        assert all(nmse(g, w) < 1e-5 for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("n", [1, 70])
def test_a_result_that_nobody_reads_is_not_made_together_with_what_lies_over_it(n: int) -> None:
    device, reference = CUDADevice("cuda-emulated", EmulatedDriver()), ReferenceDevice()
    k, n_rows = 256, 48
    both = weights_of(GGMLType.Q8_0, k, 2 * n_rows)
    data = [both[: len(both) // 2], both[len(both) // 2 :]]
    x = leaf(F32, (k, n, 1, 1))
    w = [leaf(GGMLType.Q8_0, (k, n_rows, 1, 1), buffer=i) for i in (1, 2)]
    out = [replace(leaf(F32, (n_rows, n, 1, 1)), op="MUL_MAT", src=(i, 0)) for i in (1, 2)]
    graph = Graph((x, *w, *out), (0,), (4,))
    inputs = [np.random.default_rng(n).standard_normal((n, k), np.float32).tobytes()]
    results = []
    for d in (device, reference):
        buffers = {}
        for i, raw in enumerate(data, 1):
            buffers[i] = d.alloc(len(raw))
            d.write(buffers[i], 0, memoryview(raw))
            d.finish(buffers[i], 0, len(raw), int(GGMLType.Q8_0), (k, n_rows, 1, 1))
        (y,) = d.compile(graph, buffers).run(inputs, nothing)
        results.append(np.frombuffer(bytes(y), np.float32).copy())
    assert nmse(*results) < 1e-5
