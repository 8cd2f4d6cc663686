"""The parts of the soak, one after the other on one ground."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import zmq

from tests.soak.faults import run_broker_kills, run_pauses
from tests.soak.ground import Ground
from tests.soak.lives import run_lives
from tests.soak.report import Report, Step
from tests.soak.resources import Resources
from tests.soak.sessions import run_sessions
from tests.soak.strangers import run_strangers

N_SPARE = 2


@dataclass(frozen=True, slots=True)
class Amounts:
    """How much of each part; 0 leaves it out. `clients`: so many are served in turn among the strangers, and as many
    when they have gone. Units: `longest_pause_s` seconds."""

    sessions: int = 0
    lives: int = 0
    pauses: int = 0
    broker_kills: int = 0
    strangers: int = 0
    clients: int = 10
    longest_pause_s: float = 30.0


Part = Callable[[], None]


@contextlib.contextmanager
def parts(report: Report, amounts: Amounts) -> Iterator[dict[str, Part]]:
    """What can be run, by name, on one ground on which all workers have served; each ends with a look at what is held.

    All processes end with the block, and what they leave behind is a failure. Failures are in the report.
    Errors: RuntimeError when a process cannot be started.
    """
    a = amounts
    ground = Ground(N_SPARE)
    resources = Resources(report, ground)
    work: dict[str, Part] = {
        "sessions": lambda: run_sessions(ground, report, a.sessions),
        "lives": lambda: run_lives(ground, report, a.lives),
        "pauses": lambda: run_pauses(ground, report, a.pauses, a.longest_pause_s, resources),
        "broker kills": lambda: run_broker_kills(ground, report, a.broker_kills, resources),
        "strangers": lambda: run_strangers(ground, report, a.strangers, a.clients),
    }

    def watched(name: str) -> None:
        work[name]()
        resources.check(name)

    try:
        ground.start()
        ground.warm(Step(report, "ground", "begin"))
        resources.start()
        yield {name: functools.partial(watched, name) for name in work}
    finally:
        resources.stop()
        for left in ground.close():
            Step(report, "ground", "end").fail(left)
        zmq.Context.instance().destroy(linger=0)


def soak(report: Report, amounts: Amounts) -> None:
    """All parts of which there is to be any."""
    wanted = {"sessions": amounts.sessions, "lives": amounts.lives, "pauses": amounts.pauses,
              "broker kills": amounts.broker_kills, "strangers": amounts.strangers}  # fmt: skip
    with parts(report, amounts) as there:
        for name, n in wanted.items():
            if n:
                there[name]()
