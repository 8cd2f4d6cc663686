"""Signals that end a command."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.support.fixtures import ROOT

PROGRAM = """
import signal, time
from config.interrupts import raise_interrupts

class Released:
    def __del__(self):
        signal.raise_signal({signum})

raise_interrupts()
try:
    {where}
    time.sleep(20)
    print("slept")
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["signal.raise_signal({signum})", "Released()"])
def test_a_signal_is_raised_wherever_it_arrives(signum: signal.Signals, where: str) -> None:
    program = PROGRAM.replace("{where}", where).replace("{signum}", str(int(signum)))
    p = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=30, check=False)
    assert (p.stdout, p.stderr) == ("interrupted\n", "")


def test_what_else_is_dropped_is_told_as_before() -> None:
    program = PROGRAM.replace("signal.raise_signal({signum})", "raise ValueError('seen')").replace("{where}", "Released()")
    program = program.replace("time.sleep(20)", "")
    p = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=30, check=False)
    assert p.stdout == "slept\n" and "ValueError: seen" in p.stderr
