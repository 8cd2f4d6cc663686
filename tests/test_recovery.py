"""The fault runner in its short form: a few runs of each kind. The long form is `python -m tests.faults`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.ground import Ground, Sizes
from tests.faults.scenarios import play

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("kernels")]
RUNS = [("resume-run", 3), ("resume-run", 8), ("resume-bus", 4), ("resume-serve", 3), ("stop", 3), ("broker", 7),
        ("partition-hole", 3), ("partition-link", 1), ("wire", 1), ("cache-full", 1), ("drain", 2),
        ("fuzz-worker", 1), ("fuzz-broker", 1)]  # fmt: skip
"""Scenarios and seeds."""


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    ground = Ground(Sizes(n_tokens=200, longest_stop_s=0.5), quick=True)
    yield ground
    ground.close()


@pytest.mark.parametrize(("scenario", "seed"), RUNS)
def test_texts_go_on_the_same(scenario: str, seed: int, ground: Ground) -> None:
    run = play(ground, scenario, seed)
    if run.skipped:
        pytest.skip(run.skipped)
    assert not run.failures, run.line()
