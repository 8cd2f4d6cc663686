"""Weights that come from other workers, over links. Pure: time is passed in.

A client says which weight goes where and who has it. Chunks are asked for, some at once; each is stored when its turn comes,
by the rules for one that the client sends, and the last one shows whether all have the hash. Whatever goes wrong, the client
is told how far it came, and sends the rest itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from protocol import limits
from protocol import messages as m
from protocol.errors import GgmqError, HandleError, ProtocolError
from protocol.frames import Message
from protocol.messages import Command
from workers.state import WorkerState
from workers.work import Instruction, Key, Later, LinkInstruction, Name, Send, ToPeer, Write

MAX_FETCHES = 16


@dataclass(slots=True)
class _Fetch:
    """Units: bytes of the weight. `stored`: so many are in its place; `came`: so many were sent; `asked`: for so many."""

    rid: bytes
    key: Key
    request: Message
    h: m.FetchTensor
    stored: int
    due_s: float
    heard_s: float
    came: int
    asked: int

    @property
    def name(self) -> Name:
        return self.key[0], self.h.link


class Fetches:
    """Attributes:
    under_way: by the routing id and seq of their requests.
    asked: which of them a question to another worker is for, by link and seq.
    now_s: time of the last tick.
    """

    def __init__(self, state: WorkerState, ask: Callable[[Name, m.ReadWeight], ToPeer | None]) -> None:
        """ask: makes a question over a link; None: the link is down."""
        self.state, self._ask = state, ask
        self.under_way: dict[tuple[bytes, int], _Fetch] = {}
        self.asked: dict[tuple[Name, int], tuple[_Fetch, int]] = {}
        self.now_s = 0.0

    def begin(self, rid: bytes, message: Message, now_s: float) -> Sequence[LinkInstruction]:
        """FETCH_TENSOR of a broker. Errors: ProtocolError, HandleError."""
        h = message.header
        assert isinstance(h, m.FetchTensor)  # the command has this header
        key, at = self.state.fetching(rid, message, h)
        fetch = _Fetch(rid, key, message, h, at, now_s + limits.FETCH_S, now_s, at, at)
        if len(self.under_way) >= MAX_FETCHES or at >= h.weight.n_bytes:
            return [self._answer(fetch, False)]
        self.under_way[rid, message.seq] = fetch
        return self._go_on(fetch)

    def _go_on(self, fetch: _Fetch) -> list[LinkInstruction]:
        """Ask for what comes next, as far as credits go."""
        out: list[LinkInstruction] = []
        h = fetch.h
        while fetch.asked < h.weight.n_bytes and fetch.asked - fetch.stored < limits.CREDIT_CHUNKS * limits.MAX_CHUNK_BYTES:
            sent = self._ask(fetch.name, m.ReadWeight(h.weight, fetch.asked))
            if sent is None:
                return [*out, *self._end(fetch)]
            self.asked[fetch.name, sent.message.seq] = fetch, fetch.asked
            out.append(sent)
            fetch.asked += min(limits.MAX_CHUNK_BYTES, h.weight.n_bytes - fetch.asked)
        return out

    def waits_for(self, name: Name, seq: int) -> bool:
        return (name, seq) in self.asked

    def received(self, name: Name, message: Message, now_s: float) -> Sequence[LinkInstruction]:
        """Another worker has answered. What it sent is stored later: something may be computed just now."""
        fetch, at = self.asked.pop((name, message.seq))
        if (fetch.rid, fetch.request.seq) not in self.under_way:
            return []
        h, request = message.header, fetch.request
        expected = min(limits.MAX_CHUNK_BYTES, fetch.h.weight.n_bytes - at)
        whole = len(message.payload) == 1 and len(message.payload[0]) == expected
        if not (isinstance(h, m.Found) and h.found and whole and at == fetch.came):
            return self._end(fetch)
        fetch.came, fetch.heard_s = at + expected, now_s
        chunk = Message(Command.READ_WEIGHT, h, message.payload, True, request.device, request.epoch, request.seq)
        return [Later(fetch.rid, chunk)]

    def take(self, rid: bytes, chunk: Message) -> Sequence[Instruction]:
        """It is a chunk's turn."""
        fetch = self.under_way.get((rid, chunk.seq))
        if fetch is None:
            return []
        h = fetch.h
        part = m.SetTensor(h.session, h.buffer, h.offset, h.weight.n_bytes, fetch.stored, h.type, h.ne, h.weight.hash)
        try:
            return self.state.set_tensor(rid, fetch.key, replace(fetch.request, payload=chunk.payload), part)
        except GgmqError as e:
            return self._end(fetch, e)

    def stored(self, work: Write) -> Sequence[LinkInstruction]:
        """A chunk is in its place."""
        fetch = self.under_way.get((work.rid, work.request.seq))
        if fetch is None:
            return []
        fetch.stored += len(work.request.payload[0])
        if work.last:
            del self.under_way[fetch.rid, fetch.request.seq]
            return [self._answer(fetch, True)]
        if self.now_s > fetch.due_s:
            return self._end(fetch) if fetch.stored == fetch.asked else []
        return self._go_on(fetch)

    def failed(self, work: Write, error: GgmqError) -> Sequence[Instruction]:
        """A chunk could not be stored; of bytes with another hash none are kept."""
        self.state.failed_write(work)
        fetch = self.under_way.get((work.rid, work.request.seq))
        if fetch is None:
            return []
        fetch.stored = 0
        return self._end(fetch, error)

    def _end(self, fetch: _Fetch, error: GgmqError | None = None) -> list[Instruction]:
        """Nothing more comes of it: whoever asked hears how far it is, unless he can do nothing about what went wrong."""
        del self.under_way[fetch.rid, fetch.request.seq]
        theirs = isinstance(error, ProtocolError) and not isinstance(error, HandleError)  # what another worker sent
        if error is not None and not theirs:
            return [self.state.refuse(fetch.rid, fetch.request, error)]
        return [self._answer(fetch, False)]

    @staticmethod
    def _answer(fetch: _Fetch, found: bool) -> Send:
        return Send(fetch.rid, fetch.request.answer(m.Found(found, 0 if found else fetch.stored)))

    def lost(self, name: Name) -> list[Instruction]:
        """A link is down."""
        self.asked = {key: of for key, of in self.asked.items() if key[0] != name}
        return [i for fetch in list(self.under_way.values()) if fetch.name == name for i in self._end(fetch)]

    def tick(self, now_s: float) -> list[Instruction]:
        """End those that get nothing any more, and forget those of brokers that say HELLO under a new epoch."""
        self.now_s = now_s
        out: list[Instruction] = []
        for at, fetch in list(self.under_way.items()):
            peer = self.state.peers.get(fetch.key[0])
            if peer is None or peer.epoch != fetch.request.epoch:
                del self.under_way[at]
            elif now_s - fetch.heard_s > limits.FETCH_STALL_S and fetch.stored == fetch.came:
                out += self._end(fetch)
        return out
