"""Caches on disks that are full, lie, or are written by two at once: no wrong byte, and the load goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from tests.faults.ground import GGMQ, Ground
from tests.faults.playing import one_text, play
from tests.faults.report import Run, Skipped
from tests.faults.setups import Live, Setup, living, made
from tests.support.fixtures import ROOT

SMALL_MIB = 2
N_DAMAGED = 5
"""Entries that are damaged at once."""


def _setup(run: Run) -> Setup:
    return Setup("bus", n_workers=2, listens=run.rng.random() < 0.5, cache="cold")


def verified(live: Live, run: Run) -> int:
    """Look at every entry as `ggmq cache verify` does. Returns: how many are good."""
    command = [*GGMQ, "cache", "verify", "--cache-dir", str(live.cache_folder)]
    done = subprocess.run(command, cwd=ROOT, env=live.env, capture_output=True, text=True, timeout=120)
    found = re.search(r"(\d+) entries are good, (\d+) were damaged", done.stdout)
    if found is None:
        run.fail(f"ggmq cache verify: {done.stdout} {done.stderr}")
        return 0
    if int(found[2]):
        run.fail(f"{found[2]} entries of the cache are damaged")
    return int(found[1])


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """A file system of SMALL_MIB at a folder. Errors: Skipped where none can be mounted."""
    if sys.platform != "linux" or os.geteuid():
        raise Skipped("a small disk needs Linux and root")
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_MIB}m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Skipped(f"a small disk: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full(ground: Ground, run: Run) -> None:
    """Not half of the weights have room: the first load and the next."""
    folder = ground.folder / f"disk-{run.seed}"
    with _small_disk(folder), living(ground, dataclasses.replace(_setup(run), cache=str(folder))) as live:
        for when in ("the load that fills the disk", "the next"):
            one_text(live, run, when)
        if not any("No space left" in w.err.text() for w in live.workers.values()):
            run.fail("no worker says that the disk is full")
        run.figures["entries that had room"] = verified(live, run)


def _flip(path: Path, rng: Random) -> None:
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(raw))


def _cut(path: Path, rng: Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def _link(path: Path, rng: Random) -> None:
    """To a file that has the same bytes, or others."""
    other = path.with_name("other-" + path.name)
    path.rename(other)
    if rng.random() < 0.5:
        _flip(other, rng)
    path.symlink_to(other)


DAMAGES: dict[str, Callable[[Path, Random], None]] = {"bit flip": _flip, "cut": _cut, "symbolic link": _link}


def damaged(ground: Ground, run: Run) -> None:
    """Some entries are not what their names say: they are sent again."""
    kind = run.rng.choice(sorted(DAMAGES))
    run.did(kind)
    with living(ground, _setup(run)) as live:
        one_text(live, run, "the load that fills the cache")
        entries = sorted(p for p in live.cache_folder.iterdir() if len(p.name) == 64 and p.stat().st_size)
        if not entries:
            run.fail("nothing was kept")
            return
        for path in run.rng.sample(entries, min(N_DAMAGED, len(entries))):
            DAMAGES[kind](path, run.rng)
        one_text(live, run, f"after {kind}")
        verified(live, run)
        one_text(live, run, "the load after that")


def two_writers(ground: Ground, run: Run) -> None:
    """Two buses whose workers have one folder load the model at once."""
    folder = ground.folder / f"shared-{run.seed}"
    setup = dataclasses.replace(_setup(run), cache=str(folder))
    with living(ground, setup) as one, living(ground, setup) as other:
        prompts = ground.prompts(1, False)
        streams = [live.begin(prompts)[0] for live in (one, other)]
        for live, stream in zip((one, other), streams, strict=True):
            problems = live.wait([stream])
            if problems or made(stream) != ground.text(prompts[0], live.n_tokens):
                run.complete, run.identical = not problems, bool(problems)
                run.fail(f"{problems or 'another text'}")
        if not verified(one, run):
            run.fail("nothing was kept")
        one_text(one, run, "the next load")


def killed_writer(ground: Ground, run: Run) -> None:
    """A worker is killed while it writes, and started again: whatever lies there, the next load is right."""
    setup = _setup(run)
    victim = f"w{run.rng.randrange(2)}"
    run.did(f"killed {victim}")

    def again(live: Live) -> None:
        verified(live, run)
        live.workers[victim].end()
        live.start_worker(victim)
        live.await_ready(live.names)
        one_text(live, run, "the next load")
        verified(live, run)

    play(ground, run, setup, "cache write", lambda live: live.signal(victim, signal.SIGKILL), check=again)
