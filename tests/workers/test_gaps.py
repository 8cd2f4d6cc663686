"""A device looks at its sockets often: steps are cut by what they cost, and what NumPy takes long over is done aside."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings

from bench.gaps import Case, cases, graph_of
from protocol.errors import Cancelled, KernelError
from protocol.graph import Graph
from tests.support.strategies import node_graphs
from workers.devices.cpu import program
from workers.devices.cpu.device import CPUDevice
from workers.devices.cpu.program import PART_COST, Pace, Parts, Run
from workers.devices.reference import ReferenceDevice
from workers.kernels import layout, steps
from workers.kernels.costs import OF_ATTENTION, cost, of_products
from workers.kernels.records import STEPS, Step
from workers.ticks import Alongside, nothing


@pytest.fixture(scope="module")
def cpu(kernels: None) -> Iterator[CPUDevice]:
    d = CPUDevice(2)
    yield d
    d.team.close()


@pytest.mark.parametrize("record", STEPS, ids=lambda r: r.__name__)
def test_a_step_has_a_cost_which_grows_with_it(record: type[Step]) -> None:
    few, many = (record(**dict.fromkeys(record.__struct_fields__, n)) for n in (1, 3))
    assert 0 < cost(few) < cost(many)


def least(step: Step) -> int:
    """What one thread does of a step at least."""
    match step:
        case steps.MulMat(k=k, n=n):
            return of_products(step.kind) * layout.GROUP * k * n
        case steps.PagedAttend(n_pages=n_pages, parts=parts, d=d, d_v=d_v):
            return OF_ATTENTION * layout.TILE * (layout.CHUNK if parts else layout.BLOCK * n_pages) * (d + d_v)
    return 0


@pytest.mark.parametrize("case", cases(1), ids=lambda c: c.name)
def test_no_run_of_a_large_node_costs_more_than_a_slow_core_does_in_a_twentieth_of_a_second(
    cpu: CPUDevice, monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    """A plan is bound, and not run: its weights are addresses of memory that nothing is written to."""
    bound: list[program.Program] = []
    flush = program.Program.flush
    monkeypatch.setattr(program.Program, "flush", lambda self: (bound.append(self), flush(self))[1])
    graph, sizes = graph_of(case)
    buffers = {n: cpu.alloc(size) for n, size in sizes.items()}
    plan = cpu.compile(graph, buffers)
    for b in buffers.values():
        cpu.free(b)
    runs = [part for part in bound[-1].parts if isinstance(part, Run)]
    assert runs or plan.fallbacks
    assert max((run.cost for run in runs), default=0) <= 2 * PART_COST, "each of two threads does a half"
    assert max((least(step) for step in bound[-1].steps), default=0) <= PART_COST


@given(node_graphs())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_in_parts_every_node_has_the_same_bits(cpu: CPUDevice, case: tuple[str, Graph, list[bytes]]) -> None:
    _, graph, inputs = case
    whole = cpu.compile(graph, {})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(program, "PART_COST", 500)
        parts = cpu.compile(graph, {})
    assert len(parts.program) >= len(whole.program)
    want = [bytes(out) for out in whole.run(inputs, nothing)]
    assert [bytes(out) for out in parts.run(inputs, nothing)] == want


class Known(Pace):
    """A pace by which so much is done in one go."""

    together = 0.0

    def did(self, n: int, seconds: float) -> None:
        pass


def test_what_a_fast_team_does_in_parts_it_does_together() -> None:
    done: list[tuple[int, int]] = []
    pace = Known()
    aside = (lambda tick: None, 9)
    parts = Parts([Run(0, 1, 0, 100), Run(1, 2, 1, 100), Run(2, 3, 2, 100), aside, Run(3, 4, 3, 100)],
                  lambda first, last: done.append((first, last)), pace)  # fmt: skip

    def run() -> list[tuple[int, int]]:
        done.clear()
        for do, _ in parts:
            do(nothing)
        return list(done)

    assert run() == [(0, 1), (1, 2), (2, 3), (3, 4)]
    pace.together = 250
    assert run() == [(0, 2), (2, 3), (3, 4)]
    pace.together = 1000
    assert run() == [(0, 3), (3, 4)], "not beyond what the caller's thread does"
    parts.alone = True
    assert run() == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_slower_is_believed_at_once_and_faster_by_and_by() -> None:
    pace = Pace()
    pace.did(1000, 1.0)
    pace.did(8000, 1.0)
    assert pace.together == 2000 * program.TOGETHER_S
    pace.did(500, 1.0)
    pace.did(0, 0.0005)  # too short to say that it is slow
    assert pace.together == 500 * program.TOGETHER_S


class Counted:
    """A tick that is counted, and raises Cancelled at the first call if it is to."""

    def __init__(self, cancels: bool = False) -> None:
        self.n, self._cancels = 0, cancels

    def __call__(self) -> None:
        self.n += 1
        if self._cancels and self.n == 1:
            raise Cancelled("no longer wanted")


def spin(seconds: float) -> str:
    due = time.monotonic() + seconds
    while time.monotonic() < due:
        sum(range(1000))
    return "done"


def test_who_computes_alongside_is_answered_for_and_who_waits_is_not() -> None:
    alongside, computes, waits = Alongside(), Counted(), Counted()
    assert alongside.do(partial(spin, 0.5), computes) == "done" and computes.n > 1
    gate = threading.Event()
    threading.Timer(0.5, gate.set).start()
    assert alongside.do(partial(gate.wait, 10), waits) and waits.n <= 1, "its thread has not run"


def test_what_is_done_alongside_is_done_whole_and_its_errors_are_the_callers() -> None:
    alongside, done = Alongside(), []

    def last() -> None:
        spin(0.3)
        done.append(1)

    with pytest.raises(Cancelled):
        alongside.do(last, Counted(cancels=True))
    assert done == [1]
    with pytest.raises(KernelError, match="no"):
        alongside.do(partial(_raise, KernelError("no")), nothing)
    assert alongside.do(lambda: 3, nothing) == 3


def _raise(error: Exception) -> None:
    raise error


def test_a_large_node_in_numpy_ticks() -> None:
    (case,) = (c for c in cases(8) if c.op == "MUL_MAT_ID")
    device, tick = ReferenceDevice(), Counted()
    graph, sizes = graph_of(case)
    buffers = {n: device.alloc(size) for n, size in sizes.items()}
    assert case.values is not None
    device.compile(graph, buffers).run([ids.tobytes() for ids in case.values.values()], tick)
    assert tick.n > 1
