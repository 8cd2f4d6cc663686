"""Which other workers have weights that one lacks, so that they come from there and not over the main host's uplink."""

from __future__ import annotations

from collections.abc import Sequence

from ggmq.cluster import Client
from protocol import limits
from protocol import messages as m
from protocol.errors import GgmqError


class Sources:
    """Devices from whose workers that of one device can fetch weights. Whatever goes wrong there is none.

    Threads: use from the client's.
    """

    def __init__(self, client: Client, device: int) -> None:
        self.client, self.device = client, device
        self._others: list[int] | None = None
        self._given: dict[int, int] = {}
        self._linked: dict[int, bool] = {}

    def of(self, weights: Sequence[m.Weight]) -> list[int | None]:
        """For each weight a device that has it, those that have several in equal parts; None: none has, or is reached."""
        out: list[int | None] = []
        for first in range(0, len(weights), limits.MAX_WEIGHTS_ASKED):
            asked = weights[first : first + limits.MAX_WEIGHTS_ASKED]
            out += self._chosen(asked, self._who_has(asked))
        return out

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
        for weight, have in zip(weights, holders, strict=True):
            reached = [d for d in have if self._reached(d)]
            chosen = min(reached, key=lambda d: self._given.get(d, 0), default=None)
            if chosen is not None:
                self._given[chosen] = self._given.get(chosen, 0) + weight.n_bytes
            out.append(chosen)
        return out

    def _reached(self, source: int) -> bool:
        """Whether there is a link to a device's worker, which is dialled for this."""
        if source not in self._linked:
            try:
                link = m.Link(self.client.session, [self.device, source])
                self._linked[source] = self.client.found(self.client.submit(link))
            except GgmqError:
                self._linked[source] = False
        return self._linked[source]
