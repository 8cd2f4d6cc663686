"""Keeps the layers of a model on devices that are ready, whatever becomes of workers and of the broker.

What a lost device had goes to others, and the rest stays where it is. What is loaded again is empty of what was read: the
engine reads it again (`Engine`). A device that is to be left is left between two batches, with what it has read.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import msgspec

from config.clock import LivedClock
from ggmq.archs.base import Arch
from ggmq.archs.memory import Room
from ggmq.bus import with_room
from ggmq.cluster import Client
from ggmq.loader import Loader, Part, PlacedStage
from ggmq.pages import Store
from ggmq.placement import Assignment, device_memory, model_sizes, refill, regrown
from protocol import limits
from protocol import messages as m
from protocol.dtypes import GGMLType
from protocol.errors import (
    ConfigError,
    DeadlineExceeded,
    GgmqError,
    HandleError,
    OutOfMemory,
    Overloaded,
    Unavailable,
    WorkerLost,
)

PATIENCE_S = 8.0
"""For so long a lost worker, or a broker that has gone, is waited for where nobody takes its place, if nothing is said."""
HUNG_S = 90.0
"""For so long a worker that answers nothing is waited for where nobody takes its place."""
SILENT_S = 8.0
"""A worker that answers nothing for longer is done without, if others have room for what it holds: who only sleeps a little
keeps what he has."""
BACK_S, RESTARTED_S = 3.0, 1.0
"""A worker that dialled a broker which was started again comes back within so long; after the second another process of the
same name is taken for it."""
POLL_S = 0.05
REVIVE_S = 5.0
"""A worker that is started is there within so long."""
N_MOVING = 16
"""Chunks of memory that are on their way from a device to another."""

Plan = Callable[[Sequence[m.ListedDevice]], list[Assignment]]


class Keeper:
    """Attributes:
    stages: what lies where; the list is the model's, and stays the same object.
    empty: layers that were loaded again, and hold nothing of what was read; who has read it again empties this.
    infos: the devices as they were when something was last placed.
    plan: where a whole model goes.
    hashes: BLAKE3 of each tensor.
    patience_s: for so long a lost worker, or a broker that has gone, is waited for where nobody takes its place.
    revive: has new workers started for those of this host that have ended; whether any were.
    note: told what a user should know while something is waited for.
    Threads: use from one.
    """

    def __init__(self, client: Client, arch: Arch, loader: Loader, stages: list[PlacedStage], store: Store, room: Room,
                 activations: GGMLType) -> None:  # fmt: skip
        self.client, self.stages, self.store = client, stages, store
        self._loader, self._sizes = loader, model_sizes(arch, room)
        self._rounded = activations != GGMLType.F32
        self.empty: set[int] = set()
        self.infos: list[m.ListedDevice] = []
        self.plan: Plan = lambda infos: refill(self._sizes, (), device_memory(infos))
        self.hashes: dict[str, bytes] = {}
        self.patience_s = PATIENCE_S
        self.revive: Callable[[], bool] = lambda: False
        self.note: Callable[[str], None] = lambda text: None
        self._n_stages, self._session = len(stages), client.session
        self._squeezed: list[range] = []
        self._left: dict[int, list[int]] = {}
        self._stuck: set[int] = set()
        self._secrets: dict[int, tuple[int, bytes]] = {}

    # -- when something is gone ----------------------------------------------------------------------------------------

    def restore(self, error: Unavailable) -> None:
        """Have all layers on devices that are ready; what cannot be had elsewhere is waited for.

        Errors: Unavailable when the wait was in vain; `error` where waiting is of no use.
        """
        if isinstance(error, (Overloaded, DeadlineExceeded)):
            raise error
        clock, said, patience_s = LivedClock(), "", self.patience_s
        since_s = clock.now_s()
        while True:
            if self.client.lost:
                self.note(f"{self.client.lost}; waiting for it, {self.patience_s:.0f} s at most")
                self.client.reopen(self.patience_s)
                since_s = clock.now_s()
            waited_s = clock.now_s() - since_s
            try:
                if self._session != self.client.session:
                    self._renumber()
                self.client.cancel()
                self.client.settle()
                why, limit_s = self._place(waited_s)
                if not why:
                    self._fill()
                    self.revive()
                    self.client.changed = True  # a device may be to be left meanwhile: that is seen to next
                    return
            except OutOfMemory as e:  # some other worker of its host may keep what nobody uses
                why, limit_s = str(e), patience_s
                with contextlib.suppress(Unavailable):
                    self.client.settle()
                    self.client.release()
            except HandleError as e:  # of a device that was forgotten, since nobody held anything there when it went
                why, limit_s = str(e), patience_s
            except Unavailable as e:
                if self.client.lost:
                    continue
                if isinstance(e, (Overloaded, DeadlineExceeded)):
                    raise
                error, why, limit_s = e, str(e), patience_s
            if self.revive():  # they come by themselves
                patience_s = max(patience_s, REVIVE_S)
            if waited_s > max(limit_s, patience_s):
                raise Unavailable(f"{error}; nobody took its place within {waited_s:.0f} s: {why}") from None
            if said != why and waited_s > POLL_S:
                self.note(f"{why}; waiting, {limit_s:.0f} s at most")
                said = why
            time.sleep(POLL_S)

    def _devices(self) -> list[m.ListedDevice]:
        self.client.changed = False
        return self.client.devices()

    def _state(self, infos: Sequence[m.ListedDevice], device: int) -> str:
        return infos[device].state if 0 <= device < len(infos) else "none"

    def _renumber(self) -> None:
        """The broker is another one: the devices have other numbers, and what they hold is asked for anew: weights by what
        they are, what was read by its secret."""
        self._left.clear()
        for stage in self.stages:
            where = self._process(self.infos, stage.assignment.device)
            self._secrets |= {il: (where, p.secret) for il, p in stage.parts.items() if p.loaded and il not in self.empty}
        clock = LivedClock()
        since_s = clock.now_s()
        used = {s.assignment.device for s in self.stages if s.assignment.device < len(self.infos)}
        while True:
            infos, waited_s = self._devices(), clock.now_s() - since_s
            numbers = found_again({d: self.infos[d] for d in used}, infos, others=waited_s > RESTARTED_S)
            if len(numbers) == len(used) or waited_s > BACK_S:
                break
            time.sleep(POLL_S)
        for stage in self.stages:
            number = numbers.get(stage.assignment.device, len(infos))
            stage.assignment = msgspec.structs.replace(stage.assignment, device=number)
            stage.parts = {}
        self.infos, self._session = infos, self.client.session

    @staticmethod
    def _name(infos: Sequence[m.ListedDevice], device: int) -> tuple[str, str]:
        return (infos[device].worker, infos[device].name) if device < len(infos) else ("", "")

    @staticmethod
    def _process(infos: Sequence[m.ListedDevice], device: int) -> int:
        return infos[device].process if device < len(infos) else 0

    def _place(self, waited_s: float) -> tuple[str, float]:
        """Say where each layer goes. Returns: why it cannot be said yet, and for how long that may be waited for.

        Errors: Unavailable.
        """
        infos = self._devices()
        states = {s.assignment.device: self._state(infos, s.assignment.device) for s in self.stages}
        silent = [d for d, state in states.items() if state == "silent"]
        names = ", ".join(f"{infos[d].worker} ({infos[d].name})" for d in silent)
        if silent and waited_s < SILENT_S:
            return f"worker {names} answers nothing", HUNG_S
        gone = {d for d, state in states.items() if state != "ready"}
        if not gone:
            self._lay([s.assignment for s in self.stages], infos)
            return "", 0.0
        try:
            self._lay(self._without(gone, infos), infos)
        except (OutOfMemory, ConfigError) as e:
            return (f"worker {names} answers nothing", HUNG_S) if silent else (str(e), self.patience_s)
        self.infos = infos
        return "", 0.0

    def _without(self, gone: set[int], infos: Sequence[m.ListedDevice]) -> list[Assignment]:
        """Where the layers go if these devices have none. Errors: OutOfMemory, ConfigError, Unavailable."""
        kept = [s.assignment for s in self.stages if s.assignment.device not in gone]
        if not kept:
            with contextlib.suppress(OutOfMemory, ConfigError):
                return self.plan(infos)
        cuts = [s.assignment.layers for s in self.stages] if self._rounded else ()
        return refill(self._sizes, kept, device_memory(with_room(self.client, infos)), cuts)

    def _lay(self, assignments: Sequence[Assignment], infos: Sequence[m.ListedDevice]) -> None:
        """Have these stages. Parts that are loaded stay where they are, and what their device does not hold is unsaid."""
        holding = self._holding()
        self._squeezed += [s.assignment.layers for s in self.stages
                           if s.assignment.device not in {a.device for a in assignments}]  # fmt: skip
        new = []
        for a in assignments:
            parts: dict[int, Part] = {}
            for il, part in [x for s in self.stages if s.assignment.device == a.device for x in s.parts.items()]:
                if part.loaded and a.device not in holding:
                    continue  # one that is not loaded goes on where it was
                if il >= 0 and il in a.layers:
                    parts[il] = part
                elif il < 0:
                    parts[min([0, *parts]) - 1] = part
            placed = self._loader.place(a, parts)
            self._reclaim(placed, infos)
            new.append(placed)
        if len(new) >= self._n_stages:
            self._squeezed.clear()
        self._have(new)

    def _reclaim(self, placed: PlacedStage, infos: Sequence[m.ListedDevice]) -> None:
        """What layers had read on this device through a broker that has gone is to be found there."""
        where = self._process(infos, placed.assignment.device)
        for il, part in placed.parts.items():
            if not part.loaded and il in self._secrets and self._secrets[il][0] == where:
                part.secret = self._secrets[il][1]

    def _have(self, stages: Sequence[PlacedStage]) -> None:
        """Have these stages, and remember what is on devices and not used there any more."""
        used = {buffer for s in stages for part in s.parts.values() for buffer in part.buffers}
        for part in [part for s in self.stages for part in s.parts.values()]:
            self._left.setdefault(part.device, []).extend(part.buffers)
        self._left = {d: unused for d, buffers in self._left.items() if (unused := [b for b in buffers if b not in used])}
        self.stages[:] = stages

    def _holding(self) -> set[int]:
        """Devices that still have what they had: a worker that was started again has not. Errors: Unavailable."""
        asked: dict[int, int] = {}
        for s in self.stages:
            loaded = [p for p in s.parts.values() if p.loaded]
            if loaded and s.assignment.device not in asked:
                get = m.GetTensor(self.client.session, loaded[-1].buffers[-1], 0, 1)
                asked[s.assignment.device] = self.client.submit(get, device=s.assignment.device)
        holding = set()
        for device, seq in asked.items():
            with contextlib.suppress(HandleError, WorkerLost):
                self.client.wait(seq)
                holding.add(device)
        return holding

    def holds_all(self) -> bool:
        """Whether every stage still has what it had. Errors: Unavailable."""
        loaded = bool(self.stages) and all(s.parts and all(p.loaded for p in s.parts.values()) for s in self.stages)
        return loaded and {s.assignment.device for s in self.stages} <= self._holding()

    def _fill(self) -> None:
        """Load what is not there. Errors: Unavailable, OutOfMemory."""
        if self._left:
            self._free_left(self.client.devices())
        fresh = {il: part for s in self.stages for il, part in s.parts.items() if il >= 0 and not part.loaded}
        self.empty.update(fresh)
        self._load()
        self.empty -= {il for il, part in fresh.items() if part.found}
        self._secrets.clear()

    def _load(self) -> None:
        self._loader.load([part for s in self.stages for part in s.parts.values() if not part.loaded], self.hashes)

    def _free_left(self, infos: Sequence[m.ListedDevice]) -> None:
        """Free what was left behind on devices that are there again. Errors: Unavailable."""
        for device in list(self._left):
            state = self._state(infos, device)
            if state not in ("ready", "none"):
                continue
            buffers = self._left.pop(device)
            asked = [self.client.submit(m.FreeBuffer(self.client.session, b), device=device) for b in buffers]
            for seq in asked if state == "ready" else ():
                with contextlib.suppress(GgmqError):
                    self.client.wait(seq)

    # -- when a device is to be left, or more of them are there ---------------------------------------------------------

    def look(self) -> list[m.ListedDevice]:
        """The devices as they are now; what was left behind on one that is there again is freed. Errors: Unavailable."""
        infos = self._devices()
        self._free_left(infos)
        return infos

    @property
    def is_crowded(self) -> bool:
        """Whether devices have taken over layers of others, and could give them to a new one."""
        return bool(self._squeezed) and not self._rounded

    def lost(self, infos: Sequence[m.ListedDevice]) -> WorkerLost | None:
        """Whether a device of the stages is gone."""
        for s in self.stages:
            if self._state(infos, s.assignment.device) in ("lost", "none"):
                return WorkerLost("its connection was closed").at(*self._name(self.infos, s.assignment.device))
        return None

    def wanted(self, infos: Sequence[m.ListedDevice], idle: bool = False) -> list[Assignment] | None:
        """Where the layers should go instead: away from devices that are to be left; None: they lie well.

        idle: to one that came back, or is new, too, which gets what others had taken over.
        Errors: Unavailable.
        """
        retired = {s.assignment.device for s in self.stages if self._state(infos, s.assignment.device) == "ready"
                   and infos[s.assignment.device].retired}  # fmt: skip
        self._stuck &= retired
        if retired - self._stuck:
            try:
                return self._without(retired, infos)
            except (OutOfMemory, ConfigError) as e:
                self._stuck |= retired
                self.note(f"worker {', '.join(infos[d].worker for d in sorted(retired))} is to be left, and its layers "
                          f"stay: {e}")  # fmt: skip
        return self._regrown(infos) if idle and self.is_crowded else None

    def _regrown(self, infos: Sequence[m.ListedDevice]) -> list[Assignment] | None:
        used = {s.assignment.device for s in self.stages}
        unused = [d for d in device_memory(with_room(self.client, infos)) if d.index not in used]
        for device in sorted(unused, key=lambda d: -d.free_bytes):
            with contextlib.suppress(OutOfMemory):
                return regrown(self._sizes, [s.assignment for s in self.stages], self._squeezed[-1], device)
        return None

    def move(self, assignments: Sequence[Assignment], infos: Sequence[m.ListedDevice]) -> None:
        """Have these stages, with what was read; nothing may be under way.

        Errors: OutOfMemory and Unavailable, and all is as it was.
        """
        old = {il: part for s in self.stages for il, part in s.parts.items() if il >= 0}
        before = list(self.stages)
        try:
            self._lay(assignments, infos)
            self._load()
            for s in self.stages:
                for il, part in s.parts.items():
                    if il >= 0 and part is not old[il]:
                        self._carry(old[il], part)
        except GgmqError:
            self._have(before)
            raise
        taken = {s.assignment.layers for s in self.stages}
        self._squeezed = [layers for layers in self._squeezed if layers not in taken]
        self.infos = list(infos)
        self._free_left(infos)

    def _carry(self, old: Part, new: Part) -> None:
        """Copy what a layer has read from a device to another. Errors: Unavailable."""
        if old.memory is None or new.memory is None:
            return
        asked = deque[tuple[int, int]]()
        spans = [span for first, n in self.store.used_bytes(old.memory) for span in _chunks(first, n)]
        sent = deque[int]()

        def pass_on() -> None:
            offset, seq = asked.popleft()
            data = self.client.wait(seq).payload[0]
            assert new.memory is not None  # both have one
            put = m.SetTensor(self.client.session, new.memory.buffer, offset, len(data))
            sent.append(self.client.submit(put, [bytes(data)], device=new.device))
            while len(sent) > N_MOVING:
                self.client.wait(sent.popleft())

        for offset, n in spans:
            get = m.GetTensor(self.client.session, old.memory.buffer, offset, n)
            asked.append((offset, self.client.submit(get, device=old.device)))
            if len(asked) == N_MOVING:
                pass_on()
        while asked:
            pass_on()
        for seq in sent:
            self.client.wait(seq)


def found_again(
    wanted: Mapping[int, m.ListedDevice], infos: Sequence[m.ListedDevice], others: bool
) -> dict[int, int]:
    """Which numbers devices have at a broker that was started again, by those that they had, as far as they are there.

    others: take one of the same name, too, where the process is not there.
    """
    ready = {i: d for i, d in enumerate(infos) if d.state == "ready"}
    numbers: dict[int, int] = {}
    for is_same in (_same_process, _same_name) if others else (_same_process,):
        for old, device in wanted.items():
            new = next((i for i, d in ready.items() if is_same(d, device)), None)
            if old not in numbers and new is not None:
                numbers[old] = new
                del ready[new]
    return numbers


def _same_process(a: m.ListedDevice, b: m.ListedDevice) -> bool:
    return a.process == b.process != 0 and a.name == b.name


def _same_name(a: m.ListedDevice, b: m.ListedDevice) -> bool:
    return (a.worker, a.name) == (b.worker, b.name)


def _chunks(first: int, n_bytes: int) -> list[tuple[int, int]]:
    end = first + n_bytes
    return [(at, min(limits.MAX_CHUNK_BYTES, end - at)) for at in range(first, end, limits.MAX_CHUNK_BYTES)]
