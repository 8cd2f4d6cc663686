"""Plans of the CUDA device: bound to addresses, captured once, and bound again when something has moved."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from protocol.dtypes import GGMLType
from protocol.errors import Cancelled, HandleError, KernelError
from protocol.graph import Graph, Tensor
from tests.support.emulated import EmulatedDriver, compiler
from tests.support.emulated.driver import PRIMITIVES, EmulatedFunction, Recorded
from tests.support.strategies import leaf
from workers.devices.bindings import Bindings
from workers.devices.cuda.binding import Binder
from workers.devices.cuda.device import CUDADevice
from workers.devices.cuda.plan import CUDAPlan
from workers.devices.cuda.weights import CUDABuffer
from workers.devices.lower import Node, lower
from workers.kernels.cuda.launches import LAUNCHES, Launch, declarations, launch
from workers.kernels.cuda.sources import FOLDER, Kernel
from workers.kernels.records import Address, Count, NodeIndex
from workers.ticks import TICK_S, Tick, nothing

pytestmark = pytest.mark.skipif(not compiler()[0], reason=compiler()[1])

N = 100
NE = (N, 1, 1, 1)


@launch("trial.square", "square")
class Square(Launch, frozen=True, kw_only=True):
    """Numbers from 1000 on are found to be wrong."""

    x: Address
    y: Address
    n: Count
    status: Address
    node: NodeIndex


SOURCE = "\n".join([PRIMITIVES, declarations("trial"), (FOLDER / "common.cuh").read_text(), """
KERNEL(256) square(Square a) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.n) return;
    float x = ((const float*)a.x)[i];
    if (x >= 1000.0f) report(a.status, a.node);
    ((float*)a.y)[i] = x * x;
}
"""])  # fmt: skip
LAUNCHES.remove(Square)  # it is a kernel of these tests only

BINDINGS = Bindings()


@BINDINGS.of("SCALE")
def square(b: Binder, n: Node) -> bool:
    b.add(n, Square(x=b.address(n.tensor.src[0]), y=b.address(n.index), n=N, status=b.status, node=n.index), 1)
    return True


class Observed(EmulatedDriver):
    """Attributes: said: what it was asked for, in order; late_s: how long the stream takes."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self.late_s = 0.0

    def function(self, kernel: Kernel, tick: Tick = nothing) -> EmulatedFunction:
        self.said.append("function")
        return self.compiled("trial", "square", Square, SOURCE)

    def alloc(self, n_bytes: int) -> int:
        self.said.append("alloc")
        return super().alloc(n_bytes)

    def staging(self, n_bytes: int) -> memoryview:
        self.said.append("staging")
        return super().staging(n_bytes)

    def synchronize(self) -> None:
        self.said.append("synchronize")
        super().synchronize()

    def capture(self, do: Callable[[], None]) -> Recorded:
        self.said.append("capture")
        return super().capture(do)

    def record(self) -> Callable[[], bool]:
        self.said.append("record")
        done, due = super().record(), time.monotonic() + self.late_s
        return lambda: time.monotonic() >= due and done()

    def taken(self) -> list[str]:
        """What was said since this was asked last."""
        said, self.said = self.said, []
        return said


@pytest.fixture
def driver() -> Observed:
    return Observed()


@pytest.fixture
def device(driver: Observed) -> CUDADevice:
    return CUDADevice("CUDA0", driver)


def node(op: str, *src: int, n: int = N) -> Tensor:
    return replace(leaf(GGMLType.F32, (n, 1, 1, 1)), op=op, src=src, params=(0,) * 16)


def chain(*ops: str, buffer: int = 0) -> Graph:
    """One op behind the other, of an input or of what a buffer holds."""
    x = leaf(GGMLType.F32, NE, buffer)
    return Graph((x, *(node(op, i) for i, op in enumerate(ops))), () if buffer else (0,), (len(ops),))


def compiled(device: CUDADevice, graph: Graph, buffer: CUDABuffer | None = None) -> CUDAPlan:
    plan = CUDAPlan(device, lower(graph), {1: buffer} if buffer is not None else {}, BINDINGS)
    plan.bind(nothing)
    return plan


X = np.arange(N, dtype=np.float32) % 10


def results(plan: CUDAPlan, *inputs: np.ndarray) -> np.ndarray:
    (out,) = plan.run([x.tobytes() for x in inputs], nothing)
    return np.frombuffer(bytes(out), np.float32)


def test_a_plan_is_captured_once_and_waits_once(driver: Observed, device: CUDADevice) -> None:
    plan = compiled(device, chain("SCALE", "SCALE"))
    assert plan.fallbacks == ()
    driver.taken()
    for i in range(5):
        assert np.array_equal(results(plan, X + i), (X + i) ** 4)
        assert driver.taken() == (["capture", "record"] if i == 1 else ["record"])
        assert driver.n_launches == 2 * (i + 1)


def test_an_index_that_is_wrong_is_said_and_forgotten(device: CUDADevice) -> None:
    plan = compiled(device, chain("SCALE", "SCALE"))
    for _ in range(3):
        with pytest.raises(KernelError, match=r"node 2 \(SCALE\): an index points outside"):
            results(plan, X + 40)
        assert np.array_equal(results(plan, X), X**4)


@pytest.mark.parametrize("ops", [("SQRT",), ("SCALE", "SQRT"), ("SQRT", "SCALE"), ("SCALE", "SQRT", "SQRT", "SCALE")])
def test_what_has_no_kernel_is_computed_between(driver: Observed, device: CUDADevice, ops: tuple[str, ...]) -> None:
    plan = compiled(device, chain(*ops))
    assert plan.fallbacks == ("SQRT",) * ops.count("SQRT")
    expected = X
    for op in ops:
        expected = np.sqrt(expected) if op == "SQRT" else expected**2
    for _ in range(3):
        assert np.allclose(results(plan, X), expected, 1e-6)
    assert "capture" not in driver.taken()


def test_each_launch_has_a_note(device: CUDADevice) -> None:
    plan = compiled(device, chain("SCALE", "SQRT", "SCALE"))
    out, notes = plan.run_noted([X.tobytes()], nothing)
    assert np.allclose(np.frombuffer(out[0], np.float32), np.sqrt(X**2) ** 2, 1e-6)
    assert [(n.title, n.node) for n in notes] == [("square", 1), ("SQRT in NumPy", 2), ("square", 3)]
    assert all(a.ended_ns <= b.begun_ns for a, b in pairwise(notes))


def test_plans_share_scratch_memory_that_may_move(driver: Observed, device: CUDADevice) -> None:
    first = compiled(device, chain("SCALE", "SCALE"))
    for _ in range(3):
        results(first, X)
    n = 1 << 19
    second = compiled(device, Graph((leaf(GGMLType.F32, (n, 1, 1, 1)), node("SCALE", 0, n=n)), (0,), (1,)))
    driver.taken()
    for i in range(4):
        assert np.array_equal(results(first, X + i), (X + i) ** 4)
        assert ("capture" in driver.taken()) == (i == 1), "it was bound again"
        assert np.array_equal(results(second, np.full(n, 3, np.float32))[:N], np.full(N, 9, np.float32))
        driver.taken()


def test_a_buffer_whose_layout_changes_binds_its_plans_again(driver: Observed, device: CUDADevice) -> None:
    buffer = device.alloc(4 * N)
    device.write(buffer, 0, X.tobytes())
    plan = compiled(device, chain("SCALE", buffer=1), buffer)
    for _ in range(3):
        assert np.array_equal(results(plan), X**2)
    driver.taken()
    device.write(buffer, 0, (X + 1).tobytes())
    assert np.array_equal(results(plan), (X + 1) ** 2)
    assert "function" not in driver.taken(), "other bytes at the same place"
    buffer.n_layouts += 1
    assert np.array_equal(results(plan), (X + 1) ** 2)
    assert driver.taken().count("function") == 1
    device.free(buffer)
    with pytest.raises(HandleError):
        results(plan)


def test_memory_is_given_back(driver: Observed, device: CUDADevice) -> None:
    plan = compiled(device, chain("SCALE"))
    results(plan, X)
    free, _ = driver.memory()
    buffer = device.alloc(1 << 20)
    plan = compiled(device, chain("SCALE", buffer=1), buffer)
    results(plan), results(plan)
    assert device.used_bytes == 1 << 20 and driver.memory()[0] == free - (1 << 20)
    device.free(buffer)
    assert device.used_bytes == 0 and driver.memory()[0] == free


def test_a_run_that_is_no_longer_wanted_ends_before_the_next_begins(driver: Observed, device: CUDADevice) -> None:
    other = compiled(device, chain("SCALE"))
    both = Graph((leaf(GGMLType.F32, NE), node("SCALE", 0), node("SCALE", 1)), (0,), (1, 2))
    one = compiled(device, both)  # with an output where the other has its input

    def cancel() -> None:
        raise Cancelled("no longer wanted")

    for _ in range(3):
        driver.late_s = 2 * TICK_S
        with pytest.raises(Cancelled):
            one.run([(X + 5).tobytes()], cancel)
        driver.late_s = 0.0
        assert np.array_equal(results(other, X), X**2)


def test_inputs_that_do_not_fit_are_refused(device: CUDADevice) -> None:
    plan = compiled(device, chain("SCALE"))
    for inputs in ([], [b"1234"], [X.tobytes(), b""]):
        with pytest.raises(HandleError):
            plan.run(inputs, nothing)
    assert np.array_equal(results(plan, X), X**2)
