"""How operands lie, as kernels of elements and rows take it: fewer dimensions, fours, what the result may share with
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from protocol.dtypes import TYPES
from protocol.graph import Tensor
from workers.devices.cuda.binding import Binder, strides
from workers.kernels.cuda.launches import Four

Dims = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Operand:
    """Elements of `size` bytes from `address` on. `nb`: bytes from one to the next in each dimension."""

    address: int
    type: int
    size: int
    nb: Dims

    def at(self, n_bytes: int) -> Operand:
        return replace(self, address=self.address + n_bytes)

    def aligned(self, n_bytes: int, ne: Dims) -> bool:
        """Whether it and all its rows begin at multiples of so many bytes."""
        return self.address % n_bytes == 0 and all(nb % n_bytes == 0 for nb, n in zip(self.nb[1:], ne[1:],
                                                                                      strict=True) if n > 1)

    def in_fours(self, ne: Dims) -> bool:
        """Whether its elements can be reached in fours that lie together, at multiples of their size."""
        return ne[0] % 4 == 0 and self.nb[0] == self.size and self.aligned(4 * self.size, ne)


def operand(b: Binder, i: int) -> Operand | None:
    """Tensor `i`, with a stride of 0 where there is one element. None: it does not lie at a multiple of its elements'
    size.
    """
    t, address = b.tensors[i], b.address(i)
    info = TYPES[t.type]
    return Operand(address, t.type, info.bytes, strides(t)) if info.quantized or address % info.bytes == 0 else None


def operands(b: Binder, *indices: int) -> list[Operand] | None:
    """The same of several."""
    found = [operand(b, i) for i in indices]
    return None if None in found else [o for o in found if o is not None]


@dataclass(frozen=True, slots=True)
class Flat:
    """Threads for elements: `n` in all with coordinates `ne`, each with `width` elements; strides of each operand."""

    n: int
    width: int
    ne: Four
    nb: tuple[Four, ...]


def four(values: Sequence[int], fill: int) -> Four:
    a, b, c, d = (*values, *[fill] * (4 - len(values)))
    return a, b, c, d


def collapsed(ne: Dims, nbs: Sequence[Dims]) -> tuple[Dims, list[Dims]]:
    """The same elements in the same order with as few dimensions as the strides of all operands allow, 4 long."""
    dims: list[tuple[int, list[int]]] = []
    for d, n in enumerate(ne):
        if n == 1:
            continue
        step = [nb[d] for nb in nbs]
        if dims and all(a == b * dims[-1][0] for a, b in zip(step, dims[-1][1], strict=True)):
            dims[-1] = dims[-1][0] * n, dims[-1][1]
        else:
            dims.append((n, step))
    return four([n for n, _ in dims], 1), [four([step[i] for _, step in dims], 0) for i in range(len(nbs))]


def flat(ne: Dims, parts: Sequence[Operand], repeated: Sequence[Operand] = ()) -> Flat:
    """Threads for a function of elements of `parts`, and of those that may be `repeated` along rows."""
    together = [*parts, *repeated]
    ne, nbs = collapsed(ne, [p.nb for p in together])
    placed = [replace(p, nb=nb) for p, nb in zip(together, nbs, strict=True)]
    return threads(ne, placed, len(parts))


def threads(ne: Dims, placed: Sequence[Operand], n_parts: int) -> Flat:
    """The same of dimensions that stay as they are; what is behind the first `n_parts` may be repeated."""
    spread = [p.nb[0] == 0 and i >= n_parts for i, p in enumerate(placed)]
    width = 4 if ne[0] % 4 == 0 and all(s or p.in_fours(ne) for s, p in zip(spread, placed, strict=True)) else 1
    nbs = tuple(four((width * p.nb[0], *p.nb[1:]), 0) for p in placed)
    ne = (ne[0] // width, *ne[1:])
    return Flat(ne[0] * ne[1] * ne[2] * ne[3], width, four(ne, 1), nbs)


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether elements of one lie as those of the other do."""
    return a.ne == b.ne and strides(a) == strides(b) and TYPES[a.type].bytes == TYPES[b.type].bytes


def separate(b: Binder, result: int, *sources: int, inplace: bool = True) -> bool:
    """Whether a kernel may write the result while others of its threads still read the sources.

    `inplace`: whether each element is written by the thread that read it, so that a source may be the result.
    """
    places = b.lowered.places
    for i in sources:
        if i < 0 or not places[i].meets(places[result]):
            continue
        if not inplace or places[i].start != places[result].start or not alike(b.tensors[i], b.tensors[result]):
            return False
    return True


def row_threads(n: int) -> int:
    """Threads of a block for a row of n elements, which are taken in fours."""
    return next((size for size in (32, 64, 128, 256, 512) if n <= 16 * size), 1024)
