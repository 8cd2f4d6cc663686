"""Kernels come to be: seen on a terminal, in the way of nobody, gone on with when they were interrupted, once for all."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import time
from pathlib import Path

from tests.support.fixtures import ROOT, free_port
from tests.support.processes import GGMQ, WORKER, await_devices, started
from workers.kernels.layout import UNITS

RUN = [*GGMQ, "run", "-p", "Once upon a time", "--temp", "0", "-n", "12"]
STORY = b"Once upon a time, there was a little girl named Lily."


def fresh(folder: Path) -> dict[str, str]:
    """The environment of a machine that has compiled nothing yet."""
    env = {k: v for k, v in os.environ.items() if k != "LLAMA_CACHE"}
    return {**env, "XDG_CACHE_HOME": str(folder)}


def units(folder: Path) -> set[str]:
    return {p.stem for p in folder.glob("ggmq-kernels/*/*.json")}


def test_describing_devices_and_plans_compile_nothing(tmp_path: Path) -> None:
    cluster = tmp_path / "c.yaml"
    cluster.write_text("name: fresh\nworkers: [{name: one, devices: [CPU]}]\n")
    for command in ([*WORKER, "--device"], [*GGMQ, "plan", str(cluster)], [*GGMQ, "info"], [*GGMQ, "run", "--help"]):
        done = subprocess.run(command, cwd=ROOT, env=fresh(tmp_path), capture_output=True, timeout=60, check=True)
        assert b"compiling" not in done.stderr
    assert not (tmp_path / "ggmq-kernels").exists()


def test_progress_is_shown_what_was_interrupted_goes_on_and_a_worker_answers_meanwhile(tmp_path: Path) -> None:
    main, terminal = pty.openpty()
    with started(RUN, env=fresh(tmp_path), stderr=terminal, stdout=subprocess.DEVNULL) as p:
        seen, due = b"", time.monotonic() + 120
        while not re.search(rb"compiling kernels for this CPU, once: [1-9]\d* of %d" % len(UNITS), seen):
            assert time.monotonic() < due and p.poll() is None, seen
            if select.select([main], [], [], 1)[0]:
                seen += os.read(main, 1 << 12)
        p.send_signal(signal.SIGINT)
        p.wait(30)
    os.close(terminal)
    os.close(main)
    kept = units(tmp_path)
    assert kept and kept != set(UNITS)

    port = free_port()
    command = [*WORKER, "-p", str(port), "-t", "1", "-d", "CPU", "--insecure"]
    with started(command, env=fresh(tmp_path), stderr=subprocess.PIPE) as worker:
        endpoint = f"tcp://127.0.0.1:{free_port()}"
        with started([*GGMQ, "broker", "--listen", endpoint, "--rpc", f"127.0.0.1:{port}", "--insecure"]):
            await_devices(endpoint, 1)
            assert units(tmp_path) != set(UNITS), "the worker is known before its kernels are there"
            done = subprocess.run([*RUN, "--broker", endpoint, "--insecure"], cwd=ROOT, capture_output=True, timeout=200,
                                  check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(STORY) and units(tmp_path) == set(UNITS) > kept
        worker.terminate()
        said = worker.communicate(timeout=30)[1]
        assert said.count(b"compiling kernels for this CPU, once") == 2 and b"done in" in said, said
    again = subprocess.run(RUN, cwd=ROOT, env=fresh(tmp_path), capture_output=True, timeout=60, check=True)
    assert b"compiling" not in again.stderr and again.stdout.startswith(STORY)
