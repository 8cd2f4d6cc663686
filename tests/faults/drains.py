"""Workers that are drained while texts are made, and what is killed meanwhile."""

from __future__ import annotations

import signal
import subprocess

from tests.faults.ground import GGMQ, READY_S, Ground
from tests.faults.playing import play
from tests.faults.report import Run
from tests.faults.resume import any_setup
from tests.faults.setups import Live, Setup
from tests.support.fixtures import ROOT


def drained(ground: Ground, run: Run) -> None:
    """`ggmq drain` in the middle of texts; then the worker is ended. Sometimes a worker is killed while it lasts."""
    setup = any_setup(run, Setup("bus", True, n_seqs=run.rng.choice((1, 8)), listens=run.rng.random() < 0.5))
    leaving, other = run.rng.sample([f"w{i}" for i in range(setup.n_workers)], 2)
    killed = run.rng.choice(("", "", leaving, other)) if setup.spare or setup.n_workers > 2 else ""
    late_s = run.rng.random() * 0.5
    run.did(f"drained {leaving}" + (f", killed {killed}" if killed else ""))

    def fault(live: Live) -> None:
        command = [*GGMQ, "drain", leaving, "--broker", live.endpoint, "--insecure"]
        with subprocess.Popen(command, cwd=ROOT, env=live.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                              text=True) as p:  # fmt: skip
            if killed:
                try:
                    p.wait(late_s)
                except subprocess.TimeoutExpired:
                    pass
                live.signal(killed, signal.SIGKILL)
            _, err = p.communicate(timeout=READY_S)
        if p.returncode and killed != leaving:  # one that has died can no longer be drained
            run.fail(f"ggmq drain ended with code {p.returncode}: {err[-300:]}")
        live.workers[leaving].end()

    play(ground, run, setup, "decode", fault)
