"""Messages of a peer in the order in which it numbered them. Pure: time is passed in.

A connection keeps the order, so a message that comes before an earlier one shows that something between the two ends does
not. What is early is held until the missing comes, for a moment; what was not waited for any longer is refused when it
comes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")

OVERTAKEN = "{}: it came after later ones, and was not waited for any longer; something on the way mixes messages up"
HELD_S = 0.3
"""So long, which a PING can wait, what is early is held."""
MAX_HELD = 64
"""And so many messages of one peer, at most."""
MAX_SKIPPED = 256


@dataclass(slots=True)
class _Numbers(Generic[Item]):
    """`due_s`: when the first of what is held is not held any longer. `skipped`: numbers that were not waited for."""

    epoch: int
    following: int
    held: dict[int, Item] = field(default_factory=dict)
    skipped: dict[int, None] = field(default_factory=dict)
    due_s: float = 0.0


class Ordering(Generic[Item]):
    """Of each peer that said HELLO, by its routing id. Others may come as they like."""

    def __init__(self) -> None:
        self._peers: dict[bytes, _Numbers[Item]] = {}
        self._holding: set[bytes] = set()

    def hello(self, rid: bytes, epoch: int, seq: int) -> None:
        """From here on numbers follow this one. The same HELLO again changes nothing."""
        known = self._peers.get(rid)
        if known is None or known.epoch != epoch:
            self._peers[rid] = _Numbers(epoch, seq + 1)
            self._holding.discard(rid)

    def was_skipped(self, rid: bytes, epoch: int, seq: int) -> bool:
        """Whether a message was not waited for any longer, and has not come before."""
        peer = self._peers.get(rid)
        return peer is not None and peer.epoch == epoch and peer.skipped.pop(seq, 0) is None

    def take(self, rid: bytes, epoch: int, seq: int, item: Item, now_s: float) -> list[Item]:
        """A message has come. Returns: what has its turn now. One with a number that was there, or of another epoch, is for
        others to judge."""
        peer = self._peers.get(rid)
        if peer is None or peer.epoch != epoch or seq < peer.following:
            return [item]
        if seq == peer.following and not peer.held:
            peer.following += 1
            return [item]
        peer.due_s = peer.due_s if peer.held else now_s + HELD_S
        peer.held.setdefault(seq, item)
        self._holding.add(rid)
        return self._let_go(rid, peer, len(peer.held) > MAX_HELD, now_s)

    def due(self, now_s: float) -> list[Item]:
        """What is held for too long."""
        late = [(rid, self._peers[rid]) for rid in self._holding]
        return [item for rid, peer in late if now_s >= peer.due_s for item in self._let_go(rid, peer, True, now_s)]

    def _let_go(self, rid: bytes, peer: _Numbers[Item], skips: bool, now_s: float) -> list[Item]:
        if skips:
            first = min(peer.held)
            peer.skipped.update(dict.fromkeys(range(max(peer.following, first - MAX_SKIPPED), first)))
            for seq in list(peer.skipped)[:-MAX_SKIPPED]:
                del peer.skipped[seq]
            peer.following = first
        out = []
        while peer.following in peer.held:
            out.append(peer.held.pop(peer.following))
            peer.following += 1
        if not peer.held:
            self._holding.discard(rid)
        elif out:
            peer.due_s = now_s + HELD_S
        return out

    def forget(self, rid: bytes) -> None:
        self._peers.pop(rid, None)
        self._holding.discard(rid)

    def keep(self, rids: Collection[bytes]) -> None:
        """Forget all others."""
        for rid in [rid for rid in self._peers if rid not in rids]:
            self.forget(rid)
