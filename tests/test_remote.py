"""The ssh launcher with a stand-in for `ssh` that runs on this host what it would run on another: with a home folder of its
own, and no variable of ours. tests/test_ssh.py goes through a real sshd where there is one."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from config.keys import read_keys
from tests.support.fixtures import ROOT
from tests.support.processes import until
from tests.test_cli import ggmq

STAND_IN = """#!/bin/sh
# Stands in for ssh. What comes after `-- HOST` runs here, as on a host of its own: when this process is killed, the shell
# there learns it by its next word.
while [ "$#" -gt 0 ] && [ "$1" != -- ]; do case "$1" in -o) shift ;; -*) ;; *) break ;; esac; shift; done
[ "$1" = -- ] && shift
shift
code=$(mktemp)
{{ (cd {home} && exec env -i HOME={home} PATH={bin}:/usr/bin:/bin sh -c 'echo $$ >>{log}; exec sh -c "$1"' far "$*")
  echo $? >$code
}} 2>&1 | cat
ended=$(cat $code)
rm -f $code
exit $ended
"""
STAND_IN_SCP = """#!/bin/sh
# Stands in for scp -p FILE HOST:PATH.
[ "$1" = -p ] && cp -p "$2" {home}/"${{3#*:}}"
"""
CLUSTER = """
name: {name}
broker: {{listen: "tcp://127.0.0.1:0", advertise: "tcp://127.0.0.1:0"}}
security: {{keys: {keys}}}
workers:
  - {{name: here, devices: [reference]}}
  - {{name: there, launcher: ssh, host: me@far, devices: [reference], keys: ~/.config/ggmq/cluster.key{command}}}
"""


class Far:
    """Another host, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.home, self.bin, self.log = folder / "far home", folder / "far-bin", folder / "ssh.log"
        self.here = folder / "here-bin"
        for made in (self.home, self.bin, self.here):
            made.mkdir()
        words = {"log": self.log, "home": shlex.quote(str(self.home)), "bin": self.bin}
        self.program(self.here / "ssh", STAND_IN.format(**words))
        self.program(self.here / "scp", STAND_IN_SCP.format(**words))

    def program(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def install_worker(self, path: Path) -> None:
        """A worker as a virtual environment has it; compiled kernels are this host's, since they take a minute to make."""
        kernels = os.environ.get("LLAMA_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.program(path, f"#!/bin/sh\nexport PYTHONPATH={ROOT} XDG_CACHE_HOME={kernels}\n"
                           f'exec {sys.executable} -P -m workers "$@"\n')  # fmt: skip

    def connections(self) -> list[int]:
        """Shells that were started there and are not gone."""
        pids = [int(line) for line in self.log.read_text().splitlines()]
        return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Far]:
    found = Far(tmp_path)
    monkeypatch.setenv("PATH", f"{found.here}{os.pathsep}{os.environ['PATH']}")
    yield found
    for log in Path("/tmp").glob("ggmq-far-*.log"):
        log.unlink()


def cluster(folder: Path, name: str, command: str = "") -> Path:
    path = folder / "c.yaml"
    keys = folder / "config" / "ggmq" / "cluster.key"
    named = f", command: {json.dumps(command)}" if command else ""
    path.write_text(CLUSTER.format(name=name, keys=keys, command=named))
    return path


def give_keys(far: Far) -> str:
    """`ggmq keys new`, and what it prints, pasted into a shell with a host's name."""
    said = ggmq("keys", "new")
    commands = [line.strip().replace("HOST", "me@far") for line in said.stdout.splitlines() if line.startswith("  ")]
    for command in commands:
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, (command, done.stderr)
    return said.stdout


def test_what_keys_new_prints_works_when_it_is_pasted(far: Far, tmp_path: Path) -> None:
    give_keys(far)
    there, here = far.home / ".config" / "ggmq" / "cluster.key", tmp_path / "config" / "ggmq" / "cluster.key"
    assert there.read_text() == here.read_text()
    assert stat.S_IMODE(there.stat().st_mode) == 0o600 and stat.S_IMODE(there.parent.stat().st_mode) == 0o700


def test_a_worker_of_a_virtual_environment_is_started_used_and_ended(far: Far, tmp_path: Path) -> None:
    give_keys(far)
    far.install_worker(far.home / "ggmq" / ".venv" / "bin" / "worker")
    path = cluster(tmp_path, "far-away", "~/ggmq/.venv/bin/worker")
    plan = ggmq("plan", path)
    assert "there reference" in plan.stdout, plan.stderr
    up = ggmq("up", path)
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        until(lambda: not far.connections())  # nothing of the start stays, but what it started
        assert "there/reference: running" in ggmq("status").stdout
        r = ggmq("run", "--cluster", path, "-p", "Once upon a time", "-n", "5", "--temp", "0")
        assert r.returncode == 0 and "output on there" in r.stderr, r.stderr
        pid = int(re.findall(r"started there/reference \(process (\d+)", up.stdout)[0])
        assert "GGMQ_CLUSTER_ID" in psutil.Process(pid).environ()
        psutil.Process(pid).kill()
        until(lambda: "there/reference: NOT RUNNING" in ggmq("status").stdout)
        again = ggmq("up", path)
        assert again.returncode == 0 and re.findall(r"started (\S+)", again.stdout) == ["there/reference"], again.stderr
    finally:
        down = ggmq("down", path)
    assert down.returncode == 0 and "ended there/reference" in down.stdout
    assert not subprocess.run(["pgrep", "-f", "far-awa[y]-"], capture_output=True).stdout
    until(lambda: not far.connections())


def test_a_host_without_a_key_is_given_one_of_its_own(far: Far, tmp_path: Path) -> None:
    assert ggmq("keys", "new").returncode == 0
    far.install_worker(far.bin / "worker")
    path, there = cluster(tmp_path, "far-keys"), far.home / ".config" / "ggmq" / "cluster.key"
    listed = tmp_path / "config" / "ggmq" / "cluster.allowed"
    try:
        up = ggmq("up", path)
        assert up.returncode == 0, up.stdout + up.stderr
        assert "gave me@far a worker's key of its own, far-keys-there, as ~/.config/ggmq/cluster.key" in up.stdout
        mine, given = read_keys(tmp_path / "config" / "ggmq" / "cluster.key"), read_keys(there)
        assert (given.role, given.name, given.cluster) == ("worker", "far-keys-there", mine.public)
        assert mine.secret.decode() not in there.read_text()
        assert stat.S_IMODE(there.stat().st_mode) == 0o600 and stat.S_IMODE(there.parent.stat().st_mode) == 0o700
        assert given.secret.decode() not in up.stdout + up.stderr + listed.read_text()
        r = ggmq("run", "--cluster", path, "-p", "Once upon a time", "-n", "5", "--temp", "0")
        assert r.returncode == 0 and "output on there" in r.stderr and "through" not in r.stderr, r.stderr
        assert ggmq("keys", "remove", "far-keys-there").returncode == 0
        log = tmp_path / "state" / "ggmq" / "logs" / "far-keys" / "broker.log"
        said = "worker there reference was lost: its key, far-keys-there, is not let in any more"
        until(lambda: said in log.read_text(), 3)
    finally:
        down = ggmq("down", path)
    assert down.returncode == 0 and read_keys(there) == given, "no other key takes its place"
    assert "far-keys-there" not in listed.read_text()


def test_a_key_that_cannot_be_put_there_is_not_let_in(far: Far, tmp_path: Path) -> None:
    assert ggmq("keys", "new").returncode == 0
    (far.home / ".config").write_text("a file")
    up = ggmq("up", cluster(tmp_path, "far-off"), timeout=60)
    assert up.returncode == 1 and re.search(r"me@far: ssh ended with code 1: .*\.config", up.stderr), up.stderr
    assert "far-off" not in (tmp_path / "config" / "ggmq" / "cluster.allowed").read_text()


@pytest.mark.parametrize(("command", "words"), [
    ("", r"ended with code 127 on me@far: .*worker.*No such file.*; the key `command` .* ~/ggmq/\.venv/bin/worker"),
    ("sh -c 'sleep 1; echo the far end has no luck; exit 3'", "ended with code 3 on me@far: the far end has no luck"),
    ("~/worker -p nonsense", r"ended with code 2 on me@far: .*nonsense"),
    ("sh -c 'kill -9 $$'", "ended with code 137 on me@far: it wrote nothing"),
], ids=["not on PATH", "later", "wrong option", "killed"])  # fmt: skip
def test_the_words_of_a_worker_that_ends_come_at_once(far: Far, tmp_path: Path, command: str, words: str) -> None:
    far.install_worker(far.home / "worker")
    assert ggmq("keys", "new").returncode == 0
    up = ggmq("up", cluster(tmp_path, "far-off", command), timeout=60)
    assert up.returncode == 1 and re.search(f"ggmq: there/reference ended before .*{words}", up.stderr), up.stderr
    assert "ended broker" in up.stdout and "no cluster is up" in ggmq("status").stdout
    until(lambda: not far.connections())


def test_a_broker_that_another_host_cannot_dial_is_named_before_anything_starts(far: Far, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("workers:\n  - {name: there, launcher: ssh, host: me@far}\n")
    up = ggmq("up", path)
    assert up.returncode == 2 and "worker there on me@far cannot dial a broker at 127.0.0.1" in up.stderr, up.stderr
    assert "broker.advertise" in up.stderr and "started" not in up.stdout and not far.log.exists()


def test_a_host_that_refuses_is_named_with_its_words(far: Far, tmp_path: Path) -> None:
    assert ggmq("keys", "new").returncode == 0
    far.program(far.here / "ssh", "#!/bin/sh\necho 'me@far: Permission denied (publickey).' >&2\nexit 255\n")
    path = cluster(tmp_path, "far-off")
    for what in ("plan", "up"):
        r = ggmq(what, path, timeout=60)
        assert r.returncode == 1 and "me@far: ssh ended with code 255: me@far: Permission denied" in r.stderr, r.stderr
    assert "no cluster is up" in ggmq("status").stdout


def test_plan_tells_how_to_name_the_command(far: Far, tmp_path: Path) -> None:
    assert ggmq("keys", "new").returncode == 0
    r = ggmq("plan", cluster(tmp_path, "far-off"), timeout=60)
    assert r.returncode == 1 and re.search(r"me@far: .* 127: .*worker.*not found; the key `command`", r.stderr), r.stderr


def test_a_host_that_does_not_answer_later_is_not_called_dead(far: Far, tmp_path: Path) -> None:
    give_keys(far)
    far.install_worker(far.bin / "worker")
    path = cluster(tmp_path, "far-gone")
    assert ggmq("up", path).returncode == 0
    before = (far.here / "ssh").read_text()
    try:
        far.program(far.here / "ssh", "#!/bin/sh\necho 'no route to host' >&2\nexit 255\n")
        status = ggmq("status", path)
        assert status.returncode == 1 and re.search("there/reference: not known: .*no route to host", status.stdout)
        up = ggmq("up", path)
        assert up.returncode == 1 and "no route to host" in up.stderr and "started" not in up.stdout
        down = ggmq("down", path)
        assert down.returncode == 1 and "there/reference could not be ended: me@far" in down.stderr
        assert "remove " + str(tmp_path / "state" / "ggmq" / "far-gone.json") in down.stderr
    finally:
        far.program(far.here / "ssh", before)
        down = ggmq("down", path)
    assert down.returncode == 0 and "ended there/reference" in down.stdout
