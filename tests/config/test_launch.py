"""What a cluster file starts: a command that is not there, places that cannot be written, and a plan that runs nothing."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path

import psutil
import pytest

from config import launch
from config.memory import memory_bytes
from config.running import Process
from tests.support.fixtures import free_port
from tests.support.processes import until
from tests.test_cli import WORKER, ggmq

CLUSTER = """
name: {name}
broker: {{listen: "tcp://127.0.0.1:{port}"}}
workers:
  - {{name: left, devices: [reference], memory_mib: 300, command: {command}}}
  - {{name: right, devices: [reference], memory_mib: 100}}
"""


def cluster(folder: Path, command: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(CLUSTER.format(name="test", port=free_port(), command=json.dumps(command)))
    return path


@pytest.mark.parametrize(("command", "words"), [
    ("no-such-program-here --x", r"cannot start no-such-program-here --x .*: no-such-program-here: No such file"),
    ("/", r"cannot start / .*: Permission denied"),
    ("worker 'half", "command: expected words as a shell has them, got .*No closing quotation"),
    ("", "command: expected what starts a worker, got nothing; leave the key out"),
], ids=["missing", "folder", "quote", "empty"])  # fmt: skip
@pytest.mark.parametrize("what", ["plan", "up"])
def test_a_command_that_cannot_be_started_is_named(tmp_path: Path, what: str, command: str, words: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"name: test\nbroker: {{listen: 'tcp://127.0.0.1:{free_port()}'}}\n"
                    f"workers:\n  - name: left\n    command: \"{command}\"\n")  # fmt: skip
    r = ggmq(what, path)
    assert r.returncode == 2 and re.search("ggmq: (worker )?left.*: " + words, r.stderr), r.stderr
    assert "Traceback" not in r.stderr and "bug" not in r.stderr
    assert "no cluster is up" in ggmq("status").stdout


def test_a_state_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    r = ggmq("up", cluster(tmp_path, "worker"))
    assert r.returncode == 2 and "file/ggmq" in r.stderr and "XDG_STATE_HOME" in r.stderr, r.stderr


def test_an_offline_plan_runs_and_contacts_nothing(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    path = cluster(tmp_path, f"sh -c 'echo >{ran}; exec {shlex.join(WORKER)} \"$@\"' sh")
    asked = ggmq("plan", path)
    assert asked.returncode == 0 and ran.exists(), asked.stderr
    ran.unlink()
    offline = ggmq("plan", path, "--offline")
    assert offline.returncode == 0 and offline.stdout == asked.stdout, offline.stderr
    assert not ran.exists()


def test_an_offline_plan_takes_this_hosts_memory_and_names_what_nobody_can_tell(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("workers:\n  - {name: here}\n")
    r = ggmq("plan", path, "--offline")
    assert r.returncode == 0, r.stderr
    free = re.search(r"here CPU\s+embedding, 0-3, output.* (\d+)$", r.stdout, re.MULTILINE)
    assert free is not None and 0 < int(free[1]) << 20 <= memory_bytes(), r.stdout
    for worker in ("{name: there, launcher: ssh, host: u@192.0.2.1}", "{name: there, launcher: none, host: 192.0.2.1}",
                   "{name: there, devices: [CUDA0]}"):  # fmt: skip
        path.write_text(f"workers:\n  - {worker}\n")
        r = ggmq("plan", path, "--offline", timeout=30)
        assert r.returncode == 2 and "c.yaml: $.workers[0].memory_mib: worker there: expected the MiB" in r.stderr, r.stderr
        path.write_text(f"workers:\n  - {worker.replace('name', 'memory_mib: 500, name')}\n")
        r = ggmq("plan", path, "--offline", timeout=30)
        assert r.returncode == 0 and "0-3, output" in r.stdout, r.stderr


def test_a_home_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for section, words in (("security: {keys: ~nobody-here/k}", "~nobody-here/k: cannot read the cluster key"),
                           ("model: {path: ~nobody-here/m.gguf}", "~nobody-here/m.gguf: no such file")):  # fmt: skip
        path.write_text(f"broker: {{listen: 'tcp://127.0.0.1:{free_port()}'}}\nworkers: [{{name: a}}]\n{section}\n")
        r = ggmq("up" if "keys" in section else "plan", path, *(["--offline"] if "model" in section else []))
        assert r.returncode == 2 and words in r.stderr, r.stderr


def test_a_process_is_known_from_its_first_moment_and_never_taken_for_another(tmp_path: Path) -> None:
    for i in range(40):
        start = launch.LocalStart("p", ["sh", "-c", "exec sleep 60"], "tag", tmp_path / "log", {})
        p = start.process
        try:
            assert launch.alive(p), f"start {i}"
            if i % 8 == 0:
                until(lambda p=p: psutil.Process(p.pid).cmdline() == ["sleep", "60"])
                assert launch.alive(p) and start.ended() == ""
        finally:
            assert launch.end(p)
            start.ended()
        assert not launch.alive(p) and not launch.end(p)


def test_a_process_whose_arguments_are_not_there_yet_is_alive() -> None:
    """Right after fork: its arguments are still those of its parent."""
    begins, child = os.pipe(), os.fork()
    if child == 0:
        os.read(begins[0], 1)
        os._exit(0)
    try:
        p = Process("p", "a-tag", child, "", began_s=launch.began_s(child))
        assert launch.alive(p)
        other = Process("p", "a-tag", child, "", began_s=p.began_s - 10)  # one that had the same number before
        assert not launch.alive(other) and not launch.end(other) and launch.alive(p)
        moved = Process("p", sys.argv[0], child, "", began_s=p.began_s - 10)  # the clock was set: its arguments tell
        assert sys.argv[0] not in psutil.Process(child).cmdline() or launch.alive(moved)
    finally:
        os.write(begins[1], b"x")
        os.waitpid(child, 0)
        for fd in begins:
            os.close(fd)
    assert not launch.alive(p)


def test_one_that_has_ended_and_was_not_waited_for_is_not_alive(tmp_path: Path) -> None:
    start = launch.LocalStart("p", ["sh", "-c", "echo first; echo 'the last word' >&2; exit 5"], "tag", tmp_path / "log", {})
    until(lambda: psutil.Process(start.process.pid).status() == psutil.STATUS_ZOMBIE)
    assert not launch.alive(start.process)
    assert start.ended() == "ended with code 5: the last word"
