"""Buffers of devices: what takes long is done in pieces, and whatever happens between two a buffer is consistent.

What a device promises is asked of the CPU and of a CUDA device alike, what follows from the host's memory of the CPU.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quantize
from hypothesis import given
from hypothesis import strategies as st

from protocol import messages as m
from protocol.dtypes import GGMLType, contiguous_nb, tensor_bytes
from protocol.encoding import encode_graph, graph_digest
from protocol.errors import Cancelled, HandleError, OutOfMemory
from protocol.graph import Graph, Tensor
from tests.support import cuda_emulated, emulated
from tests.support.attacker import Attacker
from tests.support.fixtures import free_port
from tests.support.processes import WORKER, started
from tests.support.strategies import leaf
from workers.devices.base import Device
from workers.devices.cpu import program
from workers.devices.cpu.device import CPUDevice
from workers.devices.cpu.weights import Copy
from workers.devices.cuda.device import CUDADevice
from workers.devices.host import Arena
from workers.executor import rss_bytes
from workers.ticks import PIECE_BYTES, Tick, nothing

MIB = 1 << 20
NE = (1024, 12 * 1024 + 8, 1, 1)
N = tensor_bytes(GGMLType.Q8_0, NE)
"""Some 13 MiB, and eight rows more than whole groups."""


@pytest.fixture(scope="module")
def cpu(kernels: None) -> Iterator[CPUDevice]:
    d = CPUDevice(2)
    yield d
    d.team.close()


@pytest.fixture(scope="module", params=["CPU", cuda_emulated.NAME])
def device(request: pytest.FixtureRequest) -> Device[Any]:
    if request.param == "CPU":
        return request.getfixturevalue("cpu")
    if not emulated.compiler()[0]:
        pytest.skip(emulated.compiler()[1])
    return CUDADevice("CUDA0", emulated.EmulatedDriver(compares=False))


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, N, np.uint8)


class Counted:
    """A tick that is counted, and raises Cancelled at one of its calls."""

    def __init__(self, cancel_at: int = -1) -> None:
        self.n, self.cancel_at = 0, cancel_at

    def __call__(self) -> None:
        self.n += 1
        if self.n == self.cancel_at:
            raise Cancelled("no longer wanted")


def filled(device: Device[Any], weights: np.ndarray) -> Any:
    buffer = device.alloc(N)
    assert device.fill(buffer, 0, N, GGMLType.Q8_0, NE, Copy(weights))
    assert list(buffer.packed) == [0]
    return buffer


def change(device: Device[Any], buffer: Any, how: str, weights: np.ndarray, tick: Tick) -> None:
    """One of the things that take long."""
    if how == "fill":
        device.fill(buffer, 0, N, GGMLType.Q8_0, NE, Copy(weights), tick)
    elif how == "finish":
        device.write(buffer, 0, weights.data)
        device.finish(buffer, 0, N, GGMLType.Q8_0, NE, tick)
    elif how == "fill unpacked":
        device.fill(buffer, 0, N - N % 4, GGMLType.F32, (N // 4, 1, 1, 1), Copy(weights[: N - N % 4]), tick)
    elif how == "unpack":
        device.write(buffer, N - 8, b"8 bytes.", tick)
    elif how == "read":
        device.read(buffer, 0, N, tick)
    else:
        device.copy(buffer, 0, buffer, 1000, N - 1000, tick)


NO_TIME = ("finish", "unpack")
"""On a CUDA device."""


@pytest.mark.parametrize("how", ["fill", "finish", "fill unpacked", "unpack", "read", "copy"])
def test_what_takes_long_ticks_between_pieces(device: Device[Any], weights: np.ndarray, how: str) -> None:
    if isinstance(device, CUDADevice) and how in NO_TIME:
        pytest.skip("no byte of it passes the host")
    buffer, tick = filled(device, weights), Counted()
    change(device, buffer, how, weights, tick)
    assert tick.n >= N // PIECE_BYTES
    device.free(buffer)


@pytest.mark.parametrize("how", ["fill", "finish", "fill unpacked"])
def test_a_weight_that_is_cancelled_leaves_zeros(device: Device[Any], weights: np.ndarray, how: str) -> None:
    if isinstance(device, CUDADevice) and how in NO_TIME:
        pytest.skip("nothing is cancelled in the midst of it")
    buffer = device.alloc(N)
    with pytest.raises(Cancelled):
        change(device, buffer, how, weights, Counted(5))
    assert not buffer.packed and not np.frombuffer(device.read(buffer, 0, N), np.uint8).any()
    assert device.fill(buffer, 0, N, GGMLType.Q8_0, NE, Copy(weights))
    assert device.read(buffer, 0, N) == weights.tobytes()
    device.free(buffer)


def test_what_is_unpacked_is_unpacked_whole(device: Device[Any], weights: np.ndarray) -> None:
    """A tensor that was loaded is not lost to a request that needed it in another layout and was cancelled."""
    buffer = filled(device, weights)
    with pytest.raises(Cancelled):
        change(device, buffer, "unpack", weights, Counted(1))
    assert not buffer.packed and device.read(buffer, 0, N) == weights.tobytes()
    device.free(buffer)


@pytest.mark.parametrize("low, high", [(0, N), (5, 6), (N - 3 * 1088 - 7, N), (PIECE_BYTES - 3, 3 * PIECE_BYTES + 11)])
def test_any_part_of_a_packed_tensor_is_read(device: Device[Any], weights: np.ndarray, low: int, high: int) -> None:
    buffer = filled(device, weights)
    assert device.read(buffer, low, high - low) == weights[low:high].tobytes()
    device.free(buffer)


@pytest.mark.parametrize("start, to", [(0, 3 * MIB + 5), (3 * MIB + 5, 0), (MIB, MIB + 1), (0, 0)])
def test_a_copy_may_overlap(device: Device[Any], weights: np.ndarray, start: int, to: int) -> None:
    buffer, n = filled(device, weights), 9 * MIB
    expected = weights.copy()
    expected[to : to + n] = weights[start : start + n]
    device.copy(buffer, start, buffer, to, n)
    assert device.read(buffer, 0, N) == expected.tobytes()
    device.free(buffer)


def test_freed_memory_goes_back_whoever_points_at_it(cpu: CPUDevice, weights: np.ndarray) -> None:
    buffer = cpu.alloc(200 * MIB)
    buffer.memory[:] = 1
    held, tick, before = buffer.memory, Counted(), rss_bytes()
    cpu.free(buffer, tick)
    assert before - rss_bytes() > 190 * MIB and tick.n >= 3
    assert not held[:: MIB].any()
    buffer = cpu.alloc(200 * MIB)
    with pytest.raises(Cancelled):
        cpu.free(buffer, Counted(1))
    assert cpu.used_bytes == 0 and buffer.n_bytes == 0


# -- plans -------------------------------------------------------------------------------------------------------------


def product(type_id: int, ne: tuple[int, int, int, int], n_columns: int = 1) -> Graph:
    """Weights of buffer 1 times columns that are an input."""
    out = (ne[1], n_columns, 1, 1)
    y = Tensor(GGMLType.F32, "MUL_MAT", out, contiguous_nb(GGMLType.F32, out), src=(0, 1))
    return Graph((leaf(type_id, ne, 1), leaf(GGMLType.F32, (ne[0], n_columns, 1, 1)), y), (1,), (2,))


def fallback(ne: tuple[int, int, int, int]) -> Graph:
    """A graph that needs its weights in GGUF's layout."""
    w = leaf(GGMLType.Q8_0, ne, 1)
    out = Tensor(GGMLType.F32, "CPY", ne, contiguous_nb(GGMLType.F32, ne), src=(0, 1))
    return Graph((w, leaf(GGMLType.F32, ne), replace(out, view_src=1)), (1,), (2,))


@pytest.mark.parametrize("make", [lambda: product(GGMLType.Q8_0, NE), lambda: product(GGMLType.IQ2_XXS, (256, 64, 1, 1))],
                         ids=["packed", "widened"])  # fmt: skip
def test_nothing_of_a_plan_is_left_without_the_collector(device: Device[Any], make: Callable[[], Graph]) -> None:
    graph = make()
    w = graph.tensors[0]
    buffer = device.alloc(tensor_bytes(w.type, w.ne))
    columns = np.ones(w.ne[0], np.float32).tobytes()
    gc.disable()
    try:
        plan = device.compile(graph, {1: buffer})
        plan.run([columns], nothing)
        memory = weakref.ref(buffer.memory)
        gone = weakref.ref(plan)
        device.free(buffer)
        with pytest.raises(HandleError):  # not even by a mistake of ours does it read what is no longer there
            plan.run([columns], nothing)
        del plan, buffer
        assert gone() is None and memory() is None
    finally:
        gc.enable()
    device.trim()
    assert device.used_bytes == 0
    assert not isinstance(device, CPUDevice) or device.scratch_bytes() == 0


@pytest.mark.parametrize("type_id", [GGMLType.Q8_0, GGMLType.F32])
@pytest.mark.parametrize("n_columns", [1, 5, 40])
def test_a_large_product_is_several_steps_with_the_same_bits(
    cpu: CPUDevice, monkeypatch: pytest.MonkeyPatch, type_id: GGMLType, n_columns: int
) -> None:
    rng, ne = np.random.default_rng(4), (64, 1000 + 9, 1, 1)
    raw = rng.standard_normal((ne[1], ne[0]), np.float32)
    if type_id == GGMLType.Q8_0:
        raw = quantize(raw, GGMLQuantizationType.Q8_0)
    columns = rng.standard_normal((n_columns, ne[0]), np.float32).tobytes()
    results, steps = [], []
    for part_cost in (program.PART_COST, 10_000):
        monkeypatch.setattr(program, "PART_COST", part_cost)
        buffer = cpu.alloc(raw.nbytes)
        assert cpu.fill(buffer, 0, raw.nbytes, type_id, ne, Copy(raw.reshape(-1).view(np.uint8)))
        plan = cpu.compile(product(type_id, ne, n_columns), {1: buffer})
        results.append(bytes(plan.run([columns], nothing)[0]))
        steps.append(len(plan.program))
        cpu.free(buffer)
    assert results[0] == results[1]
    assert steps[1] > steps[0]


def widened_inputs() -> tuple[tuple[int, int, int, int], np.ndarray, bytes]:
    ne = (256, 4096, 1, 1)
    rng = np.random.default_rng(5)
    blocks = rng.integers(0, 256, tensor_bytes(GGMLType.IQ2_XXS, ne), np.uint8).reshape(-1, 66)
    blocks[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    return ne, blocks.reshape(-1), rng.standard_normal(256).astype(np.float32).tobytes()


def test_widened_weights_are_counted_and_follow_what_is_written(kernels: None) -> None:
    ne, blocks, columns = widened_inputs()
    n, halves = len(blocks), 2 * ne[0] * ne[1]
    device = CPUDevice(1, n + halves + 8 * MIB)
    graph = product(GGMLType.IQ2_XXS, ne)
    buffer = device.alloc(n)
    device.write(buffer, 0, blocks.data)
    with pytest.raises(Cancelled):
        device.compile(graph, {1: buffer}, Counted(2))
    assert device.used_bytes == n and not buffer.widened
    tick = Counted()
    plan = device.compile(graph, {1: buffer}, tick)
    assert tick.n >= 3 and device.used_bytes == n + halves
    first = bytes(plan.run([columns], nothing)[0])
    other = device.alloc(6 * MIB)
    with pytest.raises(OutOfMemory):
        device.alloc(4 * MIB)
    device.free(other)
    device.write(buffer, 0, bytes(n))  # the copy of what was there before must not be used any more
    assert device.used_bytes == n
    second = np.frombuffer(plan.run([columns], nothing)[0], np.float32)
    assert np.frombuffer(first, np.float32).any() and not second.any()
    device.free(buffer)
    assert device.used_bytes == 0
    small = CPUDevice(1, n + halves - 1)
    buffer = small.alloc(n)
    with pytest.raises(OutOfMemory, match=f"needs {halves} bytes more"):
        small.compile(graph, {1: buffer})
    for d in (device, small):
        d.team.close()


def test_a_plan_whose_weights_change_layout_can_be_cancelled_and_run_again(device: Device[Any], weights: np.ndarray) -> None:
    """A cancelled change of layout leaves a plan that is bound whole before it runs."""
    buffer = filled(device, weights)
    plan = device.compile(product(GGMLType.Q8_0, NE), {1: buffer})
    columns = np.ones(NE[0], np.float32).tobytes()
    expected = bytes(plan.run([columns], nothing)[0])
    unpacks = device.compile(fallback(NE), {1: buffer})
    assert unpacks.fallbacks == (() if device.kind == "cuda" else ("CPY",)) and plan.fallbacks == ()
    assert not buffer.packed
    assert bytes(plan.run([columns], nothing)[0]) == expected
    device.trim()  # a session ended meanwhile
    assert bytes(plan.run([columns], nothing)[0]) == expected
    device.finish(buffer, 0, N, GGMLType.Q8_0, NE)
    with pytest.raises(Cancelled):
        device.compile(fallback(NE), {1: buffer}, Counted(1 if device.kind == "cuda" else 3))
    assert bytes(plan.run([columns], nothing)[0]) == expected
    device.free(buffer)


def test_a_worker_says_once_what_runs_without_a_kernel(kernels: None, tmp_path: Path) -> None:
    ne, log, port = (64, 3, 1, 1), tmp_path / "log", free_port()
    frame = encode_graph(fallback(ne))
    command = [*WORKER, "-p", str(port), "-t", "1", "-d", "CPU", "--insecure"]
    counts = []
    with open(log, "wb") as f, started(command, stderr=f):
        a = Attacker(port, b"slow")
        for session in (1, 2):
            a.ask(m.AllocBuffer(session, 1, tensor_bytes(GGMLType.Q8_0, ne)))
            assert a.code(m.GraphPut(session, graph_digest(frame)), frame) == "ok"
            assert a.code(m.StageCompute(session, graph_digest(frame), 1), bytes(4 * 64 * 3)) == "ok"
            stats = a.ask(m.StatsQuery()).header
            assert isinstance(stats, m.Stats)
            counts.append(stats.n_fallbacks)
        a.close()
    assert counts == [1, 2]
    assert log.read_text().count("worker: CPU: no kernel of its own for CPY") == 1


# -- whatever order things come in -------------------------------------------------------------------------------------

SIZE = 40_000
LOADED = (GGMLType.F32, GGMLType.F16, GGMLType.Q8_0, GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.IQ2_XXS)
PARTS = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda p: (min(p), max(p) - min(p)))
PLACES = st.tuples(st.integers(0, 40), st.sampled_from((64, 64, 64, 16, 2))).map(lambda p: p[0] * p[1])
WEIGHTS = st.tuples(st.sampled_from(LOADED), st.sampled_from((8, 16, 24, 40, 5)), st.sampled_from((1, 1, 1, 2)))
CHANGES = st.one_of(
    st.tuples(st.sampled_from(("fill", "finish", "spoilt")), st.integers(0, 1), PLACES, WEIGHTS),
    st.tuples(st.sampled_from(("write", "read")), st.integers(0, 1), PARTS),
    st.tuples(st.just("copy"), st.integers(0, 1), PARTS, st.integers(0, 1), st.integers(0, SIZE)),
)


class Spoilt(Copy):
    """Bytes that turn out to be wrong."""

    def pieces(self, size: int, tick: Tick) -> Iterator[memoryview]:
        yield from super().pieces(size, tick)
        self.good = False


@given(changes=st.lists(CHANGES, min_size=2, max_size=8), seed=st.integers(0, 1 << 16))
def test_buffers_hold_what_was_stored_last(device: Device[Any], changes: list[Any], seed: int) -> None:
    """Whatever the layout of what lies there is in between."""
    rng = np.random.default_rng(seed)
    buffers, held = [device.alloc(SIZE) for _ in range(2)], np.zeros((2, SIZE), np.uint8)
    for what, number, place, *more in changes:
        buffer, bytes_held = buffers[number], held[number]
        if what in ("fill", "finish", "spoilt"):
            type_id, n_rows, n_planes = more[0]
            ne = (256, n_rows, n_planes, 1)
            n = tensor_bytes(type_id, ne)
            if place + n > SIZE:
                continue
            data = rng.integers(0, 256, n, np.uint8)
            bytes_held[place : place + n] = data if what != "spoilt" else 0
            if what == "finish":
                device.write(buffer, place, data.data)
                device.finish(buffer, place, n, type_id, ne)
                continue
            source = Copy(data) if what == "fill" else Spoilt(data)
            assert device.fill(buffer, place, n, type_id, ne, source) == (what == "fill")
        elif what == "write":
            at, n = place
            bytes_held[at : at + n] = rng.integers(0, 256, n, np.uint8)
            device.write(buffer, at, bytes_held[at : at + n].data)
        elif what == "read":
            at, n = place
            assert device.read(buffer, at, n) == bytes_held[at : at + n].tobytes()
        else:
            (at, n), (to, where) = place, more
            n = min(n, SIZE - where)
            device.copy(buffer, at, buffers[to], where, n)
            held[to, where : where + n] = bytes_held[at : at + n].copy()
    for buffer, bytes_held in zip(buffers, held, strict=True):
        assert device.read(buffer, 0, SIZE) == bytes_held.tobytes()
        device.free(buffer)


@pytest.mark.skipif(sys.platform != "linux", reason="where Linux tells how memory was asked for")
def test_address_space_that_is_reserved_is_not_counted() -> None:
    """Else a process that reserves as much as its host has could start no other any more."""
    arena = Arena(lambda: 1 << 34, lambda: 1 << 34)
    address = f"{arena.address:x}-"
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    assert any(line.startswith(address) for line in lines)
    flags = next(line for line in lines if line.startswith("VmFlags:")).split()
    assert "nr" in flags and "ac" not in flags
