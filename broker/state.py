"""What a broker knows and decides. Pure: `handle(event) -> instructions`; no socket, no clock.

A client's request goes to the worker of the device it names under that worker's own (epoch, seq); the reply comes back
under the client's. A GRAPH_COMPUTE with a route is one round trip for the client: where it asked for links and they are up,
every stage gets its part at once and the workers hand the activations on by themselves (a Relay); otherwise they are passed
from stage to stage here. Any loss becomes an ordinary ERROR reply to every request that waited for it.

A worker that answers no PING is silent: it is asked for HELLO under a new epoch, and has its devices and sessions again
when it says it. One whose connection is closed is lost until it dials in, or is reached, again.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import pairwise

from broker.devices import DeviceEntry, Devices, State
from broker.events import (
    ClientLost,
    CloseLink,
    Event,
    FromClient,
    FromWorker,
    Instruction,
    Link,
    LinkLost,
    LinkOpened,
    Redial,
    Tick,
    ToClient,
    ToWorker,
    Unreached,
    WorkerEnded,
)
from broker.records import Client, Linking, Pair, Pending, PendingKey, Relay, Worker
from protocol import PROTOCOL_VERSION, limits, tokens
from protocol import messages as m
from protocol.errors import (
    BY_CODE,
    DeadlineExceeded,
    ForeignCluster,
    GgmqError,
    HandleError,
    Overloaded,
    ProtocolError,
    Unavailable,
    WorkerLost,
)
from protocol.frames import Frame, Message
from protocol.messages import BULK, COMMAND_OF, NOT_CLIENTS, Command

CLIENT_PING_S = 5.0
NO_HELLO = f"no HELLO within {limits.RECONNECT_S:.0f} s; is a ggmq worker listening there?"


class BrokerState:
    """Attributes:
    token: names this broker to its workers; two brokers never have the same.
    secret: makes the tickets of relays, so that nobody can guess one.
    cluster: the id of the cluster that this broker was started for; who says that he belongs to another one is refused.
    now_s: time of the last Tick.
    notes: who came and went, and why, since whoever keeps a log took them.
    """

    def __init__(
        self, software: str, first_epoch: int, token: bytes = b"broker", first_session: int = 1,
        deadline_s: float = limits.REQUEST_DEADLINE_S, secret: bytes = b"secret", cluster: bytes = b"",
    ) -> None:  # fmt: skip
        self.software, self.next_epoch, self.deadline_s = software, first_epoch, deadline_s
        self.token, self.next_session, self.secret = tokens.token(token, "broker", cluster), first_session, secret
        self.cluster = cluster
        self.notes: list[str] = []
        self.clients: dict[bytes, Client] = {}
        self.workers: dict[Link, Worker] = {}
        self.devices = Devices()
        self.pending: dict[PendingKey, Pending] = {}
        self.now_s = self.clients_pinged_s = 0.0
        self.n_refused = self.n_tickets = 0

    def handle(self, event: Event) -> list[Instruction]:
        """One step. Errors of a peer become replies to it; nothing is raised for them."""
        match event:
            case FromClient():
                try:
                    return self._from_client(event)
                except GgmqError as e:
                    return [self._refuse(event.rid, event.message, e)]
            case FromWorker():
                return self._from_worker(event)
            case LinkOpened():
                return self._open(event.link, event.now_s)
            case LinkLost():
                return self._closed(event.link, event.reason)
            case Unreached():
                worker = self.workers.get(event.link)
                if worker is not None and not worker.ready and not worker.silent:
                    worker.lost = event.reason
                return []
            case WorkerEnded():
                links = {e.link for e in self.devices.entries.values() if e.info.worker == event.worker and not e.lost}
                return [i for link in links for i in self._closed(link, event.reason)]
            case ClientLost():
                return self._client_lost(event.rid, event.now_s)
            case Tick():
                return self._tick(event.now_s)

    def _refuse(self, rid: bytes, request: Message, error: GgmqError) -> ToClient:
        self.n_refused += 1
        return ToClient(rid, request.answer(m.Error(error.code, str(error)[:4000]), command=Command.ERROR))

    # -- clients -------------------------------------------------------------------------------------------------------

    def _from_client(self, event: FromClient) -> list[Instruction]:
        rid, message = event.rid, event.message
        h = message.header
        if message.reply:
            # a worker that answers a broker that was here before, or that forgot it: it shall say HELLO
            unknown = rid not in self.clients and message.epoch and message.command != Command.ERROR
            return [self._refuse(rid, message, ProtocolError("HELLO: this broker does not know you"))] if unknown else []
        if isinstance(h, m.Hello):
            return self._client_hello(rid, message, h, event.now_s)
        client = self.clients.get(rid)
        if client is None:
            raise ProtocolError(f"{message.command.name}: expected HELLO first")
        if message.command in NOT_CLIENTS:
            raise ProtocolError(f"{message.command.name}: not a request of a client")
        match h:
            case m.DeviceQuery():
                return [ToClient(rid, message.answer(self.devices.listing(h.first, self._states())))]
            case m.Ping():
                return [ToClient(rid, message.answer(h))]
        session = getattr(h, "session", client.session)
        if session != client.session:
            raise HandleError(f"{message.command.name}: session {session} is not this client's")
        if isinstance(h, m.Cancel):
            return self._cancel(rid, message, h)
        if isinstance(h, m.Drain):
            return self._drain(rid, client, message, event.now_s)
        if client.n_inflight >= limits.MAX_INFLIGHT_PER_CLIENT:
            raise Overloaded(f"{message.command.name}: {client.n_inflight} requests are in flight; wait for replies")
        if isinstance(h, m.Link):
            return self._link(client, rid, message, h, event.now_s)
        pending = Pending(rid, message, message.device, event.now_s + self.deadline_s)
        payload = list(message.payload)
        if isinstance(h, m.GraphCompute):
            pairs = list(pairwise([message.device, *(s.device for s in h.route)]))
            if pairs and client.linked.issuperset(pairs):
                return self._relay(client, pending, h, pairs)
            for step in h.route:  # what a route names keeps its number while the session is there
                self.devices[step.device].holders.add(client.session)
            pending.route = list(h.route)
            pending.frames = payload[h.n_payload :]
            payload = payload[: h.n_payload]
            h = m.StageCompute(h.session, h.digest, h.n_payload)
        out = self._forward(pending, message.device, h, payload)
        client.n_inflight += 1
        return [out]

    def _client_hello(self, rid: bytes, message: Message, hello: m.Hello, now_s: float) -> list[Instruction]:
        self._same_cluster(hello, "client")
        out = self._client_lost(rid, now_s)  # whoever says it again begins again
        if len(self.clients) >= limits.MAX_CLIENTS:
            raise Overloaded(f"HELLO: this broker has {limits.MAX_CLIENTS} clients; try again later")
        self.next_session += 1
        self.clients[rid] = Client(self.next_session)
        self.notes.append(f"client {self.next_session} is here ({hello.software or 'it says of no software'})")
        proof = tokens.answer(hello.token, self.cluster)
        answer = m.Hello(PROTOCOL_VERSION, "broker", proof, session=self.next_session, software=self.software)
        return [*out, ToClient(rid, message.answer(answer))]

    def _same_cluster(self, h: m.Hello, role: str) -> None:
        """Errors: ForeignCluster when somebody looks for the broker of another cluster."""
        if tokens.of_a_cluster(h.token) and not tokens.belongs(h.token, role, self.cluster):
            whose = "another cluster" if self.cluster else "a cluster, and this broker is of none"
            raise ForeignCluster(f"HELLO: expected a {role} of this broker's cluster, got one of {whose}")

    def _states(self) -> dict[Link, State]:
        """What the workers that are there do: ready or silent."""
        late = self.now_s - limits.PING_DEADLINE_S
        return {link: "silent" if w.silent or (w.pinged_s and w.pinged_s < late) else "ready"
                for link, w in self.workers.items() if w.ready or w.silent}  # fmt: skip

    def _device(self, device: int) -> tuple[DeviceEntry, Worker]:
        """A device and its worker. Errors: HandleError, WorkerLost."""
        entry = self.devices[device]
        worker = self.workers.get(entry.link)
        if entry.lost or worker is None or not worker.ready:
            silent = worker.silent or worker.lost if worker is not None else ""
            raise _lost(entry, entry.lost or silent or "it is not connected yet")
        return entry, worker

    def _forward(self, pending: Pending, device: int, header: m.Header, payload: list[Frame]) -> ToWorker:
        entry, worker = self._device(device)
        command = COMMAND_OF[type(header)]
        bulk = command in BULK
        if bulk:
            worker.bulk_seq += 1
        else:
            worker.seq += 1
        seq = worker.bulk_seq if bulk else worker.seq
        pending.device = device
        session = getattr(header, "session", 0)
        if session and command != Command.DRAIN:
            entry.holders.add(session)
        self.pending[(entry.link, bulk, seq)] = pending
        message = Message(command, header, tuple(payload), False, entry.local, worker.epoch, seq)
        return ToWorker(entry.link, bulk, message)

    def _cancel(self, rid: bytes, message: Message, h: m.Cancel) -> list[Instruction]:
        out: list[Instruction] = [ToClient(rid, message.answer(m.Ok()))]
        for key, p in self.pending.items():
            if p.rid == rid and p.request.seq == h.seq and not key[1]:
                p.route.clear()
                out += self._cancel_at(key)
        return out

    def _cancel_at(self, key: PendingKey) -> list[Instruction]:
        """Tell a worker that a request of its control channel is of no more use. Its reply ends the request as any does."""
        link, _, seq = key
        pending, worker = self.pending[key], self.workers[link]
        worker.seq += 1
        cancel = m.Cancel(getattr(pending.request.header, "session", 0), seq)
        local = self.devices[pending.device].local
        return [ToWorker(link, False, Message(Command.CANCEL, cancel, (), False, local, worker.epoch, worker.seq))]

    def _drain(self, rid: bytes, client: Client, message: Message, now_s: float) -> list[Instruction]:
        """End a session on every device that holds something of it; the client's reply follows the last of theirs.

        A worker that cannot be told now is told when it is back; nobody waits for that.
        """
        out: list[Instruction] = []
        for index, entry in list(self.devices.entries.items()):
            if client.session not in entry.holders:
                continue
            entry.holders.discard(client.session)
            entry.allocated = {k: v for k, v in entry.allocated.items() if k[0] != client.session}
            try:
                p = Pending(rid, message, index, now_s + self.deadline_s)
                out.append(self._forward(p, index, m.Drain(client.session), []))
            except WorkerLost:
                entry.ended.add(client.session)
                self.devices.forget(index)
        if rid and out:
            client.drains[message.seq] = len(out)
            client.n_inflight += 1
        elif rid:
            out.append(ToClient(rid, message.answer(m.Ok())))
        return out

    def _client_lost(self, rid: bytes, now_s: float) -> list[Instruction]:
        client = self.clients.pop(rid, None)
        if client is None:
            return []
        self.notes.append(f"client {client.session} has gone")
        return self._drain(b"", client, Message(Command.DRAIN, m.Drain(client.session)), now_s)

    # -- links ---------------------------------------------------------------------------------------------------------

    def _link(self, client: Client, rid: bytes, message: Message, h: m.Link, now_s: float) -> list[Instruction]:
        """Have each device's worker connect to the next one's: ask that one where it is, then tell the first to dial.

        Errors: ProtocolError while computes are under way: what passes here could be overtaken by what is handed over.
        """
        pairs = list(pairwise(h.devices))
        if any(p.rid == rid and p.request.command == Command.GRAPH_COMPUTE for p in self.pending.values()):
            raise ProtocolError("LINK: computes of this session are under way; wait for their replies")
        for device in h.devices:
            self._device(device)
        todo = [p for p in pairs if p not in client.linked]
        if any(a == b for a, b in pairs) or not todo:
            return [ToClient(rid, message.answer(m.Found(not todo)))]
        client.linking[message.seq] = Linking(pairs, len(todo))
        client.n_inflight += 1
        due = now_s + self.deadline_s
        return [self._forward(Pending(rid, message, b, due, pair=(a, b)), b, m.PeerListen(), [])
                for a, b in todo]  # fmt: skip

    def _link_step(self, pending: Pending, reply: Message, now_s: float) -> list[Instruction]:
        h, pair = reply.header, pending.pair
        assert pair is not None  # the caller saw it
        if isinstance(h, m.PeerAddress):
            a, b = pair
            entry = self.devices[b]
            endpoint = h.endpoint or (entry.link if entry.link.startswith("tcp://") else "")
            dial = m.PeerDial(_link_number(pair), endpoint, h.instance, entry.local)
            following = Pending(pending.rid, pending.request, a, now_s + self.deadline_s, pair=pair)
            try:
                return [self._forward(following, a, dial, [])]
            except GgmqError:
                return self._pair_known(pending, False)
        return self._pair_known(pending, isinstance(h, m.Found) and h.found)

    def _pair_known(self, pending: Pending, found: bool) -> list[Instruction]:
        client, seq = self.clients.get(pending.rid), pending.request.seq
        if client is None:
            return []
        linking = client.linking[seq]
        linking.found &= found
        linking.n_left -= 1
        if linking.n_left:
            return []
        del client.linking[seq]
        client.n_inflight -= 1
        if linking.found:
            client.linked.update(linking.pairs)
        return [ToClient(pending.rid, pending.request.answer(m.Found(linking.found)))]

    def _relay(self, client: Client, first: Pending, h: m.GraphCompute, pairs: list[Pair]) -> list[Instruction]:
        """Give every stage its part of a compute at once; the workers hand the activations on."""
        request, relay, frames = first.request, Relay(pairs), list(first.request.payload)
        stages = [m.RouteStep(request.device, h.digest, h.n_payload), *h.route]
        for stage in stages:
            self._device(stage.device)
        out: list[Instruction] = []
        take = b""
        for i, stage in enumerate(stages):
            give = m.Give(_link_number(pairs[i]), self._ticket()) if i < len(pairs) else None
            header = m.StageCompute(h.session, stage.digest, stage.n_payload, take=take, give=give)
            part, frames = frames[: stage.n_payload], frames[stage.n_payload :]
            pending = Pending(first.rid, request, stage.device, first.deadline_s, relay=relay)
            sent = self._forward(pending, stage.device, header, part)
            relay.keys.append((sent.link, sent.bulk, sent.message.seq))
            out.append(sent)
            take = give.ticket if give is not None else b""
        client.n_inflight += 1
        return out

    def _ticket(self) -> bytes:
        self.n_tickets += 1
        return hashlib.blake2b(self.n_tickets.to_bytes(8), key=self.secret, digest_size=16).digest()

    def _end_relay(self, client: Client, pending: Pending, h: m.Header) -> list[Instruction]:
        """The client has its answer: nobody waits for the other stages any more, and after an error they need not go on."""
        relay = pending.relay
        if relay is None:
            return []
        failed = isinstance(h, m.Error)
        if isinstance(h, m.Error) and issubclass(BY_CODE.get(h.code, GgmqError), Unavailable):
            client.linked.difference_update(relay.pairs)
        out: list[Instruction] = []
        for key in relay.keys:
            other = self.pending.get(key)
            if other is not None and other.rid:
                other.rid = b""
                out += self._cancel_at(key) if failed else []
        return out

    # -- workers -------------------------------------------------------------------------------------------------------

    def _open(self, link: Link, now_s: float) -> list[Instruction]:
        """Say HELLO to a worker that listens; both channels, one token."""
        before = self.workers.get(link)
        worker = self.workers[link] = Worker(self._epoch(), now_s, heard_s=now_s, lost=before.lost if before else "")
        return [self._say_hello(link, worker)]

    def _say_hello(self, link: Link, worker: Worker) -> ToWorker:
        """HELLO under the worker's new epoch; `session` tells whether sessions of ours go on there."""
        goes_on = int(any(e.holders or e.ended for _, e in self.devices.of(link)))
        hello = m.Hello(PROTOCOL_VERSION, "broker", self.token, worker.epoch, goes_on, self.software)
        return ToWorker(link, False, Message(Command.HELLO, hello, epoch=worker.epoch))

    def _epoch(self) -> int:
        self.next_epoch += 1
        return self.next_epoch & 0xFFFFFFFF

    def _from_worker(self, event: FromWorker) -> list[Instruction]:
        message, link = event.message, event.link
        worker = self.workers.get(link)
        if isinstance(message.header, m.Hello):
            return self._worker_hello(event, message.header, worker)
        if worker is None or not message.reply or message.epoch != worker.epoch:
            return []
        worker.heard_s, worker.pinged_s = event.now_s, 0.0
        key = (link, event.bulk, message.seq)
        pending = self.pending.pop(key, None)
        if pending is None:
            if message.command == Command.ERROR and not worker.ready and isinstance(message.header, m.Error):
                return self._closed(link, message.header.message)
            return []
        if pending.pair is not None:
            return self._link_step(pending, message, event.now_s)
        relay = pending.relay
        if relay is not None and key != relay.keys[-1] and message.command != Command.ERROR:
            return []  # an earlier stage is done; the client waits for the last one
        return self._replied(pending, message, event.now_s)

    def _worker_hello(self, event: FromWorker, h: m.Hello, worker: Worker | None) -> list[Instruction]:
        if not event.message.reply:
            return self._dialled_in(event, h, worker)
        link = event.link
        if worker is None or worker.ready or event.message.epoch != worker.epoch:
            return []
        worker.heard_s = event.now_s
        if event.bulk:
            return []
        bulk = m.Hello(PROTOCOL_VERSION, "broker-bulk", self.token, worker.epoch, software=self.software)
        say_bulk = ToWorker(link, True, Message(Command.HELLO, bulk, epoch=worker.epoch))
        return [say_bulk, *self._register(link, worker, h, event.now_s)]

    def _dialled_in(self, event: FromWorker, h: m.Hello, worker: Worker | None) -> list[Instruction]:
        """A worker's own HELLO: it gets its epoch here."""
        message, link, now_s = event.message, event.link, event.now_s
        out: list[Instruction] = []
        if not event.bulk:
            try:
                self._same_cluster(h, "worker")
                known = self.devices.known(h.token)
                self.devices.room_for(0 if known else len(h.devices))
            except (Overloaded, ForeignCluster) as e:
                refusal = message.answer(m.Error(e.code, str(e)), command=Command.ERROR)
                return [ToWorker(link, False, refusal), CloseLink(link)]
            for before in {e.link for e in known if e.link != link}:
                out += self._closed(before, "it dialled in again")
            out += self._fail_all(link, "it dialled in again")
            worker = self.workers[link] = Worker(self._epoch(), now_s, heard_s=now_s, hello=h, instance=h.token)
        elif worker is None:
            return []
        role = "broker-bulk" if event.bulk else "broker"
        goes_on = int(any(e.holders or e.ended for e in self.devices.known(h.token)))
        hello = m.Hello(PROTOCOL_VERSION, role, self.token, worker.epoch, goes_on, self.software)
        out.append(ToWorker(link, event.bulk, message.answer(hello)))
        if event.bulk and worker.hello is not None:  # both channels are there: now it can be given work
            out += self._register(link, worker, worker.hello, now_s)
        return out

    def _register(self, link: Link, worker: Worker, h: m.Hello, now_s: float) -> list[Instruction]:
        """A worker is ready. What ended while it was away is ended there now."""
        worker.ready, worker.silent, worker.lost, worker.hello, worker.instance = True, "", "", None, h.token
        worker.pinged_s, worker.heard_s = 0.0, now_s
        self.devices.register(link, h)
        self._note(link, "is ready")
        out: list[Instruction] = []
        for index, entry in self.devices.of(link):
            ended, entry.ended = entry.ended, set()
            for session in sorted(ended):
                drain = Message(Command.DRAIN, m.Drain(session))
                pending = Pending(b"", drain, index, now_s + self.deadline_s)
                out.append(self._forward(pending, index, m.Drain(session), []))
        return out

    def _replied(self, pending: Pending, reply: Message, now_s: float) -> list[Instruction]:
        request, h = pending.request, reply.header
        self._account(pending, reply)
        if isinstance(h, m.ComputeDone) and pending.route:
            return self._next_stage(pending, h, reply, now_s)
        client = self.clients.get(pending.rid)
        if client is None:
            return []
        if request.command == Command.DRAIN:
            client.drains[request.seq] -= 1
            if client.drains[request.seq]:
                return []
            del client.drains[request.seq]
            h, reply = m.Ok(), replace(reply, payload=())
        client.n_inflight -= 1
        if isinstance(h, m.Error):
            info = self.devices[pending.device].info
            h = m.Error(h.code, f"{info.worker} {info.name}: {h.message}"[:4000])
        rid = pending.rid
        command = Command.ERROR if isinstance(h, m.Error) else request.command
        return [ToClient(rid, request.answer(h, reply.payload, command)), *self._end_relay(client, pending, h)]

    def _account(self, pending: Pending, reply: Message) -> None:
        """Remember what was handed out on a device, for the figures of DEVICE_INFO."""
        h = pending.request.header
        if reply.command == Command.ERROR:
            return
        entry = self.devices[pending.device]
        if isinstance(h, m.AllocBuffer) and h.session in entry.holders:  # it may have ended meanwhile
            entry.allocated[(h.session, h.buffer)] = h.n_bytes
        elif isinstance(h, m.FreeBuffer):
            entry.allocated.pop((h.session, h.buffer), None)

    def _next_stage(self, pending: Pending, done: m.ComputeDone, reply: Message, now_s: float) -> list[Instruction]:
        if pending.rid not in self.clients:
            return []  # its session has ended; nothing is begun for it any more
        step, rest = pending.route[0], pending.route[1:]
        payload = [*reply.payload, *pending.frames[: step.n_payload]]
        h = pending.request.header
        session = h.session if isinstance(h, m.GraphCompute) else 0
        following = Pending(pending.rid, pending.request, step.device, now_s + self.deadline_s, rest,
                            pending.frames[step.n_payload :])  # fmt: skip
        header = m.StageCompute(session, step.digest, len(payload), spent_s=done.compute_s, spent_nodes=done.n_nodes)
        try:
            return [self._forward(following, step.device, header, payload)]
        except GgmqError as e:
            return self._fail(following, e)

    def _fail(self, pending: Pending, error: GgmqError) -> list[Instruction]:
        if isinstance(pending.request.header, m.Drain):
            self.devices[pending.device].ended.add(pending.request.header.session)
        client = self.clients.get(pending.rid)
        if client is None:
            return []
        if pending.request.command == Command.DRAIN:
            reply = pending.request.answer(m.Ok())
            return self._replied(pending, reply, 0.0)
        if pending.pair is not None:
            return self._pair_known(pending, False)
        client.n_inflight -= 1
        refusal = self._refuse(pending.rid, pending.request, error)
        return [refusal, *self._end_relay(client, pending, refusal.message.header)]

    def _fail_all(self, link: Link, reason: str) -> list[Instruction]:
        """Answer every request that waits for a worker; links of its devices are no more."""
        indices = {i for i, _ in self.devices.of(link)}
        for client in self.clients.values():
            client.linked -= {pair for pair in client.linked if indices.intersection(pair)}
        out: list[Instruction] = []
        for key in [k for k in self.pending if k[0] == link]:
            pending = self.pending.pop(key)
            out += self._fail(pending, _lost(self.devices[pending.device], reason))
        return out

    def _closed(self, link: Link, reason: str) -> list[Instruction]:
        """A connection is closed. A worker that listens is dialled again, one that dialled in may come back by itself."""
        worker = self.workers.get(link)
        if worker is None:
            return []
        if worker.ready or worker.silent:
            self._note(link, f"was lost: {reason}")
        worker.ready, worker.silent, worker.lost = False, "", reason
        out = self._fail_all(link, reason)
        for index, entry in self.devices.of(link):
            entry.lost = reason
            self.devices.forget(index)
        if link.startswith("tcp://"):
            return [*out, Redial(link)]
        del self.workers[link]
        return [*out, CloseLink(link)]

    def _fall_silent(self, link: Link, worker: Worker, now_s: float) -> list[Instruction]:
        """Nothing of this epoch counts any more; when the worker answers again it is under the next one."""
        worker.silent = f"no answer to PING for {now_s - worker.pinged_s:.1f} s"
        self._note(link, f"is silent: {worker.silent}")
        out = self._fail_all(link, worker.silent)
        worker.ready, worker.epoch = False, self._epoch()
        return [*out, self._say_hello(link, worker)]

    def _note(self, link: Link, what: str) -> None:
        devices = ", ".join(f"{e.info.worker} {e.info.name}" for _, e in self.devices.of(link))
        self.notes.append(f"worker {devices} {what}" + (f" ({link})" if link.startswith("tcp://") else ""))

    # -- time ----------------------------------------------------------------------------------------------------------

    def _tick(self, now_s: float) -> list[Instruction]:
        self.now_s = now_s
        out: list[Instruction] = []
        for link, worker in list(self.workers.items()):
            if not worker.ready and not worker.silent:
                if now_s - worker.opened_s > limits.RECONNECT_S:
                    out += self._closed(link, worker.lost or NO_HELLO)
                continue
            waited_s = now_s - worker.pinged_s if worker.pinged_s and worker.ready else 0.0
            if waited_s > limits.PING_DEADLINE_S and (waited_s > limits.COMPUTE_STALL_S or not self._computes(link)):
                out += self._fall_silent(link, worker, now_s)
            interval_s = limits.PING_INTERVAL_S if worker.ready else limits.PROBE_S
            if now_s - max(worker.heard_s, worker.asked_s) >= interval_s:
                out.append(self._ping(link, worker, now_s))
        for key in [k for k, p in self.pending.items() if now_s > p.deadline_s]:
            pending = self.pending.pop(key)
            name = pending.request.command.name
            out += self._fail(pending, DeadlineExceeded(f"{name}: no reply within {self.deadline_s:.0f} s"))
        if now_s - self.clients_pinged_s > CLIENT_PING_S:
            self.clients_pinged_s = now_s
            out += [ToClient(rid, Message(Command.PING, m.Ping(0))) for rid in self.clients]
        return out

    def _computes(self, link: Link) -> bool:
        return any(k[0] == link and p.request.command == Command.GRAPH_COMPUTE for k, p in self.pending.items())

    def _ping(self, link: Link, worker: Worker, now_s: float) -> ToWorker:
        """Sent while others are unanswered too: where a connection is closed, that is when it shows."""
        worker.pinged_s, worker.asked_s = worker.pinged_s or now_s, now_s
        worker.seq += 1
        return ToWorker(link, False, Message(Command.PING, m.Ping(worker.seq), (), False, 0, worker.epoch, worker.seq))


def _link_number(pair: Pair) -> int:
    """What a worker calls its link: the two devices in one number, never 0."""
    return 1 + (pair[0] << 16 | pair[1])


def _lost(entry: DeviceEntry, reason: str) -> WorkerLost:
    """The same words for a request that was under way and for one that comes after."""
    return WorkerLost(f"worker {entry.info.worker} ({entry.info.name}) was lost: {reason}")
