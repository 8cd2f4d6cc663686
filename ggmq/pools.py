"""Numbers that are lent out, and counted: a page's or a slot's.

Threads: use from one.
"""

from __future__ import annotations


class Pool:
    """Numbers first..n - 1 that are lent out, each to as many as share it. Free ones may be kept: they are taken last."""

    def __init__(self, first: int, n: int) -> None:
        self._free = list(range(n - 1, first - 1, -1))
        self._kept: dict[int, None] = {}  # the first was held last the longest ago
        self._count: dict[int, int] = {}
        self._pins: dict[int, int] = {}

    @property
    def n_free(self) -> int:
        """Those that are kept among them."""
        return len(self._free) + len(self._kept)

    @property
    def n_kept(self) -> int:
        return len(self._kept)

    def used(self) -> list[int]:
        """Those that somebody holds, and those that are kept."""
        return [*self._count, *self._kept]

    def kept(self, number: int) -> bool:
        return number in self._kept

    def take(self) -> int:
        """One that is free. Errors: IndexError when none is."""
        if self._free or not self._kept:
            number = self._free.pop()
        else:
            number = next(iter(self._kept))
            del self._kept[number]
        self._count[number] = 1
        return number

    def share(self, number: int) -> int:
        """One more holds it."""
        if number in self._kept:
            del self._kept[number]
        self._count[number] = self._count.get(number, 0) + 1
        return number

    def shared(self, number: int) -> bool:
        """Whether several hold it; those who only want to copy it do not count."""
        return self._count[number] - self._pins.get(number, 0) > 1

    def release(self, number: int, keep: bool = False) -> None:
        """One fewer holds it. keep: if nobody does, it is kept."""
        self._count[number] -= 1
        if not self._count[number]:
            del self._count[number]
            if keep:
                self._kept[number] = None
            else:
                self._free.append(number)

    def pin(self, number: int) -> None:
        """Hold it for a copy."""
        self.share(number)
        self._pins[number] = self._pins.get(number, 0) + 1

    def unpin(self, number: int) -> None:
        """It stays held: `release` follows."""
        self._pins[number] -= 1
        if not self._pins[number]:
            del self._pins[number]

    def pinned(self, number: int) -> bool:
        return number in self._pins

    def forget(self) -> None:
        """What is kept is only free."""
        self._free += self._kept
        self._kept.clear()
