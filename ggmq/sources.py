"""Which other workers have weights that one lacks, so that they come from there and not over the main host's uplink."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence

from ggmq.cluster import Client
from protocol import limits
from protocol import messages as m
from protocol.errors import DeadlineExceeded, GgmqError

LINK_S = 0.5
"""A link to another worker is waited for so long; while it takes longer, weights are sent from here."""


class Sources:
    """Devices from whose workers that of one device can fetch weights. Whatever goes wrong there is none.

    Threads: use from the client's.
    """

    def __init__(self, client: Client, device: int) -> None:
        self.client, self.device = client, device
        self._others: list[int] | None = None
        self._given: dict[int, int] = {}
        self._linked: dict[int, bool] = {}
        self._linking: dict[int, tuple[int, float]] = {}

    def of(self, weights: Sequence[m.Weight]) -> list[int | None]:
        """For each weight a device that has it, those that have several in equal parts; None: none has, or is reached."""
        out: list[int | None] = []
        for first in range(0, len(weights), limits.MAX_WEIGHTS_ASKED):
            asked = weights[first : first + limits.MAX_WEIGHTS_ASKED]
            out += self._chosen(asked, self._who_has(asked))
        return out

    def come(self) -> bool:
        """Whether a worker is reached now that was not when it was asked for."""
        known = [source for source, (seq, _) in self._linking.items() if self.client.answered(seq)]
        return any(self._learn(source) for source in known)

    def failed(self, source: int) -> None:
        """A device did not give what it had: it is not asked again."""
        if self._others is not None and source in self._others:
            self._others.remove(source)

    def _who_has(self, weights: Sequence[m.Weight]) -> list[list[int]]:
        if self._others is None:
            self._others = [i for i, d in enumerate(self.client.devices()) if d.state == "ready" and i != self.device]
        asked = [(d, self.client.submit(m.HaveWeights(list(weights)), device=d)) for d in self._others]
        holders: list[list[int]] = [[] for _ in weights]
        for device, seq in asked:
            try:
                header = self.client.wait(seq).header
            except GgmqError:
                self.failed(device)
                continue
            assert isinstance(header, m.Had)  # the decoder gives this command's reply this type
            for i in header.which:
                if i < len(weights):
                    holders[i].append(device)
        return holders

    def _chosen(self, weights: Sequence[m.Weight], holders: Sequence[Sequence[int]]) -> list[int | None]:
        out: list[int | None] = []
        self._link({d for have in holders for d in have})
        for weight, have in zip(weights, holders, strict=True):
            reached = [d for d in have if self._linked.get(d)]
            chosen = min(reached, key=lambda d: self._given.get(d, 0), default=None)
            if chosen is not None:
                self._given[chosen] = self._given.get(chosen, 0) + weight.n_bytes
            out.append(chosen)
        return out

    def _link(self, sources: Iterable[int]) -> None:
        """Have links to the workers of these devices dialled. Those that are not up soon are not waited for."""
        for source in sources:
            if source not in self._linked and source not in self._linking:
                link = m.Link(self.client.session, [self.device, source])
                self._linking[source] = self.client.submit(link), time.monotonic() + LINK_S
        for source, (seq, due_s) in list(self._linking.items()):
            with contextlib.suppress(DeadlineExceeded):
                self.client.await_reply(seq, max(0.0, due_s - time.monotonic()))
                self._learn(source)

    def _learn(self, source: int) -> bool:
        try:
            self._linked[source] = self.client.found(self._linking.pop(source)[0])
        except GgmqError:
            self._linked[source] = False
        return self._linked[source]
