"""Weights on their way to a device: asked for by hash first, what is missing sent in chunks under credits."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ggmq.archs.stage import Placed
from protocol import limits
from protocol import messages as m

if TYPE_CHECKING:
    from ggmq.runner import Runner

HASH_WINDOW = 64
"""Questions for hashes that are under way at once."""


class Upload:
    """Fills one stage's weights on a device."""

    def __init__(self, runner: Runner, device: int, weights: Iterable[Placed], hashes: dict[str, bytes]) -> None:
        self.runner, self.client, self.hashes = runner, runner.client, hashes
        self.device = device
        self.to_ask = deque(weights)
        self.asked: deque[tuple[int, Placed]] = deque()
        self.to_send: deque[Placed] = deque()
        self.at = 0
        self.sent: deque[tuple[int, int]] = deque()

    @property
    def busy(self) -> bool:
        return bool(self.to_ask or self.asked or self.to_send or self.sent)

    def advance(self) -> int:
        """Keep the windows full, then wait for one reply. Returns: bytes that are now in place."""
        session, report = self.client.session, self.runner.report
        while self.to_ask and len(self.asked) < HASH_WINDOW:
            p = self.to_ask.popleft()
            t = p.info
            file = self.runner.arch.gguf.paths[t.part].name
            query = m.SetTensorHash(session, p.buffer, p.offset, t.n_bytes, self.hashes[t.name], int(t.type), t.ne,
                                    file[:256], t.offset)  # fmt: skip
            self.asked.append((self.client.submit(query, device=self.device), p))
            report.n_tensors += 1
        while self.to_send and len(self.sent) < limits.CREDIT_CHUNKS:
            p = self.to_send[0]
            t = p.info
            chunk = self.runner.arch.gguf.data(t.name)[self.at : self.at + limits.MAX_CHUNK_BYTES]
            part = m.SetTensor(session, p.buffer, p.offset, t.n_bytes, self.at, int(t.type), t.ne, self.hashes[t.name])
            self.sent.append((self.client.submit(part, [chunk], device=self.device), len(chunk)))
            report.sent_bytes += len(chunk)
            self.at += len(chunk)
            if self.at == t.n_bytes:
                self.to_send.popleft()
                self.at = 0
        if self.sent and (not self.asked or len(self.sent) == limits.CREDIT_CHUNKS):
            seq, n = self.sent.popleft()
            self.client.wait(seq)
            return n
        if self.asked:
            seq, p = self.asked.popleft()
            if self.client.found(seq):
                report.cached_bytes += p.info.n_bytes
                return p.info.n_bytes
            self.to_send.append(p)
        return 0
