"""What a worker does now and next: whose request is done, and which others are done between the parts of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from protocol import messages as m
from protocol.errors import Cancelled
from protocol.frames import Message
from workers.devices.base import Plan
from workers.executor import Executor
from workers.state import WorkerState
from workers.turns import FLOOD_SHARE, Place, Turns, Waiting
from workers.work import Key

BRIEF_S, LOOK_S = 0.005, 0.0005
"""A compute that takes no longer than the first may be done between parts of any other; one that takes longer waits until
the other has run for as long. While a compute runs it is looked so often whether there is one."""

Running = tuple[bytes, int, int]
"""A request under way: routing id, session and seq."""


@dataclass(slots=True)
class Turn:
    """A session's.

    Attributes:
        begun_s, looked_s: when it began, and when others were last thought of.
        lent_s: for how long others had the device meanwhile.
    """

    key: Key
    place: Place
    begun_s: float
    looked_s: float = 0.0
    lent_s: float = 0.0


@dataclass(slots=True)
class Interrupted:
    """A compute between whose parts another one is done. Attributes: cancelled: it is to end when it goes on."""

    running: Running
    cancelled: bool = False


class Course:
    """Attributes:
    running: what the device does now.
    Threads: the worker's.
    """

    def __init__(
        self, queue: Waiting, state: WorkerState, executor: Executor, receive: Callable[[int], None],
        carry_out: Callable[[bytes, Message], None],
    ) -> None:  # fmt: skip
        """receive: takes in what has come, waiting for so many milliseconds at most. carry_out: does a request."""
        self._queue, self._state, self._executor, self._receive, self._carry_out = queue, state, executor, receive, carry_out
        self._turns = Turns()
        self.running: Running | None = None
        self._turn: Turn | None = None
        self._interrupted: Interrupted | None = None

    def step(self, after: Callable[[], None]) -> None:
        """Do what comes next, and then `after`; where it is better to wait for somebody, take in what comes. Sessions take
        turns, and within a session nothing overtakes anything."""
        start = time.monotonic()
        waiting = self._waiting()
        chosen = self._turns.choose(waiting, start) if waiting else None
        if waiting and chosen is None:
            self._receive(1)
            return
        place = waiting[chosen] if chosen is not None else None
        rid, message = self._queue.take(place)
        turn = self._turn = Turn(chosen, place, start) if chosen is not None and place is not None else None
        others = chosen is not None and self._turns.others(chosen, start)
        self._executor.device.share(self._between if len(self._state.sessions) > 1 else None, others)
        self._carry_out(rid, message)
        done = time.monotonic()
        after()
        if turn is not None:  # to have taken in what one sends costs time too
            goes_on = isinstance(message.header, (m.StageCompute, m.GraphPut))
            self._turns.ran(turn.key, self._had_s(turn), done, goes_on)
            self._turn = None

    def keep(self) -> None:
        """Forget sessions that have ended."""
        self._turns.keep(self._state.sessions)

    def cancel(self, running: Running) -> None:
        """A request is no longer wanted, if it runs. Errors: Cancelled when it is the one that runs now."""
        if self._interrupted is not None and self._interrupted.running == running:
            self._interrupted.cancelled = True
        if self.running == running:
            raise Cancelled("STAGE_COMPUTE was cancelled")

    def _waiting(self) -> dict[Key, Place]:
        """Whose requests could be done now, in the order in which these came, and where each one's first is."""
        waiting: dict[Key, Place] = {}
        for place in self._queue.firsts():
            waiting.setdefault((self._state.routes.get(place[0], b""), place[1]), place)
        return waiting

    def _had_s(self, turn: Turn) -> float:
        """What a turn has cost so far, as it counts for the next ones."""
        took_s = time.monotonic() - turn.begun_s - turn.lent_s
        return took_s / (FLOOD_SHARE if self._queue.flood(turn.place) else 1.0)

    def _between(self) -> None:
        """Between two parts of a compute: who has had less of the time, and needs little, does not wait for the rest of it.

        Errors: Cancelled when the compute is no longer wanted.
        """
        turn, now = self._turn, time.monotonic()
        if turn is None or self.running is None or self._interrupted is not None or now - turn.looked_s < LOOK_S:
            return
        turn.looked_s = now
        self._receive(0)
        ran_s = now - turn.begun_s
        plans = {key: (place, plan) for key, place in self._waiting().items() if (plan := self._aside(key, place, ran_s))}
        chosen = self._turns.overtakes(plans, turn.key, self._had_s(turn))
        if chosen is None:
            return
        place, plan = plans[chosen]
        interrupted = self._interrupted = Interrupted(self.running)
        try:
            with self._executor.device.aside(plan):
                self._carry_out(*self._queue.take(place))
        finally:
            self._interrupted = None
            took_s = time.monotonic() - now
            turn.lent_s += took_s
            self._turns.ran(chosen, took_s, now + took_s)
        if interrupted.cancelled:
            raise Cancelled("STAGE_COMPUTE was cancelled")

    def _aside(self, key: Key, place: Place, ran_s: float) -> Plan | None:
        """The plan of the first request there, if it may be done between parts of a compute that has run for so long."""
        header = self._queue.first(place).header
        if not isinstance(header, m.StageCompute) or self._executor.traces:
            return None
        return self._executor.aside(key, header, max(ran_s, BRIEF_S))
