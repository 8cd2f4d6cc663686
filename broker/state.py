"""What a broker knows and decides. Pure: `handle(event) -> instructions`; no socket, no clock.

A client's request goes to the worker of the device it names under that worker's own (epoch, seq); the reply comes back
under the client's. A GRAPH_COMPUTE is one round trip for the client, over however many stages (`stages`). Any loss becomes
an ordinary ERROR reply to every request that waited for it (`membership`).
"""

from __future__ import annotations

from broker.events import (
    ClientLost,
    Event,
    FromClient,
    FromWorker,
    Instruction,
    LinkCarried,
    LinkLost,
    LinkOpened,
    LinkStuck,
    Tick,
    ToClient,
    Unreached,
    WorkerEnded,
)
from broker.membership import Membership, same_cluster
from broker.records import Client, Drained, Forwarded, LinkStep, PassedCompute, Pending, RelayedCompute
from broker.stages import Stages
from broker.traffic import Traffic
from protocol import PROTOCOL_VERSION, limits, tokens
from protocol import messages as m
from protocol.errors import DeadlineExceeded, GgmqError, HandleError, Overloaded, ProtocolError, WorkerLost
from protocol.frames import Message
from protocol.messages import NOT_CLIENTS, Command

CLIENT_PING_S = 5.0


class BrokerState:
    """Attributes:
    token: names this broker to its workers; two brokers never have the same.
    cluster: the id of the cluster that this broker was started for; who says that he belongs to another one is refused.
    traffic: clients, workers, devices, and the requests under way between them.
    notes: who came and went, and why, since whoever keeps a log took them.
    """

    def __init__(
        self, software: str, first_epoch: int, token: bytes = b"broker", first_session: int = 1,
        deadline_s: float = limits.REQUEST_DEADLINE_S, secret: bytes = b"secret", cluster: bytes = b"",
    ) -> None:  # fmt: skip
        """secret: makes tickets that nobody can guess."""
        self.software, self.cluster, self.next_session = software, cluster, first_session
        self.token = tokens.token(token, "broker", cluster)
        self.notes: list[str] = []
        self.traffic = Traffic(deadline_s)
        self.clients, self.workers = self.traffic.clients, self.traffic.workers
        self.devices, self.pending = self.traffic.devices, self.traffic.pending
        self.stages = Stages(self.traffic, secret)
        self.membership = Membership(self.traffic, software, self.token, cluster, first_epoch, self._fail, self.notes)
        self.clients_pinged_s = 0.0

    def handle(self, event: Event) -> list[Instruction]:
        """One step. Errors of a peer become replies to it; nothing is raised for them."""
        match event:
            case FromClient():
                try:
                    return self._from_client(event)
                except GgmqError as e:
                    return [self.traffic.refuse(event.rid, event.message, e)]
            case FromWorker():
                return self._from_worker(event)
            case LinkOpened():
                return self.membership.open(event.link, event.now_s)
            case LinkLost():
                return self.membership.closed(event.link, event.reason)
            case LinkStuck():
                return self.membership.stuck(event.link)
            case Unreached():
                self.membership.unreached(event)
                return []
            case LinkCarried():
                self.membership.carried(event)
                return []
            case WorkerEnded():
                return self.membership.ended(event.worker, event.reason)
            case ClientLost():
                return self._client_lost(event.rid, event.now_s)
            case Tick():
                return self._tick(event.now_s)

    # -- clients -------------------------------------------------------------------------------------------------------

    def _from_client(self, event: FromClient) -> list[Instruction]:
        rid, message, now_s = event.rid, event.message, event.now_s
        h, command = message.header, message.command
        if message.reply:
            # a worker that answers a broker that was here before, or that forgot it: it shall say HELLO
            unknown = rid not in self.clients and message.epoch and command != Command.ERROR
            error = ProtocolError("HELLO: this broker does not know you")
            return [self.traffic.refuse(rid, message, error)] if unknown else []
        if isinstance(h, m.Hello):
            return self._client_hello(rid, message, h, now_s)
        client = self.clients.get(rid)
        if client is None:
            raise ProtocolError(f"{command.name}: expected HELLO first")
        if command in NOT_CLIENTS:
            raise ProtocolError(f"{command.name}: not a request of a client")
        match h:
            case m.DeviceQuery(abilities=False):
                return [ToClient(rid, message.answer(self.devices.listing(h.first, self.traffic.states())))]
            case m.Ping():
                return [ToClient(rid, message.answer(h))]
            case m.Retire():
                return self._retire(rid, message, h)
        session = getattr(h, "session", client.session)
        if session != client.session:
            raise HandleError(f"{command.name}: session {session} is not this client's")
        match h:
            case m.Cancel():
                return self._cancel(rid, message, h)
            case m.Drain():
                return self._drain(rid, client, message, now_s)
            case m.TraceQuery(broker=True):
                return [ToClient(rid, message.answer(m.Traced(0)))]  # the loop, which has the clock, puts in what it noted
        if client.n_inflight >= limits.MAX_INFLIGHT_PER_CLIENT:
            raise Overloaded(f"{command.name}: {client.n_inflight} requests are in flight; wait for replies")
        match h:
            case m.Link():
                return self.stages.link(client, rid, message, h, now_s)
            case m.GraphCompute():
                return [*self.stages.compute(client, rid, message, h, now_s)]
            case m.FetchTensor():
                h = self.stages.fetch(message.device, h)
        pending = Forwarded(rid, message, message.device, now_s + self.traffic.deadline_s)
        out = self.traffic.forward(pending, h, message.payload)
        client.n_inflight += 1
        return [out]

    def _client_hello(self, rid: bytes, message: Message, hello: m.Hello, now_s: float) -> list[Instruction]:
        same_cluster(hello, "client", self.cluster)
        out = self._client_lost(rid, now_s)  # whoever says it again begins again
        if len(self.clients) >= limits.MAX_CLIENTS:
            raise Overloaded(f"HELLO: this broker has {limits.MAX_CLIENTS} clients; try again later")
        self.next_session += 1
        self.clients[rid] = Client(self.next_session)
        self.notes.append(f"client {self.next_session} is here ({hello.software or 'it says of no software'})")
        proof = tokens.answer(hello.token, self.cluster)
        answer = m.Hello(PROTOCOL_VERSION, "broker", proof, session=self.next_session, software=self.software)
        return [*out, ToClient(rid, message.answer(answer))]

    def _cancel(self, rid: bytes, message: Message, h: m.Cancel) -> list[Instruction]:
        out: list[Instruction] = [ToClient(rid, message.answer(m.Ok()))]
        for key, p in self.pending.items():
            if p.rid == rid and p.request.seq == h.seq and not key[1]:
                if isinstance(p, LinkStep):
                    out += self.stages.left(p)
                    continue
                if isinstance(p, PassedCompute):
                    p.route.clear()
                out.append(self.traffic.cancel(key))
        return out

    def _retire(self, rid: bytes, message: Message, h: m.Retire) -> list[Instruction]:
        """Whoever holds something on a device hears that the list has changed, and leaves. Errors: HandleError."""
        entry = self.devices[message.device]
        if entry.retired != h.retired:
            entry.retired = h.retired
            what = "is to be left" if h.retired else "may be used again"
            self.notes.append(f"worker {entry.info.worker} {entry.info.name} {what}")
            self.membership.changed = True
        return [ToClient(rid, message.answer(m.Ok()))]

    def _drain(self, rid: bytes, client: Client, message: Message, now_s: float) -> list[Instruction]:
        """End a session on every device that holds something of it; the client's reply follows the last of theirs.

        A worker that cannot be told now is told when it is back; nobody waits for that.
        """
        out: list[Instruction] = []
        for index, entry in list(self.devices.entries.items()):
            if client.session in entry.holders:
                out += self._end_session(rid, message, client.session, index, now_s)
        if rid and out:
            client.drains[message.seq] = len(out)
            client.n_inflight += 1
        elif rid:
            out.append(ToClient(rid, message.answer(m.Ok())))
        return out

    def _end_session(self, rid: bytes, message: Message, session: int, index: int, now_s: float) -> list[Instruction]:
        """End a session on one device, which it has held something on; at once, or when its worker can be told."""
        entry = self.devices[index]
        entry.holders.discard(session)
        entry.allocated = {k: v for k, v in entry.allocated.items() if k[0] != session}
        try:
            pending = Drained(rid, message, index, now_s + self.traffic.deadline_s, session)
            return [self.traffic.forward(pending, m.Drain(session))]
        except WorkerLost:
            entry.ended.add(session)
            self.devices.forget(index)
            return []

    def _client_lost(self, rid: bytes, now_s: float) -> list[Instruction]:
        client = self.clients.pop(rid, None)
        if client is None:
            return []
        self.notes.append(f"client {client.session} has gone")
        for pending in self.pending.values():  # the same connection may have a new session, which asked for none of it
            if pending.rid == rid:
                pending.rid = b""
        return self._drain(b"", client, Message(Command.DRAIN, m.Drain(client.session)), now_s)

    # -- how requests end ----------------------------------------------------------------------------------------------

    def _from_worker(self, event: FromWorker) -> list[Instruction]:
        message, link = event.message, event.link
        if isinstance(message.header, m.Hello):
            return self.membership.hello(event, message.header)
        worker = self.workers.get(link)
        if worker is None or not message.reply or message.epoch != worker.epoch:
            return []
        worker.heard_s, worker.pinged_s = event.now_s, 0.0
        key = (link, event.bulk, message.seq)
        pending = self.pending.pop(key, None)
        if pending is None:
            if isinstance(message.header, m.Error) and not worker.ready:
                return self.membership.closed(link, message.header.message)
            return []
        h = message.header
        match pending:
            case LinkStep():
                return self.stages.link_step(pending, message, event.now_s)
            case Drained():
                return self._drained(pending)
            case PassedCompute(route=[_, *_]) if isinstance(h, m.ComputeDone):
                try:
                    return self.stages.passed(pending, h, message, event.now_s)
                except GgmqError as e:
                    return self._fail(pending, e)
            case RelayedCompute(relay=relay) if key != relay.keys[-1] and not isinstance(h, m.Error):
                return []  # an earlier stage is done; the client waits for the last one
        return self._replied(pending, message)

    def _replied(self, pending: Pending, reply: Message) -> list[Instruction]:
        """The worker's reply is the client's."""
        h, command = reply.header, pending.request.command
        if isinstance(h, m.Error):
            h, command = h.at(*self.devices.names(pending.device)), Command.ERROR
        else:
            self._account(pending)
        client = self.clients.get(pending.rid)
        if client is None:
            return []
        client.n_inflight -= 1
        answer = pending.request.answer(h, reply.payload, command)
        return [ToClient(pending.rid, answer), *self.stages.answered(client, pending, h), *self._left(client, pending)]

    def _left(self, client: Client, pending: Pending) -> list[Instruction]:
        """A session that has freed all it had on a device that is to be left ends there."""
        entry = self.devices.entries.get(pending.device)
        if entry is None or not entry.retired or not isinstance(pending.request.header, m.FreeBuffer):
            return []
        if client.session not in entry.holders or any(session == client.session for session, _ in entry.allocated):
            return []
        self.membership.changed = True
        return self._end_session(b"", pending.request, client.session, pending.device, self.traffic.now_s)

    def _account(self, pending: Pending) -> None:
        """Remember what was handed out on a device, for the figures of DEVICE_INFO."""
        h, entry = pending.request.header, self.devices.entries.get(pending.device)
        if entry is None:
            return
        if isinstance(h, m.AllocBuffer) and h.session in entry.holders:  # it may have ended meanwhile
            entry.allocated[(h.session, h.buffer)] = h.n_bytes
        elif isinstance(h, m.FreeBuffer):
            entry.allocated.pop((h.session, h.buffer), None)

    def _drained(self, pending: Drained) -> list[Instruction]:
        """A session has ended on a device; the client hears of it when it has on all."""
        client, request = self.clients.get(pending.rid), pending.request
        if client is None:
            return []
        client.drains[request.seq] -= 1
        if client.drains[request.seq]:
            return []
        del client.drains[request.seq]
        client.n_inflight -= 1
        return [ToClient(pending.rid, request.answer(m.Ok()))]

    def _fail(self, pending: Pending, error: GgmqError) -> list[Instruction]:
        """No reply of a worker ends this request any more."""
        match pending:
            case Drained():
                if pending.device in self.devices.entries:
                    self.devices[pending.device].ended.add(pending.session)
                return self._drained(pending)
            case LinkStep():
                return self.stages.pair_known(pending, False)
        client = self.clients.get(pending.rid)
        if client is None:
            return []
        client.n_inflight -= 1
        refusal = self.traffic.refuse(pending.rid, pending.request, error)
        return [refusal, *self.stages.answered(client, pending, refusal.message.header)]

    # -- time ----------------------------------------------------------------------------------------------------------

    def _tick(self, now_s: float) -> list[Instruction]:
        self.traffic.now_s = now_s
        out: list[Instruction] = []
        if self.membership.changed:  # a client that waits for nothing else learns it so, and asks for the list
            self.membership.changed = False
            out += [ToClient(rid, Message(Command.DEVICE_INFO, m.DeviceQuery())) for rid in self.clients]
        out += self.membership.tick(now_s) + self.stages.tick(now_s)
        for key in [k for k, p in self.pending.items() if now_s > p.deadline_s]:
            pending = self.pending.pop(key)
            late = DeadlineExceeded(f"{pending.request.command.name}: no reply within {self.traffic.deadline_s:.0f} s")
            out += self._fail(pending, late.at(*self.devices.names(pending.device)))
        if now_s - self.clients_pinged_s > CLIENT_PING_S:
            self.clients_pinged_s = now_s
            out += [ToClient(rid, Message(Command.PING, m.Ping(0))) for rid in self.clients]
        return out
