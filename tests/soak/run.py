"""The parts of the soak, one after the other on one ground."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import zmq

from tests.soak.faults import run_broker_kills, run_pauses
from tests.soak.ground import Ground, check_text
from tests.soak.lives import run_lives
from tests.soak.report import Report, Step
from tests.soak.resources import Resources
from tests.soak.sessions import run_sessions
from tests.soak.strangers import run_strangers

N_SPARE = 2


@dataclass(frozen=True, slots=True)
class Amounts:
    """How much of each part; 0 leaves it out. Units: `longest_pause_s` seconds."""

    sessions: int = 0
    lives: int = 0
    pauses: int = 0
    broker_kills: int = 0
    strangers: int = 0
    longest_pause_s: float = 30.0


@contextlib.contextmanager
def standing(report: Report) -> Iterator[tuple[Ground, Resources]]:
    """A ground on which all workers have served, watched; all ends with the block, and what is left over is a failure."""
    ground = Ground(N_SPARE)
    resources = Resources(report, ground)
    step = Step(report, "ground", "begin")
    try:
        ground.start()
        # each alone, then with each other: from now on no worker has another one to connect to, or a kernel to load
        for names in [*([w] for w in ground.workers), *map(list, itertools.permutations(ground.workers, 2))]:
            check_text(ground, step, names)
        resources.start()
        yield ground, resources
    finally:
        resources.stop()
        for left in ground.close():
            Step(report, "ground", "end").fail(left)
        zmq.Context.instance().destroy(linger=0)


def soak(report: Report, amounts: Amounts) -> None:
    """All parts that are asked for. Failures are in the report."""
    a = amounts
    with standing(report) as (ground, resources):
        for name, n in (("sessions", a.sessions), ("lives", a.lives), ("pauses", a.pauses),
                        ("broker kills", a.broker_kills), ("strangers", a.strangers)):  # fmt: skip
            if not n:
                continue
            match name:
                case "sessions":
                    run_sessions(ground, report, n)
                case "lives":
                    run_lives(ground, report, n)
                case "pauses":
                    run_pauses(ground, report, n, a.longest_pause_s, resources)
                case "broker kills":
                    run_broker_kills(ground, report, n, resources)
                case "strangers":
                    run_strangers(ground, report, n)
            resources.check(name)
