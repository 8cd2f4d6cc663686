"""What a device is: buffers, copies, plans. One interface, the same suite for every device."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from protocol.errors import HandleError
from protocol.graph import Graph
from protocol.messages import DeviceInfo
from protocol.ops import OPS
from workers.ticks import Tick, nothing


class Source(Protocol):
    """Bytes that come once, from front to back, and can be told to be right when all have come.

    Attributes:
        good: once all pieces have been taken: whether all came, and were right.
    """

    good: bool

    def pieces(self, size: int, tick: Tick) -> Iterator[memoryview]:
        """`size` bytes after `size` bytes, and what is left at the end. A piece is valid until the next is taken."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Buffer:
    """Bytes on a device, which only the device can reach.

    Attributes:
        n_bytes: what the client asked for; 0 once it is freed.
    """

    n_bytes: int

    def check(self, offset: int, n_bytes: int, what: str) -> None:
        """HandleError unless `offset..offset + n_bytes` lies inside; Python integers do not wrap."""
        if offset < 0 or n_bytes < 0 or offset + n_bytes > self.n_bytes:
            raise HandleError(f"{what}: bytes {offset}..{offset + n_bytes} of a buffer of {self.n_bytes}")


B = TypeVar("B", bound=Buffer)


class StepNote(NamedTuple):
    """A step that ran: what it is called, the node that it begins with (-1: none), and when, by the monotonic clock."""

    title: str
    node: int
    begun_ns: int
    ended_ns: int


class Plan(ABC):
    """A graph compiled for a device: addresses resolved, kernels bound, scratch laid out.

    Attributes:
        took_s: how long its last run took; 0: it has not run.
        fallbacks: ops of the nodes that run the reference kernel because the device has none of its own.
    """

    graph: Graph
    n_nodes: int
    took_s = 0.0
    fallbacks: tuple[str, ...] = ()

    @abstractmethod
    def run(self, inputs: Sequence[bytes | memoryview], tick: Tick) -> list[memoryview]:
        """Run with these inputs; the outputs are views that the next `run` of any plan may overwrite."""

    @property
    def scratch_bytes(self) -> int | None:
        """Scratch memory that a run needs; None: it cannot run between parts of another plan, or is not bound for it now."""
        return None

    def prepare_notes(self, tick: Tick) -> None:
        """Have ready what `run_noted` needs besides, so that the run itself is as any other."""

    def run_noted(self, inputs: Sequence[bytes | memoryview], tick: Tick) -> tuple[list[memoryview], list[StepNote]]:
        """As `run`, and what was done when, as far as the device knows."""
        return self.run(inputs, tick), []


COMPUTED = frozenset(name for name, op in OPS.items() if not op.view and name != "NONE")
"""Ops that something is to be done for."""


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a device can run: ops by their names in the op table, types by their ids. Some it has kernels for, others it runs
    at all."""

    fast_ops: frozenset[str]
    slow_ops: frozenset[str]
    fast_types: frozenset[int]
    slow_types: frozenset[int]


class Device(ABC, Generic[B]):
    """What takes long takes a tick, which it calls between pieces of a few milliseconds.

    Attributes:
        broken: it computes nothing any more in this process, which ends then, so that another can be started.

    Threads: one thread calls; `run` may use others inside.
    """

    name: str
    kind: str
    kernel_compiles = 0
    broken = False

    def profile(self) -> list[str]:
        """Where the time of the plans went, a line each; empty unless GGMQ_PROFILE is set."""
        return []

    def begin(self) -> None:
        """Start what `prepare` waits for, and go on."""

    def prepare(self, tick: Tick = nothing) -> None:
        """Have ready what work needs and descriptions do not; called before the first buffer. May take a while."""

    def share(self, between: Tick | None, short: bool = False) -> None:
        """Have `between` called between parts of plans from now on, where one plan may run `aside` another. short: parts of
        a millisecond, as far as there are any. A device that does its parts by itself calls nothing."""

    @contextlib.contextmanager
    def aside(self, plan: Plan) -> Iterator[None]:
        """Between parts of a plan, another that tells its `scratch_bytes` may run in the block. Its outputs are gone behind
        it."""
        yield

    @abstractmethod
    def info(self) -> DeviceInfo:
        """Name, kind and memory, as they are now."""

    @abstractmethod
    def abilities(self) -> Abilities:
        """What it can run. A node of a fast op may still run slowly, for its strides or other types."""

    def short(self) -> bool:
        """Whether others need the memory that is only kept for later."""
        return False

    def scratch_bytes(self) -> int:
        """What plans have left behind for those that come, and is not free for buffers."""
        return 0

    @abstractmethod
    def alloc(self, n_bytes: int) -> B:
        """A zeroed buffer. Errors: OutOfMemory with both figures."""

    @abstractmethod
    def free(self, buffer: B, tick: Tick = nothing) -> None:
        """Give a buffer's memory back to the system, whoever still points at it."""

    @abstractmethod
    def trim(self, tick: Tick = nothing) -> None:
        """A session has ended: give back what is kept for the next plan and needs not be."""

    @abstractmethod
    def write(self, buffer: B, offset: int, data: bytes | memoryview, tick: Tick = nothing) -> None:
        """Store bytes. Errors: HandleError outside the buffer, before anything is written."""

    @abstractmethod
    def fill(
        self, buffer: B, offset: int, n_bytes: int, type_id: int, ne: tuple[int, int, int, int], source: Source,
        tick: Tick = nothing,
    ) -> bool:  # fmt: skip
        """Store a whole weight that `source` reads, as `write` and `finish` would. False, and zeros, if it was not good.

        Errors: HandleError outside the buffer, before anything is written. After any other there are zeros.
        """

    @abstractmethod
    def finish(
        self, buffer: B, offset: int, n_bytes: int, type_id: int, ne: tuple[int, int, int, int], tick: Tick = nothing
    ) -> None:
        """A whole weight has been written: the device may now hold it in a layout of its own. After an error: zeros."""

    @abstractmethod
    def read(self, buffer: B, offset: int, n_bytes: int, tick: Tick = nothing) -> memoryview:
        """A copy of bytes as they were written. Errors: HandleError outside the buffer."""

    @abstractmethod
    def copy(
        self, src: B, src_offset: int, dst: B, dst_offset: int, n_bytes: int, tick: Tick = nothing
    ) -> None:
        """Copy between buffers; overlap is allowed. Errors: HandleError outside a buffer, before anything is written."""

    @abstractmethod
    def compile(self, graph: Graph, buffers: Mapping[int, B], tick: Tick = nothing) -> Plan:
        """A plan for a validated graph. Errors: UnsupportedOp, OutOfMemory, HandleError."""
