"""Computes over several devices, and the links between their workers. Pure.

Where a client asked for links and they are up, every stage gets its part at once and the workers hand the activations on by
themselves (a Relay); otherwise, and while links are dialled, they are passed from stage to stage here.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise

from msgspec import structs

from broker.events import Instruction, ToClient, ToWorker
from broker.records import Client, Forwarded, Linking, LinkStep, Pair, PassedCompute, Pending, Relay, RelayedCompute
from broker.traffic import Traffic
from protocol import messages as m
from protocol.errors import GgmqError, ProtocolError
from protocol.frames import Message
from protocol.messages import Command


class Stages:
    """`secret`: makes the tickets of relays, so that nobody can guess one."""

    def __init__(self, traffic: Traffic, secret: bytes) -> None:
        self.traffic, self.secret = traffic, secret
        self.n_tickets = 0

    # -- computes ------------------------------------------------------------------------------------------------------

    def compute(self, client: Client, rid: bytes, request: Message, h: m.GraphCompute, now_s: float) -> list[ToWorker]:
        """GRAPH_COMPUTE of a client. Errors: HandleError, WorkerLost."""
        pairs = list(pairwise([request.device, *(s.device for s in h.route)]))
        due_s = now_s + self.traffic.deadline_s
        if pairs and client.linked.issuperset(pairs) and not self._passes(client, rid):
            return self._relay(client, rid, request, h, pairs, due_s)
        client.passes |= bool(pairs)
        for step in h.route:  # what a route names keeps its number while the session is there
            self.traffic.devices[step.device].holders.add(client.session)
        frames = list(request.payload)
        first = PassedCompute(rid, request, request.device, due_s, list(h.route), frames[h.n_payload :])
        out = self.traffic.forward(first, m.StageCompute(h.session, h.digest, h.n_payload), frames[: h.n_payload])
        client.n_inflight += 1
        return [out]

    def _passes(self, client: Client, rid: bytes) -> bool:
        """Whether a compute of a client still passes through here: what is handed over could overtake it."""
        if client.passes:
            client.passes = any(isinstance(p, PassedCompute) and p.rid == rid for p in self.traffic.pending.values())
        return client.passes

    def passed(self, pending: PassedCompute, done: m.ComputeDone, reply: Message, now_s: float) -> list[Instruction]:
        """A stage has answered: its outputs go to the next one. Errors: HandleError, WorkerLost."""
        if pending.rid not in self.traffic.clients:
            return []  # its session has ended; nothing is begun for it any more
        step, rest = pending.route[0], pending.route[1:]
        payload = [*reply.payload, *pending.frames[: step.n_payload]]
        h = pending.request.header
        session = h.session if isinstance(h, m.GraphCompute) else 0
        following = PassedCompute(pending.rid, pending.request, step.device, now_s + self.traffic.deadline_s, rest,
                                  pending.frames[step.n_payload :])  # fmt: skip
        header = m.StageCompute(session, step.digest, len(payload), spent_s=done.compute_s, spent_nodes=done.n_nodes)
        return [self.traffic.forward(following, header, payload)]

    def _relay(
        self, client: Client, rid: bytes, request: Message, h: m.GraphCompute, pairs: list[Pair], due_s: float
    ) -> list[ToWorker]:
        """Give every stage its part of a compute at once; the workers hand the activations on."""
        relay, frames = Relay(pairs), list(request.payload)
        stages = [m.RouteStep(request.device, h.digest, h.n_payload), *h.route]
        for stage in stages:
            self.traffic.device(stage.device)
        out: list[ToWorker] = []
        take = b""
        for i, stage in enumerate(stages):
            give = m.Give(_link_number(pairs[i]), self._ticket()) if i < len(pairs) else None
            header = m.StageCompute(h.session, stage.digest, stage.n_payload, take=take, give=give)
            part, frames = frames[: stage.n_payload], frames[stage.n_payload :]
            sent = self.traffic.forward(RelayedCompute(rid, request, stage.device, due_s, relay), header, part)
            relay.keys.append((sent.link, sent.bulk, sent.message.seq))
            out.append(sent)
            take = give.ticket if give is not None else b""
        client.n_inflight += 1
        return out

    def _ticket(self) -> bytes:
        self.n_tickets += 1
        return hashlib.blake2b(self.n_tickets.to_bytes(8), key=self.secret, digest_size=16).digest()

    def answered(self, client: Client, pending: Pending, answer: m.Header) -> list[Instruction]:
        """The client has its answer: nobody waits for the other stages any more, and after an error they need not go on."""
        if not isinstance(pending, RelayedCompute):
            return []
        relay = pending.relay
        failed = isinstance(answer, m.Error)
        if isinstance(answer, m.Error) and answer.retryable:  # the next one goes another way
            client.linked.difference_update(relay.pairs)
        out: list[Instruction] = []
        for key in relay.keys:
            other = self.traffic.pending.get(key)
            if other is not None and other.rid:
                other.rid = b""
                out += [self.traffic.cancel(key)] if failed else []
        return out

    # -- links ---------------------------------------------------------------------------------------------------------

    def link(self, client: Client, rid: bytes, request: Message, h: m.Link, now_s: float) -> list[Instruction]:
        """Have each device's worker connect to the next one's: ask that one where it is, then tell the first to dial.

        Errors: ProtocolError while computes are under way: what passes here could be overtaken by what is handed over.
        """
        pairs = list(pairwise(h.devices))
        if any(p.rid == rid and isinstance(p, PassedCompute | RelayedCompute) for p in self.traffic.pending.values()):
            raise ProtocolError("LINK: computes of this session are under way; wait for their replies")
        for device in h.devices:
            self.traffic.device(device)
        todo = [p for p in pairs if p not in client.linked]
        if any(a == b for a, b in pairs) or not todo:
            return [ToClient(rid, request.answer(m.Found(not todo)))]
        client.linking[request.seq] = Linking(pairs, len(todo))
        client.n_inflight += 1
        due_s = now_s + self.traffic.deadline_s
        return [self._name_keys(LinkStep(rid, request, pair[1], due_s, pair), self._keys()) for pair in todo]

    def _keys(self) -> frozenset[bytes]:
        """The public keys of all workers that have keys of their own."""
        return frozenset(w.key for w in self.traffic.workers.values() if w.key)

    def _name_keys(self, pending: Pending, keys: frozenset[bytes]) -> ToWorker:
        """Ask a worker to be reachable for others, these among them."""
        out = self.traffic.forward(pending, m.PeerListen(sorted(keys)))
        self.traffic.workers[out.link].named = keys
        return out

    def tick(self, now_s: float) -> list[Instruction]:
        """Workers that have gone, or whose keys were removed, shall not stay connected to others."""
        out: list[Instruction] = []
        there: frozenset[bytes] | None = None
        for link, worker in self.traffic.workers.items():
            if not worker.ready or not worker.named:
                continue
            there = self._keys() if there is None else there
            index = next((i for i, e in self.traffic.devices.of(link) if not e.lost), None)
            if worker.named - there and index is not None:
                request = Message(Command.PEER_LISTEN, m.PeerListen())
                pending = Forwarded(b"", request, index, now_s + self.traffic.deadline_s)
                out.append(self._name_keys(pending, worker.named & there))
        return out

    def fetch(self, device: int, h: m.FetchTensor) -> m.FetchTensor:
        """FETCH_TENSOR of a client, for its device's worker: over the link that a LINK of the two devices made, if one did.

        Errors: HandleError.
        """
        self.traffic.devices[h.source]  # one that is not there is nobody's
        return structs.replace(h, link=_link_number((device, h.source)))

    def link_step(self, pending: LinkStep, reply: Message, now_s: float) -> list[Instruction]:
        """A worker has said where it is reached, or whether it reached the other."""
        h = reply.header
        if not isinstance(h, m.PeerAddress):
            return self.pair_known(pending, isinstance(h, m.Found) and h.found)
        due_s = now_s + self.traffic.deadline_s
        try:
            entry = self.traffic.devices[pending.device]
            endpoint = h.endpoint or (entry.link if entry.link.startswith("tcp://") else "")
            _, worker = self.traffic.device(pending.device)
            dial = m.PeerDial(_link_number(pending.pair), endpoint, h.instance, entry.local, worker.key)
            return [self.traffic.forward(LinkStep(pending.rid, pending.request, pending.pair[0], due_s, pending.pair), dial)]
        except GgmqError:
            return self.pair_known(pending, False)

    def left(self, pending: LinkStep) -> list[Instruction]:
        """The client waits for its LINK no more. Links that come up are used all the same."""
        client, seq = self.traffic.clients[pending.rid], pending.request.seq
        linking = client.linking[seq]
        if not linking.waited:
            return []
        linking.waited = False
        client.n_inflight -= 1
        return [ToClient(pending.rid, pending.request.answer(m.Found(False)))]

    def pair_known(self, pending: LinkStep, found: bool) -> list[Instruction]:
        """Whether one pair of a LINK is linked now. The client hears of it when all are known."""
        client, seq = self.traffic.clients.get(pending.rid), pending.request.seq
        if client is None:
            return []
        linking = client.linking[seq]
        linking.found &= found
        linking.n_left -= 1
        if linking.n_left:
            return []
        del client.linking[seq]
        if linking.found:
            client.linked.update(linking.pairs)
        if not linking.waited:
            return []
        client.n_inflight -= 1
        return [ToClient(pending.rid, pending.request.answer(m.Found(linking.found)))]


def _link_number(pair: Pair) -> int:
    """What a worker calls its link: the two devices in one number, never 0."""
    return 1 + (pair[0] << 16 | pair[1])
