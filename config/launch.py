"""Starts, watches and ends the processes of a cluster, here and on other hosts.

What `down` ends is exactly what `up` began: a process of this host is known by its number and the time of its start, one of
another host by a tag of its own in its arguments. A number that the system has given to somebody else since is left alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from config.installed import module_command, module_environment
from config.remote import ssh
from config.running import Process
from config.schema import ClusterFile, WorkerSection, expanded
from protocol.errors import ConfigError, Unavailable

LIST_S = 120.0
END_S = 5.0
SAME_S = 0.05
"""Start times of one process, read twice, differ by less; those of two that had the same number differ by more."""


def worker_options(cluster: ClusterFile, w: WorkerSection, device: str, broker: str) -> list[str]:
    """The worker's command line for one device, after the command itself. `broker`: the endpoint that it dials."""
    out = ["--broker", broker, "-d", device, "--name", w.name, "--log-timestamps"]
    if w.threads:
        out += ["-t", str(w.threads)]
    if w.memory_mib:
        out += ["-m", str(w.memory_mib)]
    if w.cache:
        out.append("-c")
    if w.keep_s:
        out += ["--keep", str(w.keep_s)]
    if cluster.security.insecure:
        out.append("--insecure")
    elif w.keys or cluster.security.keys:
        keys = w.keys or cluster.security.keys
        out += ["--keys", keys if w.launcher == "ssh" else str(expanded(keys))]
    return out


def local_command(w: WorkerSection) -> list[str]:
    """What starts a worker here; the plain word `worker` is this installation's own. Errors: ConfigError."""
    if w.command == "worker":
        return module_command("workers")
    try:
        words = shlex.split(w.command)
    except ValueError as e:
        raise ConfigError(f"worker {w.name}: command: expected words as a shell has them, got {w.command!r}: {e}") from None
    if not words:
        raise ConfigError(f"worker {w.name}: command: expected what starts a worker, got nothing; leave the key out")
    return [str(expanded(words[0])), *words[1:]]


def _cannot_start(where: str, command: list[str], e: OSError) -> ConfigError:
    return ConfigError(f"{where}: cannot start {shlex.join(command)}: {e.filename or command[0]}: {e.strerror or e}; "
                       "the key `command` of the cluster file says what starts a worker")  # fmt: skip


class LocalStart:
    """A process of this host that is being started and outlives us, its output in a log.

    Attributes:
        process: what the state file keeps of it.
    Errors: ConfigError when it cannot start.
    """

    def __init__(
        self, name: str, command: list[str], tag: str, log: Path, environment: Mapping[str, str],
        descriptors: Sequence[int] = (),
    ) -> None:  # fmt: skip
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            out = open(log, "ab")  # noqa: SIM115, the block below closes it
        except OSError as e:
            raise ConfigError(f"{log}: cannot write the log of {name}: {e.strerror or e}; "
                              "XDG_STATE_HOME says where logs lie") from None  # fmt: skip
        with out:
            self._log, self._log_bytes = log, log.stat().st_size
            try:
                self._popen = subprocess.Popen([*command, "--tag", tag], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                               start_new_session=True, pass_fds=descriptors,
                                               env={**module_environment(), **environment})  # fmt: skip
            except OSError as e:
                raise _cannot_start(name, command, e) from None
        pid = self._popen.pid
        self.process = Process(name, tag, pid, str(log), began_s=began_s(pid))

    def ended(self) -> str:
        """How it ended, with the last line it wrote; empty while it runs."""
        code = self._popen.poll()
        if code is None:
            return ""
        with contextlib.suppress(OSError), open(self._log, "rb") as f:
            f.seek(self._log_bytes)
            lines = f.read().decode(errors="replace").strip().splitlines()
            if lines:
                return f"ended with code {code}: {lines[-1]}"
        return f"ended with code {code}: it wrote nothing"


def began_s(pid: int) -> float:
    """When a process was started, in seconds since 1970; 0 when there is none of this number."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0


def alive(p: Process) -> bool:
    """Whether the process still runs and is ours. Errors: Unavailable when its host does not answer."""
    if p.host:
        return bool(ssh(p.host, p.ssh_options, f"pgrep -f -- {shlex.quote('[-]-tag ' + p.tag)} || true").strip())
    return _found(p) is not None


def _found(p: Process) -> psutil.Process | None:
    """A process of this host, if it runs and is the one that was begun. Where the system's clock was set since, so that all
    start times differ, its arguments tell."""
    try:
        found = psutil.Process(p.pid)
        if found.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        same = abs(found.create_time() - p.began_s) < SAME_S or p.tag in found.cmdline()
    except psutil.Error:
        return None
    return found if same else None


def end(p: Process) -> bool:
    """End a process, kindly first. Returns: whether it was running. Errors: Unavailable when its host does not answer."""
    if p.host:
        pattern = shlex.quote("[-]-tag " + p.tag)
        out = ssh(p.host, p.ssh_options,
                  f"pgrep -f -- {pattern} >/dev/null && echo ran; pkill -TERM -f -- {pattern}; "
                  f"for i in 1 2 3 4 5; do pgrep -f -- {pattern} >/dev/null || break; sleep 1; done; "
                  f"pkill -KILL -f -- {pattern}; true")  # fmt: skip
        return "ran" in out
    found = _found(p)
    if found is None:
        return False
    for stop in (found.terminate, found.kill):
        with contextlib.suppress(psutil.Error):
            stop()
        due = time.monotonic() + END_S
        while time.monotonic() < due and _found(p) is not None:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(p.pid, os.WNOHANG)
            time.sleep(0.02)
        if _found(p) is None:
            break
    return True


def log_tail(p: Process, n_lines: int = 5) -> str:
    """The last lines of a process's log."""
    try:
        if p.host:
            return ssh(p.host, p.ssh_options, f"tail -n {n_lines} {shlex.quote(p.log.split(':', 1)[1])}").strip()
        return "\n".join(Path(p.log).read_text(errors="replace").splitlines()[-n_lines:])
    except (OSError, Unavailable):
        return ""


def list_devices(w: WorkerSection) -> list[tuple[str, int, int]]:
    """Name, total and free bytes of a launcher's devices, as its worker lists them.

    Runs the cluster file's `command`, by ssh too. Errors: ConfigError when it cannot be started, Unavailable when it fails.
    """
    if w.launcher == "ssh":
        out = ssh(w.host, w.ssh_options, f"{w.command} --device")
    else:
        command = [*local_command(w), "--device"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=LIST_S,
                                  stdin=subprocess.DEVNULL, env=module_environment())  # fmt: skip
        except OSError as e:
            raise _cannot_start(f"worker {w.name}", command, e) from None
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{w.name}: `{w.command} --device` gave no answer within {LIST_S:.0f} s") from None
        if done.returncode:
            raise Unavailable(f"{w.name}: `{w.command} --device` failed: {done.stderr.strip()[-300:]}")
        out = done.stdout
    found = re.findall(r"^  (\S+): .*\((\d+) MiB, (\d+) MiB free\)$", out, re.MULTILINE)
    return [(name, int(total) << 20, int(free) << 20) for name, total, free in found]
