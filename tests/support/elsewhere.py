"""A device whose memory no pointer of the worker reaches: it lies in a process of its own, and messages go there and back.

It shows what a device needs of the rest, and what it does not. A graph is lowered here; nodes, places and sizes cross over,
and the process there puts them where its memory is, and computes with the reference kernels. As a program this is a worker
that has the device `elsewhere` too, with a worker's options.
"""

from __future__ import annotations

import itertools
import os
import select
import socket
import struct
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import msgpack
import numpy as np

from protocol.dtypes import tensor_bytes
from protocol.encoding import decode_graph, encode_graph
from protocol.errors import DeviceError, GgmqError, HandleError, OutOfMemory, from_wire
from protocol.graph import Graph
from protocol.messages import DeviceInfo
from protocol.ops import COPYABLE, op_of
from tests.support.fixtures import ROOT
from workers import tensors
from workers.devices import DEVICES
from workers.devices.base import COMPUTED, Abilities, Buffer, Device, Plan, Source
from workers.devices.lower import SCRATCH, lower
from workers.kernels import reference
from workers.tensors import Bytes
from workers.ticks import PIECE_BYTES, TICK_S, Tick, completing, nothing

NAME = "elsewhere"
THERE = "--there"
TOTAL_BYTES = 4 << 30
SIZE = struct.Struct("<Q")
Ne = tuple[int, int, int, int]


def _send(stream: BinaryIO, message: Sequence[Any]) -> None:
    data = msgpack.packb(message)
    stream.write(SIZE.pack(len(data)) + data)
    stream.flush()


def _receive(stream: BinaryIO) -> list[Any]:
    """Errors: EOFError when the other process has ended."""
    head = stream.read(SIZE.size)
    if len(head) < SIZE.size:
        raise EOFError
    message = msgpack.unpackb(stream.read(*SIZE.unpack(head)), max_bin_len=TOTAL_BYTES, max_array_len=1 << 24)
    assert isinstance(message, list)  # only `_send` writes there
    return message


# -- here --------------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class NumberedBuffer(Buffer):
    """All that is known here: its number there."""

    number: int


class ElsewherePlan(Plan):
    def __init__(self, device: ElsewhereDevice, graph: Graph, n_nodes: int, number: int) -> None:
        self.graph, self.n_nodes, self.number = graph, n_nodes, number
        self._device = device
        weakref.finalize(self, device.forgotten.append, number)

    def run(self, inputs: Sequence[bytes | memoryview], tick: Tick) -> list[memoryview]:
        expected = [tensor_bytes(t.type, t.ne) for t in (self.graph.tensors[i] for i in self.graph.inputs)]
        if [len(data) for data in inputs] != expected:
            raise HandleError(f"graph takes inputs of {expected} bytes, got {[len(data) for data in inputs]}")
        return [memoryview(out) for out in self._device.ask(tick, "run", self.number, [bytes(data) for data in inputs])]


class ElsewhereDevice(Device[NumberedBuffer]):
    """Attributes:
    forgotten: plans that are no longer wanted here.
    """

    name = NAME
    kind = NAME

    def __init__(self, memory_bytes: int = 0) -> None:
        self._total_bytes, self._used_bytes = memory_bytes or TOTAL_BYTES, 0
        self._numbers = itertools.count(1)
        self.forgotten: list[int] = []
        self._there = subprocess.Popen([sys.executable, "-m", "tests.support.elsewhere", THERE], cwd=ROOT,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip

    def ask(self, tick: Tick, what: str, *arguments: Any) -> Any:
        """Have something done there, and wait for its result; whatever is asked for is done whole."""
        assert self._there.stdin is not None and self._there.stdout is not None  # as it was started
        try:
            while self.forgotten:
                _send(self._there.stdin, ["forget", self.forgotten.pop()])
                _receive(self._there.stdout)
            _send(self._there.stdin, [what, *arguments])
            with completing(tick) as steady:
                while not select.select([self._there.stdout], [], [], TICK_S)[0]:
                    steady()
                code, result = _receive(self._there.stdout)
        except (OSError, EOFError) as e:
            raise DeviceError(f"{NAME}: the process with its memory is gone: {e}") from None
        if code:
            raise from_wire(code, result)
        return result

    def info(self) -> DeviceInfo:
        free = self._total_bytes - self._used_bytes
        return DeviceInfo(self.name, self.kind, "another process", socket.gethostname()[:256], self._total_bytes, free, 1)

    def abilities(self) -> Abilities:
        return Abilities(frozenset(), COMPUTED, frozenset(), frozenset(int(t) for t in COPYABLE))

    def alloc(self, n_bytes: int) -> NumberedBuffer:
        free = self._total_bytes - self._used_bytes
        if n_bytes > free:
            raise OutOfMemory(f"a buffer needs {n_bytes} bytes, {free} are free", n_bytes, free)
        buffer = NumberedBuffer(n_bytes, next(self._numbers))
        self.ask(nothing, "alloc", buffer.number, n_bytes)
        self._used_bytes += n_bytes
        return buffer

    def free(self, buffer: NumberedBuffer, tick: Tick = nothing) -> None:
        self._used_bytes -= buffer.n_bytes
        buffer.n_bytes = 0
        self.ask(tick, "free", buffer.number)

    def trim(self, tick: Tick = nothing) -> None:
        pass

    def write(self, buffer: NumberedBuffer, offset: int, data: bytes | memoryview, tick: Tick = nothing) -> None:
        buffer.check(offset, len(data), "write")
        self.ask(tick, "write", buffer.number, offset, bytes(data))

    def fill(
        self, buffer: NumberedBuffer, offset: int, n_bytes: int, type_id: int, ne: Ne, source: Source,
        tick: Tick = nothing,
    ) -> bool:  # fmt: skip
        buffer.check(offset, n_bytes, "write")
        good, at = False, offset
        try:
            for piece in source.pieces(PIECE_BYTES, tick):
                self.write(buffer, at, piece, tick)
                at += len(piece)
            good = source.good
        finally:
            if not good:
                self.ask(nothing, "zero", buffer.number, offset, n_bytes)
        return good

    def finish(
        self, buffer: NumberedBuffer, offset: int, n_bytes: int, type_id: int, ne: Ne, tick: Tick = nothing
    ) -> None:
        pass

    def read(self, buffer: NumberedBuffer, offset: int, n_bytes: int, tick: Tick = nothing) -> memoryview:
        buffer.check(offset, n_bytes, "read")
        return memoryview(self.ask(tick, "read", buffer.number, offset, n_bytes))

    def copy(
        self, src: NumberedBuffer, src_offset: int, dst: NumberedBuffer, dst_offset: int, n_bytes: int,
        tick: Tick = nothing,
    ) -> None:  # fmt: skip
        src.check(src_offset, n_bytes, "copy from")
        dst.check(dst_offset, n_bytes, "copy to")
        self.ask(tick, "copy", src.number, src_offset, dst.number, dst_offset, n_bytes)

    def compile(self, graph: Graph, buffers: Mapping[int, NumberedBuffer], tick: Tick = nothing) -> ElsewherePlan:
        lowered = lower(graph)
        lowered.check(buffers)
        numbers = {SCRATCH: SCRATCH} | {n: b.number for n, b in buffers.items()}
        places = [(numbers[span.buffer], span.start) for span in lowered.places]
        order = [node.index for node in lowered.nodes]
        plan = ElsewherePlan(self, graph, len(order), next(self._numbers))
        self.ask(tick, "plan", plan.number, encode_graph(graph), places, order, lowered.scratch_bytes)
        return plan


# -- there -------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class FarPlan:
    """A graph, the place of each tensor, nodes in order, and scratch memory."""

    graph: Graph
    places: list[tuple[int, int]]
    order: list[int]
    scratch: Bytes


class Far:
    """Every command is a method of its name."""

    def __init__(self) -> None:
        self.memory: dict[int, Bytes] = {}
        self.plans: dict[int, FarPlan] = {}

    def do_alloc(self, number: int, n_bytes: int) -> None:
        self.memory[number] = np.zeros(n_bytes, np.uint8)

    def do_free(self, number: int) -> None:
        del self.memory[number]

    def do_write(self, number: int, offset: int, data: bytes) -> None:
        self.memory[number][offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def do_zero(self, number: int, offset: int, n_bytes: int) -> None:
        self.memory[number][offset : offset + n_bytes] = 0

    def do_read(self, number: int, offset: int, n_bytes: int) -> bytes:
        return self.memory[number][offset : offset + n_bytes].tobytes()

    def do_copy(self, src: int, src_offset: int, dst: int, dst_offset: int, n_bytes: int) -> None:
        self.do_write(dst, dst_offset, self.do_read(src, src_offset, n_bytes))

    def do_plan(self, number: int, graph: bytes, places: list[Any], order: list[int], scratch_bytes: int) -> None:
        self.plans[number] = FarPlan(decode_graph(graph), places, order, np.zeros(scratch_bytes, np.uint8))

    def do_forget(self, number: int) -> None:
        self.plans.pop(number, None)

    def do_run(self, number: int, inputs: list[bytes]) -> list[bytes]:
        plan = self.plans[number]
        memory, graph = {**self.memory, SCRATCH: plan.scratch}, plan.graph
        missing = {buffer for buffer, _ in plan.places} - set(memory)
        if missing:
            raise HandleError("a buffer of this plan has been freed")

        def place(i: int) -> Bytes:
            (buffer, start), t = plan.places[i], graph.tensors[i]
            return memory[buffer][start : start + tensor_bytes(t.type, t.ne)]

        arrays = [tensors.view(memory[buffer], t, start)
                  for t, (buffer, start) in zip(graph.tensors, plan.places, strict=True)]  # fmt: skip
        for i, data in zip(graph.inputs, inputs, strict=True):
            place(i)[:] = np.frombuffer(data, np.uint8)
        for i in plan.order:
            t = graph.tensors[i]
            op = op_of(t)
            reference.run(reference.Node(i, op, t, op.values(t.params), arrays[i],
                                         [arrays[j] if j >= 0 else None for j in t.src],
                                         [graph.tensors[j] if j >= 0 else None for j in t.src]))  # fmt: skip
        return [place(i).tobytes() for i in graph.outputs]


def serve(commands: BinaryIO, results: BinaryIO) -> None:
    """Until nobody asks any more."""
    far = Far()
    while True:
        try:
            what, *arguments = _receive(commands)
        except EOFError:
            return
        try:
            answer = ["", getattr(far, f"do_{what}")(*arguments)]
        except GgmqError as e:
            answer = [e.code, str(e)]
        except Exception as e:
            answer = ["internal", f"{what}: {type(e).__name__}: {e}"]
        _send(results, answer)


if __name__ == "__main__":
    if sys.argv[1:] == [THERE]:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        serve(sys.stdin.buffer, sys.stdout.buffer)
    else:
        from workers.__main__ import main

        DEVICES[NAME] = lambda n_threads, memory_bytes, cpus: ElsewhereDevice(memory_bytes)
        sys.exit(main())
