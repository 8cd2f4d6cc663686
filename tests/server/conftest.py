"""One server for all tests of this folder that want nothing special of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.serving import Running, serving


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    """The bundled model with four slots, greedy where nothing is said."""
    with serving("--temp", "0", "-np", "4") as running:
        yield running
