"""The soak in its short form: enough to see that it holds at all. The long form is `python -m tests.soak`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.soak.report import Report
from tests.soak.run import Amounts, Part, parts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="what processes hold is read from /proc"),
]
AMOUNTS = Amounts(sessions=24, lives=24, pauses=4, broker_kills=2, strangers=400, clients=2, longest_pause_s=3.0)
LIMIT_S = 240.0


@pytest.fixture(scope="module")
def report() -> Report:
    return Report(int(os.environ.get("GGMQ_SOAK_SEED", "1")), LIMIT_S)


@pytest.fixture(scope="module")
def soak(report: Report) -> Iterator[dict[str, Part]]:
    """All parts on one ground; nothing may lie about when it is closed."""
    with parts(report, AMOUNTS) as there:
        yield there
    print(report.table())
    assert not [f for f in report.failures if f.startswith("ground ")], report.failures


@pytest.mark.parametrize("part", ["sessions", "lives", "pauses", "broker kills", "strangers"])
def test_it_holds(part: str, soak: dict[str, Part], report: Report) -> None:
    before = len(report.failures)
    soak[part]()
    assert not report.failures[before:], "\n".join([*report.failures[before:], report.table()])
    assert report.whole(part), f"{part} was not over when the time was\n{report.table()}"
