"""The bytes of pages: where they lie on the devices, how they are asked for and sent, and which are on their way here."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from ggmq.cluster import Client
from ggmq.loader import PlacedStage
from ggmq.names import Content
from ggmq.pages import Store
from protocol import limits
from protocol import messages as m
from protocol.errors import Cancelled
from protocol.frames import Frame


class Place(NamedTuple):
    """Bytes of a page in a layer's memory."""

    device: int
    buffer: int
    offset: int
    n_bytes: int
    layer: int


class Saving(NamedTuple):
    """A page on its way from the devices."""

    window: int
    page: int
    content: Content
    asked: list[int]


def places(stages: Sequence[PlacedStage], window: int, page: int) -> list[Place]:
    """Where a page's bytes are, in the order of the layers."""
    layers = {il: (stage.assignment.device, memory) for stage in stages
              for il, memory in stage.memory.items() if memory.has_window(window)}  # fmt: skip
    return [Place(device, memory.buffer, offset, n, il)
            for il, (device, memory) in sorted(layers.items()) for offset, n in memory.page_bytes(page)]  # fmt: skip


def ask(client: Client, wanted: Sequence[Place]) -> list[int]:
    """Ask for bytes, and do not wait for them. Returns: what to wait for: answers whose bytes, one behind the other, are
    those of the places."""
    asked, at = list[int](), 0
    while at < len(wanted):
        first, n_bytes, end = wanted[at], wanted[at].n_bytes, at + 1
        while (end < len(wanted) and end - at <= limits.MAX_EXTENTS and wanted[end].device == first.device
               and n_bytes + wanted[end].n_bytes <= limits.MAX_CHUNK_BYTES):  # fmt: skip
            n_bytes, end = n_bytes + wanted[end].n_bytes, end + 1
        more = [m.Extent(p.buffer, p.offset, p.n_bytes) for p in wanted[at + 1 : end]]
        get = m.GetTensor(client.session, first.buffer, first.offset, first.n_bytes, more)
        asked.append(client.submit(get, device=first.device))
        at = end
    return asked


def fill(client: Client, wanted: Sequence[Place], cells: bytes, layers: Collection[int] | None = None) -> list[int]:
    """Send a page's cells to their places, and do not wait. layers: of these only. Returns: what to wait for."""
    asked, at = list[int](), 0
    view = memoryview(cells)
    for p in wanted:
        for first in range(0, p.n_bytes if layers is None or p.layer in layers else 0, limits.MAX_CHUNK_BYTES):
            chunk = view[at + first : at + min(p.n_bytes, first + limits.MAX_CHUNK_BYTES)]
            part = m.SetTensor(client.session, p.buffer, p.offset, p.n_bytes, first)
            asked.append(client.submit(part, [chunk], device=p.device))
        at += p.n_bytes
    return asked


class Savings:
    """Pages that are worth keeping elsewhere, and those that are on their way from the devices, so many at once.

    Attributes:
        worth: window and page of those that are to be asked for, the oldest first.
        under_way: those that were.
    """

    def __init__(self, client: Client, store: Store, stages: Sequence[PlacedStage], n_most: int) -> None:
        self._client, self._store, self._stages, self._n_most = client, store, stages, n_most
        self.worth: dict[tuple[int, int], None] = {}
        self.under_way: deque[Saving] = deque()

    def __bool__(self) -> bool:
        return bool(self.worth or self.under_way)

    @property
    def asked(self) -> list[int]:
        """What is to be waited for until nothing is under way."""
        return [seq for s in self.under_way for seq in s.asked]

    def come(self) -> Iterator[tuple[Saving, list[Frame]]]:
        """Pages that have come, with their cells. Errors: what the workers report."""
        while self.under_way and all(map(self._client.answered, self.under_way[0].asked)):
            s = self.under_way.popleft()
            self._store.go(s.window, s.page)
            cells: list[Frame] = []
            for seq in s.asked:
                with contextlib.suppress(Cancelled):  # with what was computed beside it
                    cells.append(self._client.wait(seq).payload[0])
            if len(cells) == len(s.asked):
                yield s, cells
            else:
                self.worth[s.window, s.page] = None

    def ask(self, goes_on: Callable[[], bool], is_wanted: Callable[[int, int, Content], bool]) -> None:
        """Ask for pages that still hold something, if it is wanted."""
        while self.worth and len(self.under_way) < self._n_most and goes_on():
            window, page = next(iter(self.worth))
            del self.worth[window, page]
            content = self._store.names.content(window, page)
            if content is not None and is_wanted(window, page, content):
                asked = ask(self._client, places(self._stages, window, page))
                self._store.hold(window, page)
                self.under_way.append(Saving(window, page, content, asked))

    def reset(self) -> None:
        """What was on its way is not any more."""
        for s in self.under_way:
            self._store.go(s.window, s.page)
            self.worth[s.window, s.page] = None
        self.under_way.clear()
