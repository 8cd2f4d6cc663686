"""What a layer keeps of a sequence, and where it lies on a device: the one place that knows the layout.

Keys and values of tokens lie in cells, and cells in pages of 64; a state of fixed size lies in a slot. A layer's memory is
one buffer: its keys, then its values, or its states one after the other. A page or a slot has one number in all layers.
Source: Kwon et al. (PagedAttention) for the pages.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct, field

from protocol.dtypes import TYPES, GGMLType, row_bytes

PAGE = 64
"""Cells of a page."""
SCRAP_PAGE = 0
"""The page that padding writes to; no sequence has it."""
ZERO_SLOT, SCRAP_SLOT = 0, 1
"""Slots that no sequence has: one holds zeros, where a sequence that begins reads from, and padding writes to the other."""
N_RESERVED_SLOTS = 2
ALIGN = 64
"""Weights, and parts of a layer's memory, begin in a buffer at multiples of this."""


def aligned(n_bytes: int) -> int:
    """Where what comes behind so many bytes begins."""
    return -(-n_bytes // ALIGN) * ALIGN


class Cells(Struct, frozen=True):
    """A row of keys and one of values for each token.

    Attributes:
        n_k, n_v: elements of a row. n_v 0: there is none, the values are a part of the keys (a latent).
        head: elements of a row that are quantised together, which the blocks of a type must divide.
        window: tokens that are seen, counted back from a token and with itself; 0: all.
    """

    n_k: int
    n_v: int
    head: int
    window: int = 0


class States(Struct, frozen=True):
    """Float32 arrays whose size does not depend on how many tokens were read; they cannot be rewound.

    Attributes:
        sizes: elements of each, by its name.
    """

    sizes: Mapping[str, int]


Keeps = Cells | States | None


class Room(Struct, frozen=True):
    """What the memory of a loaded model has room for, the same in all layers.

    Attributes:
        n_pages: of cells, by window.
        n_slots: of states.
        k_type, v_type: F16 or Q8_0.
    """

    n_pages: Mapping[int, int] = field(default_factory=dict)
    n_slots: int = 0
    k_type: GGMLType = GGMLType.F16
    v_type: GGMLType = GGMLType.F16

    @property
    def windows(self) -> tuple[int, ...]:
        return tuple(self.n_pages)

    @property
    def has_states(self) -> bool:
        return self.n_slots > 0


class LayerMemory(Struct, frozen=True):
    """A layer's memory on a device, in a buffer of its own."""

    keeps: Keeps
    room: Room
    buffer: int

    @property
    def n_cells(self) -> int:
        assert isinstance(self.keeps, Cells)  # asked by layers with cells
        return PAGE * self.room.n_pages[self.keeps.window]

    def parts(self) -> dict[str, tuple[GGMLType, int, int, int]]:
        """By name (`k`, `v`, or a state's): type, elements of a row, rows, and the byte where it begins."""
        rows: dict[str, tuple[GGMLType, int, int]] = {}
        match self.keeps:
            case Cells(n_k, n_v):
                rows["k"] = (self.room.k_type, n_k, self.n_cells)
                if n_v:
                    rows["v"] = (self.room.v_type, n_v, self.n_cells)
            case States(sizes):
                rows |= {name: (GGMLType.F32, n, self.room.n_slots) for name, n in sizes.items()}
        out, at = {}, 0
        for name, (kind, n, n_rows) in rows.items():
            out[name] = (kind, n, n_rows, at)
            at += aligned(row_bytes(kind, n) * n_rows)
        return out

    @property
    def n_bytes(self) -> int:
        return sum(aligned(row_bytes(kind, n) * n_rows) for kind, n, n_rows, _ in self.parts().values())

    def has_window(self, window: int) -> bool:
        return isinstance(self.keeps, Cells) and self.keeps.window == window

    def slot_bytes(self, slot: int) -> list[tuple[int, int]]:
        """Where a slot's bytes lie in the buffer: offset and length of each state."""
        return [(at + slot * row_bytes(kind, n), row_bytes(kind, n)) for kind, n, _, at in self.parts().values()]

    def page_bytes(self, page: int) -> list[tuple[int, int]]:
        """Where a page's bytes lie in the buffer: offset and length of each part."""
        sizes = [(PAGE * row_bytes(kind, n), at) for kind, n, _, at in self.parts().values()]
        return [(at + size * page, size) for size, at in sizes]


def fits(kind: GGMLType, keeps: Keeps) -> bool:
    """Whether a layer's rows can be held in this type."""
    return not isinstance(keeps, Cells) or keeps.head % TYPES[kind].block == 0


def windows(layers: list[Keeps]) -> tuple[int, ...]:
    """The windows that occur, in ascending order; 0 is the whole context."""
    return tuple(sorted({k.window for k in layers if isinstance(k, Cells)}))


REWIND = 1024
"""Tokens behind a window that stay for a prompt that goes back so far, as a chat's does when a turn is written anew."""


def room_for(
    layers: list[Keeps], n_ctx: int, n_seq: int, n_batch: int, k_type: GGMLType = GGMLType.F16,
    v_type: GGMLType = GGMLType.F16, n_tokens: int = 0,
) -> Room:  # fmt: skip
    """Room for so many sequences of `n_ctx` tokens, of which `n_batch` are read at once.

    n_tokens: cells for all of them together, at least for one whole; 0: for all whole.
    """
    whole = -(-n_ctx // PAGE)
    in_all = max(whole, -(-n_tokens // PAGE)) if n_tokens else n_seq * whole
    n_wholes = max(n_seq, in_all // whole)
    pages = {}
    for window in windows(layers):
        seen = min(whole, -(-(window + n_batch) // PAGE) + 1) if window else whole
        behind = min(n_wholes * (whole - seen), REWIND // PAGE)
        pages[window] = min(n_wholes * seen + behind, in_all) + 1
    has_states = any(isinstance(k, States) for k in layers)
    return Room(pages, N_RESERVED_SLOTS + 2 * n_seq if has_states else 0, k_type, v_type)
