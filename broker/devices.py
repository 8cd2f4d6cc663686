"""The devices of a bus by number. Pure.

A number means the same device for as long as some session holds something there, also while its worker is lost: the same
process, or one that listens on the same address, gets its numbers back. What nobody holds is forgotten when its worker
goes, and its number is given to the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from broker.events import Link
from protocol import limits, tokens
from protocol import messages as m
from protocol.errors import HandleError, Overloaded

State = Literal["ready", "silent", "lost", "none"]
NONE = m.ListedDevice("", "", state="none")


@dataclass(slots=True)
class DeviceEntry:
    """Attributes:
    link, local: its worker, and its number there.
    instance: the token of the worker's process.
    lost: why its worker is gone, when it is.
    holders: sessions that something was done for here.
    ended: those that ended while its worker could not be told.
    retired: whoever holds something here is to leave.
    allocated: bytes handed out, by session and buffer.
    """

    link: Link
    local: int
    info: m.DeviceInfo
    instance: bytes
    lost: str = ""
    holders: set[int] = field(default_factory=set)
    ended: set[int] = field(default_factory=set)
    retired: bool = False
    allocated: dict[tuple[int, int], int] = field(default_factory=dict)

    @property
    def free_bytes(self) -> int:
        return max(0, self.info.free_bytes - sum(self.allocated.values()))


class Devices:
    """Attributes:
    entries: by number.
    """

    def __init__(self) -> None:
        self.entries: dict[int, DeviceEntry] = {}

    def __getitem__(self, index: int) -> DeviceEntry:
        entry = self.entries.get(index)
        if entry is None:
            raise HandleError(f"device {index}: there is none of this number; ask for the list again")
        return entry

    def names(self, index: int) -> tuple[str, str]:
        """The worker's name and the device's; empty when there is none of this number any more."""
        entry = self.entries.get(index)
        return (entry.info.worker, entry.info.name) if entry is not None else ("", "")

    def of(self, link: Link) -> Iterator[tuple[int, DeviceEntry]]:
        """Devices of a worker, with their numbers."""
        return ((i, e) for i, e in list(self.entries.items()) if e.link == link)

    def known(self, instance: bytes) -> list[DeviceEntry]:
        """Devices of a process that was here before."""
        return [e for e in self.entries.values() if instance and e.instance == instance]

    def room_for(self, n: int) -> None:
        """Errors: Overloaded when so many devices more are too many."""
        if len(self.entries) + n > limits.MAX_DEVICES:
            raise Overloaded(f"HELLO: this broker has {len(self.entries)} devices and takes {limits.MAX_DEVICES}")

    def register(self, link: Link, h: m.Hello) -> list[DeviceEntry]:
        """A worker is there, for the first time or again. Returns: its devices in its own order."""
        back = {e.local: i for i, e in self.entries.items()
                if (h.token and e.instance == h.token) or (e.link == link and link.startswith("tcp://"))}  # fmt: skip
        name = link.removeprefix("tcp://") if link.startswith("tcp://") else (h.devices[0].host if h.devices else link)
        out = []
        for local, info in enumerate(h.devices):
            named = msgspec.structs.replace(info, worker=info.worker or name[:256])
            index = back.pop(local, None)
            fresh = DeviceEntry(link, local, named, h.token)
            if index is None:
                index = next(i for i in range(len(self.entries) + 1) if i not in self.entries)
            else:
                old = self.entries[index]
                fresh.holders = old.holders
                if old.instance == h.token:  # what was handed out there still is
                    # one that listens tells what is free besides; one that dials in counts what a broker that is gone held
                    held = sum(old.allocated.values()) if link.startswith("tcp://") else 0
                    fresh.info = msgspec.structs.replace(named, free_bytes=named.free_bytes + held)
                    fresh.ended, fresh.allocated, fresh.retired = old.ended, old.allocated, old.retired
            self.entries[index] = fresh
            out.append(fresh)
        for index in back.values():
            self.entries[index].lost = "its worker came back without it"
            self.forget(index)
        return out

    def forget(self, index: int) -> None:
        """Drop a device of a worker that is gone, unless somebody holds something there."""
        entry = self.entries.get(index)
        if entry is not None and entry.lost and not entry.holders:
            del self.entries[index]

    def listing(self, first: int, states: Mapping[Link, State]) -> m.DeviceList:
        """A page of the list. `states`: of the workers that are there; the others are lost."""
        n = max(self.entries, default=-1) + 1
        page: list[m.ListedDevice] = []
        size = 0
        for i in range(first, n):
            listed = self._listed(self.entries.get(i), states)
            size += len(msgspec.msgpack.encode(listed))
            if size > limits.MAX_LIST_BYTES or len(page) == limits.MAX_INFLIGHT_PER_CLIENT:
                break
            page.append(listed)
        return m.DeviceList(page, n)

    @staticmethod
    def _listed(entry: DeviceEntry | None, states: Mapping[Link, State]) -> m.ListedDevice:
        if entry is None:
            return NONE
        state: State = "lost" if entry.lost else states.get(entry.link, "lost")
        known = {**msgspec.structs.asdict(entry.info), "free_bytes": entry.free_bytes}
        if state != "ready":
            known |= {"free_bytes": 0, "total_bytes": 0, "description": state}
        address = entry.link.removeprefix("tcp://") if entry.link.startswith("tcp://") else ""
        return m.ListedDevice(**known, state=state, address=address[:256], n_sessions=len(entry.holders),
                              retired=entry.retired, process=tokens.number(entry.instance))  # fmt: skip
