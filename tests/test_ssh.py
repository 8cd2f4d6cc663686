"""The ssh launcher against a real sshd on loopback."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from config.keys import read_keys
from tests.support.fixtures import ROOT
from tests.test_cli import free_port, ggmq

SSHD = shutil.which("sshd") or ("/usr/sbin/sshd" if Path("/usr/sbin/sshd").exists() else None)
pytestmark = pytest.mark.skipif(SSHD is None or shutil.which("ssh") is None, reason="ssh and sshd are not installed")

CLUSTER = """
name: over-ssh
broker: {{listen: "tcp://127.0.0.1:{port}"}}
workers:
  - {{name: here, devices: [reference]}}
  - name: there
    launcher: ssh
    host: {user}@127.0.0.1
    devices: [reference]
    command: {command}
    ssh_options: [{options}]
"""


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[list[str]]:
    """A server of our own; yields the client's options for it."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    port = free_port()
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    options = {"HostKey": tmp_path / "host", "AuthorizedKeysFile": tmp_path / "user.pub", "StrictModes": "no",
               "PidFile": "none", "UsePAM": "no", "ListenAddress": "127.0.0.1"}  # fmt: skip
    flags = [x for k, v in options.items() for x in ("-o", f"{k}={v}")]
    server = subprocess.Popen([str(SSHD), "-D", "-e", "-f", "/dev/null", "-p", str(port), *flags],
                              stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        due = time.monotonic() + 10
        while True:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None and time.monotonic() < due
            time.sleep(0.05)
        yield ["-p", str(port), "-i", str(tmp_path / "user"), "-o", "StrictHostKeyChecking=no", "-o",
               "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]  # fmt: skip
    finally:
        server.terminate()
        server.wait(10)


def test_a_worker_is_started_used_and_ended_over_ssh(sshd: list[str], tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    command = f"env PYTHONPATH={ROOT} {sys.executable} -m workers"
    path.write_text(CLUSTER.format(port=free_port(), user=getpass.getuser(), command=command,
                                   options=", ".join(f"'{o}'" for o in sshd)))  # fmt: skip
    plan = ggmq("plan", path)
    assert "there reference" in plan.stdout, plan.stderr
    up = ggmq("up", path)
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        assert "there/reference: running" in ggmq("status").stdout
        r = ggmq("run", "--cluster", path, "-p", "Once upon a time", "-n", "5", "--temp", "0")
        assert r.returncode == 0 and "2-3 + output on there" in r.stderr, r.stderr
    finally:
        down = ggmq("down", path)
    assert down.returncode == 0 and "ended there/reference" in down.stdout
    assert not subprocess.run(["pgrep", "-f", "over-ss[h]-"], capture_output=True).stdout


def test_a_host_without_a_key_is_given_one_over_ssh(sshd: list[str], tmp_path: Path) -> None:
    assert ggmq("keys", "new").returncode == 0
    path, there = tmp_path / "c.yaml", tmp_path / "there it is" / "worker.key"
    command = f"env PYTHONPATH={ROOT} {sys.executable} -m workers"
    path.write_text(CLUSTER.format(port=free_port(), user=getpass.getuser(), command=command,
                                   options=", ".join(f"'{o}'" for o in sshd)) + f"    keys: {there}\n")  # fmt: skip
    up = ggmq("up", path)
    try:
        assert up.returncode == 0 and "a worker's key of its own, over-ssh-there" in up.stdout, up.stdout + up.stderr
        assert stat.S_IMODE(there.stat().st_mode) == 0o600 and read_keys(there).role == "worker"
        r = ggmq("run", "--cluster", path, "-p", "Once upon a time", "-n", "5", "--temp", "0")
        assert r.returncode == 0 and "output on there" in r.stderr, r.stderr
    finally:
        down = ggmq("down", path)
    assert down.returncode == 0


def test_a_host_that_refuses_is_named(sshd: list[str], tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    options = [o if o != str(tmp_path / "user") else str(tmp_path / "no-such-key") for o in sshd]
    path.write_text(CLUSTER.format(port=free_port(), user=getpass.getuser(), command="worker",
                                   options=", ".join(f"'{o}'" for o in [*options, "-o", "IdentitiesOnly=yes"])))  # fmt: skip
    up = ggmq("up", path)
    assert up.returncode == 1 and "127.0.0.1: ssh ended with code 255" in up.stderr, up.stderr
    assert "no cluster is up" in ggmq("status").stdout
