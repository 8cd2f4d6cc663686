"""The load in its short form. The long form is `python -m tests.load`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.load.run import load


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # clients that go leave sockets behind
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="what processes hold is read from /proc")
def test_a_server_holds_under_clients_of_all_manners() -> None:
    seen, table = load(25.0, int(os.environ.get("GGMQ_LOAD_SEED", "1")))
    print(table)
    assert not seen.failures, "\n".join([*seen.failures[:20], table])
    assert seen.n_equal >= 20 and len({manner for manner, _ in seen.statuses}) >= 8, table
