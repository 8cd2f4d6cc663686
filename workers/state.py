"""What a worker knows and decides: peers, epochs, sessions, handles, graphs. Pure: no socket, no clock, no device.

The loop passes each message through `admit` when it arrives (fencing) and through `handle` when its turn comes; it
carries out the Work that comes back and reports with `done`. Ids and times are passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from protocol import limits
from protocol import messages as m
from protocol.dtypes import TYPES, tensor_bytes
from protocol.encoding import decode_graph, graph_digest
from protocol.errors import Cancelled, GgmqError, HandleError, Overloaded, ProtocolError
from protocol.frames import Frame, Message
from protocol.graph import Graph
from protocol.messages import Command
from workers.arrivals import Arrivals
from workers.work import (
    Alloc,
    Compile,
    Compute,
    Copy,
    Count,
    Describe,
    EndSession,
    Fetch,
    Free,
    GiveUp,
    Instruction,
    Key,
    Note,
    Read,
    Seek,
    Send,
    Serve,
    Work,
    Write,
)


@dataclass(slots=True)
class Session:
    """Buffers by id with their sizes, graphs by digest, uploads under way by (buffer, offset)."""

    buffers: dict[int, int] = field(default_factory=dict)
    graphs: dict[bytes, Graph] = field(default_factory=dict)
    uploads: dict[tuple[int, int], tuple[bytes, int, int]] = field(default_factory=dict)


@dataclass(slots=True)
class Peer:
    """Attributes:
    rid: its control channel.
    seen_s, closed_s: when it last said something, and since when its connection is closed (0: it is not).
    hands: another worker, which may hand activations over and nothing else.
    trailing: channels of the epoch before, with that epoch. What is still to come over them is read, and weights in it
        count, until the bulk channel of this epoch is there: its HELLO comes behind them, and before anything new is asked.
    """

    epoch: int
    rid: bytes
    seen_s: float
    hands: bool = False
    closed_s: float = 0.0
    last_seq: dict[bytes, int] = field(default_factory=dict)
    trailing: dict[bytes, int] = field(default_factory=dict)

    def is_current(self, rid: bytes, message: Message) -> bool:
        """Whether somebody waits for what a message leads to."""
        if isinstance(message.header, m.SetTensor) and message.header.hash:
            return message.epoch == self.trailing.get(rid, self.epoch)
        return rid not in self.trailing and message.epoch == self.epoch

    def gone(self, now_s: float) -> bool:
        """Whether nobody waits for it any longer."""
        kept_s = limits.PEER_SILENCE_S if self.hands else limits.PEER_KEPT_S
        return now_s - self.seen_s > kept_s or (self.closed_s > 0 and now_s - self.closed_s > limits.PEER_CLOSED_S)


class WorkerState:
    """Attributes:
    worker, device: by these names an error says where it happened; a broker knows them where they are empty.
    sessions: every live session; nothing of a session outlives its peer.
    decode: reads a graph. A large one takes a while: a loop may have it read beside itself, and answer meanwhile.
    n_refused, n_fenced, n_computes, and those in bytes: counters for STATS; the loop counts what crosses the wire.
    """

    def __init__(self, software: str, worker: str = "", device: str = "") -> None:
        self.software, self.worker, self.device = software, worker, device
        self.peers: dict[bytes, Peer] = {}
        self.routes: dict[bytes, bytes] = {}
        self.sessions: dict[Key, Session] = {}
        self.arrivals = Arrivals()
        self.decode: Callable[[Frame], Graph] = decode_graph
        self.n_refused = self.n_fenced = self.n_computes = self.payload_in_bytes = 0
        self.wire_in_bytes = self.wire_out_bytes = self.handed_out_bytes = 0

    # -- arrival -------------------------------------------------------------------------------------------------------

    def admit(self, rid: bytes, message: Message, now_s: float) -> bool:
        """Whether a message is new and of the current epoch; one that is not is counted and dropped."""
        if message.command == Command.HELLO:
            return True
        peer = self.peers.get(self.routes.get(rid, b""))
        if peer is None:
            return True
        peer.seen_s, peer.closed_s = now_s, 0.0
        if not peer.is_current(rid, message) or message.seq <= peer.last_seq.get(rid, -1) or message.reply:
            self.n_fenced += 1
            return False
        peer.last_seq[rid] = message.seq
        return True

    def current(self, rid: bytes, message: Message) -> bool:
        """Whether a message that was admitted is still of use, though its peer may have another epoch now."""
        peer = self.peers.get(self.routes.get(rid, b""))
        return peer is None or message.command == Command.HELLO or peer.is_current(rid, message)

    def hello(self, rid: bytes, header: m.Hello, now_s: float) -> list[Key]:
        """Bind a routing id to its peer. Under a new epoch nothing of the one before is answered any more; sessions go on if
        the peer says that it knows some. Returns: sessions that must be freed."""
        stale: list[Key] = []
        peer = self.peers.get(header.token)
        if peer is not None and peer.hands != (header.role == "peer"):
            raise ProtocolError("HELLO: this token is that of a peer in another role")
        if header.role.endswith("-bulk"):
            if peer is None or peer.epoch != header.epoch:
                raise ProtocolError("HELLO: a bulk channel follows its control channel, with the same token and epoch")
        elif peer is None or peer.epoch != header.epoch:
            if peer is not None and header.epoch < peer.epoch:
                raise ProtocolError(f"HELLO: epoch {header.epoch} has passed; the peer is at {peer.epoch}")
            mine = [key for key in self.sessions if key[0] == header.token]
            stale = [] if header.session else mine
            for key in mine:
                self.arrivals.unpark(*key)
            before, peer = peer, Peer(header.epoch, rid, now_s, header.role == "peer")
            if before is not None and header.session and not before.hands:
                others = [r for r, token in self.routes.items() if token == header.token and r != rid]
                peer.trailing = {r: before.trailing.get(r, before.epoch) for r in others}
                peer.last_seq = {r: before.last_seq[r] for r in others}
            self.peers[header.token] = peer
            self.routes = {r: token for r, token in self.routes.items() if token != header.token or r in peer.trailing}
        if rid != peer.rid and peer.trailing:
            if rid in peer.trailing:
                del peer.last_seq[rid]
            self.routes = {r: token for r, token in self.routes.items() if r not in peer.trailing}
            peer.trailing.clear()
        peer.last_seq.setdefault(rid, -1)  # the same HELLO once more lets nothing in that has been here
        self.routes[rid] = header.token
        return stale

    def closed(self, token: bytes, now_s: float) -> None:
        """A peer's connection is closed. It may come back under a new epoch."""
        peer = self.peers.get(token)
        if peer is not None and not peer.closed_s:
            peer.closed_s = now_s

    def forget(self, tokens: Collection[bytes]) -> list[Key]:
        """Forget peers. Returns: their sessions, which must be freed."""
        for token in tokens:
            self.peers.pop(token, None)
        self.routes = {rid: token for rid, token in self.routes.items() if token not in tokens}
        return [key for key in self.sessions if key[0] in tokens]

    def gone(self, now_s: float) -> set[bytes]:
        """Peers that nobody waits for any longer."""
        self.arrivals.expire(now_s)
        return {token for token, p in self.peers.items() if p.gone(now_s)}

    def asleep(self, now_s: float) -> set[bytes]:
        """Peers whose sessions make room for others when memory is short."""
        return {token for token, p in self.peers.items() if p.closed_s or now_s - p.seen_s > limits.PEER_SILENCE_S}

    # -- requests ------------------------------------------------------------------------------------------------------

    def handle(self, rid: bytes, message: Message) -> list[Instruction]:
        """Decide what a request leads to. A refused one changes nothing and is answered with its error."""
        try:
            return self._handle(rid, message)
        except GgmqError as e:
            return [self.refuse(rid, message, e)]

    def broker_of(self, rid: bytes, what: str) -> bytes:
        """The token of the broker behind a routing id. Errors: ProtocolError when it is none."""
        token = self.routes.get(rid)
        if token is None:
            raise ProtocolError(f"{what}: expected HELLO first")
        if self.peers[token].hands:
            raise ProtocolError(f"{what}: a worker may only hand activations over to another, and read weights whose hash "
                                "it knows")  # fmt: skip
        return token

    def worker_of(self, rid: bytes, what: str) -> bytes:
        """The token of another worker behind a routing id. Errors: ProtocolError when it is none."""
        token = self.routes.get(rid, b"")
        peer = self.peers.get(token)
        if peer is None or not peer.hands:
            raise ProtocolError(f"{what}: expected a HELLO as peer first")
        return token

    def handed(self, rid: bytes, message: Message, now_s: float) -> tuple[Send, list[tuple[bytes, Message]]]:
        """HAND_OVER, as it arrives. Returns: its answer, and computes that can run now, each with its routing id."""
        try:
            self.worker_of(rid, "HAND_OVER")
            self.payload_in_bytes += sum(len(p) for p in message.payload)
            ready = self.arrivals.handed(message, now_s)
        except GgmqError as e:
            return self.refuse(rid, message, e), []
        return Send(rid, message.answer(m.Ok())), ready

    def unpark(self, rid: bytes, session: int, seq: int | None = None) -> list[Instruction]:
        """Refuse computes of a session that wait for activations: one request, or all."""
        waiting = self.arrivals.unpark(self.routes.get(rid, b""), session, seq)
        return [self.refuse(r, q, Cancelled(f"{q.command.name} was cancelled")) for r, q in waiting]

    def refuse(self, rid: bytes, message: Message, error: GgmqError) -> Send:
        self.n_refused += 1
        return Send(rid, message.refusal(error.at(self.worker, self.device)))

    def _handle(self, rid: bytes, message: Message) -> list[Instruction]:
        h = message.header
        if isinstance(h, m.Ping) and rid in self.routes:
            return [Send(rid, message.answer(h))]
        if isinstance(h, m.ReadWeight):
            return [Serve(rid, (self.worker_of(rid, "READ_WEIGHT"), 0), message, h)]
        token = self.broker_of(rid, message.command.name)
        self.payload_in_bytes += sum(len(p) for p in message.payload)
        match h:
            case m.StatsQuery():
                return [Count(rid, (token, 0), message)]
            case m.DeviceQuery():
                return [Describe(rid, (token, 0), message)]
            case m.HaveWeights():
                return [Seek(rid, (token, 0), message, h)]
            case m.Release():
                return [GiveUp(rid, (token, 0), message)]
            case m.Cancel():
                return [Send(rid, message.answer(m.Ok()))]
            case m.Drain():
                return [*self.unpark(rid, h.session), EndSession(rid, (token, h.session), message)]
            case m.AllocBuffer():
                return self._alloc(rid, (token, h.session), message, h)
            case m.GraphPut():
                return self._graph_put(rid, (token, h.session), message, h)
        session_id = getattr(h, "session", None)
        if session_id is None:
            raise ProtocolError(f"{message.command.name}: not a request that a worker takes")
        key = (token, session_id)
        session = self._known(key, message.command.name)
        match h:
            case m.FreeBuffer():
                self._extent(session, h.buffer, 0, 0, "FREE_BUFFER")
                del session.buffers[h.buffer]
                used = [d for d, g in session.graphs.items() if any(t.buffer == h.buffer for t in g.tensors)]
                for digest in used:
                    del session.graphs[digest]
                for upload in [u for u in session.uploads if u[0] == h.buffer]:
                    del session.uploads[upload]
                return [Free(rid, key, message, h)]
            case m.SetTensor():
                return self.set_tensor(rid, key, message, h)
            case m.SetTensorHash():
                self._extent(session, h.buffer, h.offset, h.n_bytes, "SET_TENSOR_HASH")
                _check_size(h.type, h.ne, h.n_bytes)
                return [Fetch(rid, key, message, h)]
            case m.GetTensor():
                for e in h.extents:
                    self._extent(session, e.buffer, e.offset, e.n_bytes, "GET_TENSOR")
                if (n_bytes := sum(e.n_bytes for e in h.extents)) > limits.MAX_MESSAGE_BYTES:
                    raise ProtocolError(f"GET_TENSOR: at most {limits.MAX_MESSAGE_BYTES} bytes at once, got {n_bytes}")
                return [Read(rid, key, message, h)]
            case m.CopyTensor():
                if h.n_bytes > h.dst_n_bytes:
                    raise ProtocolError(f"COPY_TENSOR: source of {h.n_bytes} bytes, destination of {h.dst_n_bytes}")
                self._extent(session, h.src_buffer, h.src_offset, h.n_bytes, "COPY_TENSOR source")
                self._extent(session, h.dst_buffer, h.dst_offset, h.dst_n_bytes, "COPY_TENSOR destination")
                return [Copy(rid, key, message, h)]
            case m.TraceQuery():
                return [Note(rid, key, message, h)]
            case m.StageCompute():
                graph = session.graphs.get(h.digest)
                if graph is None:
                    raise HandleError(f"STAGE_COMPUTE: graph {h.digest.hex()} is not one of this session; "
                                      "it was never put, or a buffer of it was freed")  # fmt: skip
                complete = self.arrivals.take(rid, token, message) if h.take else message
                if complete is None:
                    return []
                assert isinstance(complete.header, m.StageCompute)  # it was one before its inputs came
                self.n_computes += 1
                return [Compute(rid, key, complete, complete.header, graph)]
        raise ProtocolError(f"{message.command.name}: not a request that a worker takes")

    def _known(self, key: Key, what: str) -> Session:
        session = self.sessions.get(key)
        if session is None:
            raise HandleError(f"{what}: session {key[1]} has nothing on this device")
        return session

    def fetching(self, rid: bytes, message: Message, h: m.FetchTensor) -> tuple[Key, int]:
        """FETCH_TENSOR. Returns: the session's key, and how many bytes of the weight have come already.

        Errors: ProtocolError, HandleError.
        """
        key = (self.broker_of(rid, "FETCH_TENSOR"), h.session)
        session, w = self._known(key, "FETCH_TENSOR"), h.weight
        self._extent(session, h.buffer, h.offset, w.n_bytes, "FETCH_TENSOR")
        _check_size(h.type, h.ne, w.n_bytes)
        known = session.uploads.get((h.buffer, h.offset))
        return key, known[2] if known is not None and known[:2] == (w.hash, w.n_bytes) else 0

    def _session(self, key: Key) -> Session:
        session = self.sessions.get(key)
        if session is None:
            if len(self.sessions) >= limits.MAX_SESSIONS:
                raise Overloaded(f"this worker serves {limits.MAX_SESSIONS} sessions; end one first")
            session = self.sessions[key] = Session()
        return session

    def _alloc(self, rid: bytes, key: Key, message: Message, h: m.AllocBuffer) -> list[Instruction]:
        if h.secret and (h.content or len(h.secret) < limits.MIN_SECRET_BYTES):
            raise ProtocolError(f"ALLOC_BUFFER: a secret has {limits.MIN_SECRET_BYTES} bytes at least, and stands without a "
                                f"content; got {len(h.secret)} bytes")  # fmt: skip
        session = self._session(key)
        if h.buffer in session.buffers:
            raise HandleError(f"ALLOC_BUFFER: buffer {h.buffer} is in use; free it or take another id")
        if len(session.buffers) >= limits.MAX_BUFFERS_PER_SESSION:
            raise Overloaded(f"ALLOC_BUFFER: a session has at most {limits.MAX_BUFFERS_PER_SESSION} buffers")
        session.buffers[h.buffer] = h.n_bytes
        return [Alloc(rid, key, message, h)]

    def _graph_put(self, rid: bytes, key: Key, message: Message, h: m.GraphPut) -> list[Instruction]:
        frame = message.payload[0]
        if graph_digest(frame) != h.digest:
            raise ProtocolError("GRAPH_PUT: the digest is not that of the payload")
        graph = self.decode(frame)
        session = self._session(key)
        for i, t in enumerate(graph.tensors):
            if t.buffer:
                self._extent(session, t.buffer, t.offset, t.extent_bytes(), f"GRAPH_PUT: tensor {i}")
        session.graphs.pop(h.digest, None)
        while len(session.graphs) >= limits.MAX_GRAPHS_PER_SESSION:  # the oldest makes room
            del session.graphs[next(iter(session.graphs))]
        session.graphs[h.digest] = graph
        return [Compile(rid, key, message, h, graph)]

    def set_tensor(self, rid: bytes, key: Key, message: Message, h: m.SetTensor) -> list[Instruction]:
        """A chunk, which is the message's payload: of SET_TENSOR, or one that another worker sent for FETCH_TENSOR.

        Errors: ProtocolError, HandleError.
        """
        session, data = self._known(key, "SET_TENSOR"), message.payload[0]
        self._extent(session, h.buffer, h.offset, h.n_bytes, "SET_TENSOR")
        if h.at + len(data) > h.n_bytes:
            raise ProtocolError(f"SET_TENSOR: chunk of bytes {h.at}..{h.at + len(data)} of a tensor of {h.n_bytes}")
        if not h.hash:
            return [Write(rid, key, message, h, False)]
        if len(h.hash) != 32:
            raise ProtocolError(f"SET_TENSOR: a hash has 32 bytes, got {len(h.hash)}")
        _check_size(h.type, h.ne, h.n_bytes)
        at = (h.buffer, h.offset)
        upload = session.uploads.get(at, (h.hash, h.n_bytes, 0)) if h.at else (h.hash, h.n_bytes, 0)
        if upload != (h.hash, h.n_bytes, h.at):
            raise ProtocolError(f"SET_TENSOR: chunks with a hash come in order; expected byte {upload[2]}, got {h.at}")
        end = h.at + len(data)
        if end == h.n_bytes:
            session.uploads.pop(at, None)
        elif not data:
            raise ProtocolError("SET_TENSOR: an empty chunk")
        else:
            session.uploads[at] = (h.hash, h.n_bytes, end)
        return [Write(rid, key, message, h, end == h.n_bytes)]

    @staticmethod
    def _extent(session: Session, buffer: int, offset: int, n_bytes: int, what: str) -> None:
        size = session.buffers.get(buffer)
        if size is None:
            raise HandleError(f"{what}: buffer {buffer} is not one of this session")
        if offset + n_bytes > size:
            raise HandleError(f"{what}: bytes {offset}..{offset + n_bytes} of buffer {buffer}, which has {size}")

    # -- results -------------------------------------------------------------------------------------------------------

    def done(self, work: Work, header: m.Header, payload: Sequence[bytes | memoryview] = ()) -> list[Instruction]:
        """The device has done it."""
        if isinstance(work, EndSession):
            self.sessions.pop(work.key, None)
        if isinstance(work, Fetch) and isinstance(header, m.Found):
            self._resumed(work.key, work.h, header.at)
        return [Send(work.rid, work.request.answer(header, payload))]

    def _resumed(self, key: Key, h: m.SetTensorHash, at: int) -> None:
        """So many bytes of a weight are there, and chunks may go on behind them."""
        session = self.sessions.get(key)
        if session is not None:
            session.uploads.pop((h.buffer, h.offset), None)
            if at:
                session.uploads[h.buffer, h.offset] = (h.hash, h.n_bytes, at)

    def failed(self, work: Work, error: GgmqError) -> list[Instruction]:
        """The device could not; what the request had entered is taken back."""
        session = self.sessions.get(work.key)
        if session is not None:
            match work:
                case Alloc(h=h):
                    session.buffers.pop(h.buffer, None)
                case Compile(h=h):
                    session.graphs.pop(h.digest, None)
                case Write():
                    self.failed_write(work)
        return [self.refuse(work.rid, work.request, error)]

    def failed_write(self, work: Write) -> None:
        """A chunk could not be stored: nothing comes behind it."""
        session = self.sessions.get(work.key)
        if session is not None:
            session.uploads.pop((work.h.buffer, work.h.offset), None)

    def drop(self, key: Key) -> None:
        """Forget a session whose peer is gone."""
        self.sessions.pop(key, None)
        self.arrivals.unpark(*key)


def _check_size(type_id: int, ne: tuple[int, int, int, int], n_bytes: int) -> None:
    info = TYPES.get(type_id)
    if info is None:
        raise ProtocolError(f"tensor: type id {type_id} is not a live ggml type")
    if ne[0] % info.block or tensor_bytes(type_id, ne) != n_bytes:
        raise ProtocolError(f"tensor: {info.type.name} {ne} does not have {n_bytes} bytes")
