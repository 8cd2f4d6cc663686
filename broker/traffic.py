"""Requests on their way to workers: who is there, what is under way, and under which number. Pure."""

from __future__ import annotations

from broker.devices import DeviceEntry, Devices, State
from broker.events import Link, ToClient, ToWorker
from broker.records import Client, Pending, PendingKey, Worker
from protocol import messages as m
from protocol.errors import GgmqError, WorkerLost
from protocol.frames import Frame, Message
from protocol.messages import BULK, COMMAND_OF, Command


class Traffic:
    """Attributes:
    clients, workers: by routing id, and by connection.
    pending: requests under way, by where they went.
    deadline_s: within this time a worker answers.
    now_s: time of the last Tick.
    """

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self.clients: dict[bytes, Client] = {}
        self.workers: dict[Link, Worker] = {}
        self.devices = Devices()
        self.pending: dict[PendingKey, Pending] = {}
        self.now_s = 0.0
        self.n_refused = 0

    def states(self) -> dict[Link, State]:
        """What the workers that are there do: ready or silent."""
        return {link: "silent" if w.silent else "ready" for link, w in self.workers.items() if w.ready or w.silent}

    def device(self, device: int) -> tuple[DeviceEntry, Worker]:
        """A device and its worker. Errors: HandleError, WorkerLost."""
        entry = self.devices[device]
        worker = self.workers.get(entry.link)
        if entry.lost or worker is None or not worker.ready:
            silent = worker.silent or worker.lost if worker is not None else ""
            raise self.lost(device, entry.lost or silent or "it is not connected yet")
        return entry, worker

    def lost(self, device: int, reason: str) -> WorkerLost:
        """The same words for a request that was under way and for one that comes after."""
        return WorkerLost(reason).at(*self.devices.names(device))

    def forward(self, pending: Pending, header: m.Header, payload: list[Frame] | tuple[Frame, ...] = ()) -> ToWorker:
        """Send a request to the worker of its device. Errors: HandleError, WorkerLost."""
        entry, worker = self.device(pending.device)
        command = COMMAND_OF[type(header)]
        bulk = command in BULK
        if bulk:
            worker.bulk_seq += 1
        else:
            worker.seq += 1
        seq = worker.bulk_seq if bulk else worker.seq
        session = getattr(header, "session", 0)
        if session and command != Command.DRAIN:
            entry.holders.add(session)
        self.pending[(entry.link, bulk, seq)] = pending
        return ToWorker(entry.link, bulk, Message(command, header, tuple(payload), False, entry.local, worker.epoch, seq))

    def cancel(self, key: PendingKey) -> ToWorker:
        """Tell a worker that a request of its control channel is of no more use. Its reply ends the request as any does."""
        link, _, seq = key
        pending, worker = self.pending[key], self.workers[link]
        worker.seq += 1
        header = m.Cancel(getattr(pending.request.header, "session", 0), seq)
        entry = self.devices.entries.get(pending.device)
        local = entry.local if entry is not None else 0
        return ToWorker(link, False, Message(Command.CANCEL, header, (), False, local, worker.epoch, worker.seq))

    def refuse(self, rid: bytes, request: Message, error: GgmqError) -> ToClient:
        self.n_refused += 1
        return ToClient(rid, request.refusal(error))
