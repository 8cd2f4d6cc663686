"""How workers come and go: HELLO, silence, loss. Pure.

A worker is ready when both of its channels have said HELLO: what was sent before it over one of them has been read then.
One that answers no PING is silent: it is asked for HELLO under a new epoch, and has its devices and sessions again when it
says it. One whose connection is closed is lost until it dials in, or is reached, again.
"""

from __future__ import annotations

from collections.abc import Callable

from broker.events import CloseLink, FromWorker, Instruction, Link, LinkCarried, Redial, ToWorker, Unreached
from broker.records import Drained, Pending, Worker
from broker.traffic import Traffic
from protocol import PROTOCOL_VERSION, limits, tokens
from protocol import messages as m
from protocol.errors import ForeignCluster, GgmqError, Overloaded
from protocol.frames import Message
from protocol.messages import Command

MAX_NAMED = 8
"""Sessions that a line for an operator names."""
NO_HELLO = f"no HELLO within {limits.RECONNECT_S:.0f} s; is a ggmq worker listening there?"

Fail = Callable[[Pending, GgmqError], list[Instruction]]


def same_cluster(h: m.Hello, role: str, cluster: bytes) -> None:
    """Errors: ForeignCluster when somebody looks for the broker of another cluster."""
    if tokens.of_a_cluster(h.token) and not tokens.belongs(h.token, role, cluster):
        whose = "another cluster" if cluster else "a cluster, and this broker is of none"
        raise ForeignCluster(f"HELLO: expected a {role} of this broker's cluster, got one of {whose}")


class Membership:
    """Attributes:
    token: names this broker to its workers.
    cluster: the id of the cluster that this broker was started for.
    fail: ends a request that waited for a worker which is of no more use.
    notes: who came and went, and why.
    changed: somebody did, since it was last set to False.
    """

    def __init__(
        self, traffic: Traffic, software: str, token: bytes, cluster: bytes, first_epoch: int, fail: Fail, notes: list[str]
    ) -> None:  # fmt: skip
        self.traffic, self.software, self.token, self.cluster = traffic, software, token, cluster
        self.next_epoch, self.fail, self.notes, self.changed = first_epoch, fail, notes, False

    # -- HELLO ---------------------------------------------------------------------------------------------------------

    def open(self, link: Link, now_s: float) -> list[Instruction]:
        """Say HELLO to a worker that listens; both channels, one token."""
        before = self.traffic.workers.get(link)
        worker = Worker(self._epoch(), now_s, heard_s=now_s)
        if before is not None:
            worker.lost, worker.silent = before.lost, before.silent
        self.traffic.workers[link] = worker
        return [self._say_hello(link, worker)]

    def _hello(self, worker: Worker, bulk: bool = False, goes_on: bool = False) -> m.Hello:
        """`goes_on`: whether sessions of ours go on there."""
        role = "broker-bulk" if bulk else "broker"
        return m.Hello(PROTOCOL_VERSION, role, self.token, worker.epoch, int(goes_on), self.software)

    def _say_hello(self, link: Link, worker: Worker) -> ToWorker:
        """HELLO under the worker's new epoch."""
        hello = self._hello(worker, goes_on=any(e.holders or e.ended for _, e in self.traffic.devices.of(link)))
        return ToWorker(link, False, Message(Command.HELLO, hello, epoch=worker.epoch))

    def _epoch(self) -> int:
        self.next_epoch += 1
        return self.next_epoch & 0xFFFFFFFF

    def hello(self, event: FromWorker, h: m.Hello) -> list[Instruction]:
        """A worker's HELLO: its own when it dials in, else the answer to ours."""
        worker, link = self.traffic.workers.get(event.link), event.link
        if not event.message.reply:
            return self._dialled_in(event, h, worker)
        if worker is None or worker.ready or event.message.epoch != worker.epoch:
            return []
        worker.heard_s = event.now_s
        if event.bulk:
            return self._register(link, worker, worker.hello, event.now_s) if worker.hello is not None else []
        if worker.hello is not None:
            return []
        worker.hello, worker.opened_s, worker.carried = h, event.now_s, -1
        return [ToWorker(link, True, Message(Command.HELLO, self._hello(worker, bulk=True), epoch=worker.epoch))]

    def _dialled_in(self, event: FromWorker, h: m.Hello, worker: Worker | None) -> list[Instruction]:
        """A worker's own HELLO: it gets its epoch here."""
        message, link, now_s, devices = event.message, event.link, event.now_s, self.traffic.devices
        out: list[Instruction] = []
        if not event.bulk:
            if worker is not None and h.session and (worker.instance, worker.dial) == (h.token, h.session):
                return []  # the same HELLO once more: somebody on the way replays it
            try:
                same_cluster(h, "worker", self.cluster)
                known = devices.known(h.token)
                devices.room_for(0 if known else len(h.devices))
            except (Overloaded, ForeignCluster) as e:
                return [ToWorker(link, False, message.refusal(e)), CloseLink(link)]
            for before in {e.link for e in known if e.link != link}:
                out += self.closed(before, "it dialled in again")
            out += self._fail_all(link, "it dialled in again")
            worker = Worker(self._epoch(), now_s, heard_s=now_s, hello=h, instance=h.token,
                            dial=h.session, key=event.key)  # fmt: skip
            self.traffic.workers[link] = worker
        elif worker is None:
            return []
        goes_on = any(e.holders or e.ended for e in devices.known(h.token))
        out.append(ToWorker(link, event.bulk, message.answer(self._hello(worker, event.bulk, goes_on))))
        if event.bulk and worker.hello is not None:  # both channels are there: now it can be given work
            out += self._register(link, worker, worker.hello, now_s)
        return out

    def _register(self, link: Link, worker: Worker, h: m.Hello, now_s: float) -> list[Instruction]:
        """A worker is ready. What ended while it was away is ended there now."""
        worker.ready, worker.silent, worker.lost, worker.hello, worker.instance = True, "", "", None, h.token
        worker.pinged_s, worker.heard_s = 0.0, now_s
        self.traffic.devices.register(link, h)
        self._note(link, "is ready", worker)
        out: list[Instruction] = []
        for index, entry in self.traffic.devices.of(link):
            ended, entry.ended = entry.ended, set()
            for session in sorted(ended):
                drain = m.Drain(session)
                request = Message(Command.DRAIN, drain)
                pending = Drained(b"", request, index, now_s + self.traffic.deadline_s, session)
                out.append(self.traffic.forward(pending, drain))
        return out

    # -- silence and loss ----------------------------------------------------------------------------------------------

    def unreached(self, event: Unreached) -> None:
        """Why a worker that is dialled does not answer."""
        worker = self.traffic.workers.get(event.link)
        if worker is not None and not worker.ready and not worker.silent:
            worker.lost = event.reason

    def ended(self, name: str, reason: str) -> list[Instruction]:
        """A process that was started here is no more."""
        devices = self.traffic.devices.entries.values()
        links = {e.link for e in devices if e.info.worker == name and not e.lost}
        return [i for link in links for i in self.closed(link, reason)]

    def closed(self, link: Link, reason: str) -> list[Instruction]:
        """A connection is closed. A worker that listens is dialled again, one that dialled in may come back by itself."""
        worker = self.traffic.workers.get(link)
        if worker is None:
            return []
        was_there = worker.ready or worker.silent
        worker.ready, worker.silent, worker.lost = False, "", reason
        if was_there:
            self._note(link, f"was lost: {reason}", worker)
        out = self._fail_all(link, reason)
        for index, entry in self.traffic.devices.of(link):
            entry.lost = reason
            self.traffic.devices.forget(index)
        if link.startswith("tcp://"):
            return [*out, Redial(link)]
        del self.traffic.workers[link]
        return [*out, CloseLink(link)]

    def stuck(self, link: Link) -> list[Instruction]:
        """A silent worker is said HELLO to over a new connection."""
        worker = self.traffic.workers.get(link)
        return [Redial(link)] if worker is not None and worker.silent else []

    def _fall_silent(self, link: Link, worker: Worker, now_s: float) -> list[Instruction]:
        """Nothing of this epoch counts any more; when the worker answers again it is under the next one."""
        worker.silent, worker.ready = f"no answer to PING for {now_s - worker.pinged_s:.1f} s", False
        self._note(link, f"is silent: {worker.silent}", worker)
        out = self._fail_all(link, worker.silent)
        worker.epoch = self._epoch()
        worker.seq = worker.bulk_seq = 0
        return [*out, self._say_hello(link, worker)]

    def _fail_all(self, link: Link, reason: str) -> list[Instruction]:
        """Answer every request that waits for a worker; links of its devices are no more."""
        indices = {i for i, _ in self.traffic.devices.of(link)}
        for client in self.traffic.clients.values():
            client.linked -= {pair for pair in client.linked if indices.intersection(pair)}
        out: list[Instruction] = []
        for key in [k for k in self.traffic.pending if k[0] == link]:
            pending = self.traffic.pending.pop(key)
            out += self.fail(pending, self.traffic.lost(pending.device, reason))
        return out

    def _note(self, link: Link, what: str, worker: Worker) -> None:
        """One line, with what an operator looks for in the lines of other processes."""
        self.changed = True
        entries = [e for _, e in self.traffic.devices.of(link)]
        devices = ", ".join(f"{e.info.worker} {e.info.name}" for e in entries)
        sessions = sorted({session for e in entries for session in e.holders})
        facts = [link] if link.startswith("tcp://") else []
        facts.append(f"epoch {worker.epoch}")
        if not worker.ready:
            facts.append(f"after {max(0.0, self.traffic.now_s - worker.opened_s):.1f} s")
        if sessions:
            facts.append(f"sessions {', '.join(map(str, sessions[:MAX_NAMED]))}" + ", ..." * (len(sessions) > MAX_NAMED))
        self.notes.append(f"worker {devices} {what} ({'; '.join(facts)})")

    def carried(self, event: LinkCarried) -> None:
        """Bytes on their way to a worker, or from it, may have the PING or its answer behind them: as long as they come, it
        is the link that takes time. A process that hangs sends none, and its host soon takes none more. Before the HELLO of
        its bulk channel lies what it was sent under the epoch before."""
        worker = self.traffic.workers.get(event.link)
        if worker is None or not worker.awaited:
            return
        worker.network_s = min(max(0.0, event.network_s - limits.NETWORK_S), limits.NETWORK_MOST_S)
        if worker.carried >= 0 and event.n_bytes - worker.carried < limits.MOVED_BYTES:
            return
        if worker.carried >= 0 and worker.hello is not None:
            worker.opened_s = event.now_s
        elif worker.carried >= 0:
            worker.pinged_s = event.now_s
        worker.carried = event.n_bytes

    # -- time ----------------------------------------------------------------------------------------------------------

    def tick(self, now_s: float) -> list[Instruction]:
        """PINGs, and what became of those that were not answered."""
        out: list[Instruction] = []
        for link, worker in list(self.traffic.workers.items()):
            is_expected = not worker.ready and (not worker.silent or worker.hello is not None)
            if is_expected and now_s - worker.opened_s > limits.RECONNECT_S:
                out += self.closed(link, worker.lost or NO_HELLO)
            if is_expected:
                continue
            if worker.ready and worker.late(now_s):
                out += self._fall_silent(link, worker, now_s)
            interval_s = limits.PING_INTERVAL_S if worker.ready else limits.PROBE_S
            if now_s - max(worker.heard_s, worker.asked_s) >= interval_s:
                out.append(self._ping(link, worker, now_s))
        return out

    def _ping(self, link: Link, worker: Worker, now_s: float) -> ToWorker:
        """Sent while others are unanswered too: where a connection is closed, that is when it shows."""
        if not worker.pinged_s:
            worker.pinged_s, worker.carried = now_s, -1
        worker.asked_s = now_s
        worker.seq += 1
        return ToWorker(link, False, Message(Command.PING, m.Ping(worker.seq), (), False, 0, worker.epoch, worker.seq))
