"""The bytes of a page: where they lie on the devices, and how they are asked for and sent."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from ggmq.cluster import Client
from ggmq.loader import PlacedStage
from ggmq.names import Content
from protocol import limits
from protocol import messages as m


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
