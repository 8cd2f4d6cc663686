"""Starts and ends the processes of a cluster, here or over the system's ssh, and remembers exactly which they are.

Every process carries a tag of its own in its arguments. What `down` ends is a process that still carries it: a number
that the system has given to somebody else since is left alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from msgspec import Struct, ValidationError, convert, to_builtins

from config.schema import ClusterFile, WorkerSection, expanded
from protocol.errors import ConfigError, Unavailable

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
SSH_S = 60.0
LIST_S = 120.0
END_S = 5.0


class Process(Struct):
    """A process that `up` began. `host` empty: on this host."""

    name: str
    tag: str
    pid: int
    log: str
    host: str = ""
    ssh_options: list[str] = []


class ClusterState(Struct):
    """What is running of a cluster, kept in a file until `down`."""

    name: str
    file: str
    endpoint: str
    keys: str
    insecure: bool
    processes: list[Process]


def state_folder() -> Path:
    """`$XDG_STATE_HOME/ggmq`, else `~/.local/state/ggmq`."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "ggmq"


def state_path(name: str) -> Path:
    return state_folder() / f"{name}.json"


def read_state(path: Path) -> ClusterState | None:
    """The state in a file; None when there is none. Errors: ConfigError when it cannot be read."""
    try:
        return convert(json.loads(path.read_text()), ClusterState)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise ConfigError(f"{path}: the cluster's state cannot be read: {e.strerror or e}; "
                          "XDG_STATE_HOME says where it lies") from None  # fmt: skip
    except (ValueError, ValidationError) as e:
        raise ConfigError(f"{path}: the cluster's state cannot be read: {e}; end its processes by hand, remove it") from None


def write_state(state: ClusterState) -> None:
    """Written beside and renamed, after every process that starts: a crash of `up` loses track of none.

    Errors: ConfigError when it cannot be written.
    """
    path = state_path(state.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=".part-")
        with open(fd, "w") as f:
            json.dump(to_builtins(state), f, indent=1)
        os.replace(name, path)
    except OSError as e:
        raise ConfigError(f"{path}: cannot keep the cluster's state: {e.strerror or e}; "
                          "XDG_STATE_HOME says where it lies") from None  # fmt: skip


def all_states() -> list[ClusterState]:
    found = [read_state(p) for p in sorted(state_folder().glob("*.json"))]
    return [s for s in found if s is not None]


def new_tag(name: str) -> str:
    return f"{name}-{secrets.token_hex(8)}"


def worker_options(cluster: ClusterFile, w: WorkerSection, device: str) -> list[str]:
    """The worker's command line for one device, after the command itself."""
    out = ["--broker", cluster.broker.advertise or cluster.broker.listen, "-d", device,
           "--name", w.name]  # fmt: skip
    if w.threads:
        out += ["-t", str(w.threads)]
    if w.memory_mib:
        out += ["-m", str(w.memory_mib)]
    if w.cache:
        out.append("-c")
    if cluster.security.insecure:
        out.append("--insecure")
    elif w.keys or cluster.security.keys:
        keys = w.keys or cluster.security.keys
        out += ["--keys", keys if w.launcher == "ssh" else str(expanded(keys))]
    return out


def local_command(w: WorkerSection) -> list[str]:
    """What starts a worker here; the plain word `worker` is this installation's own. Errors: ConfigError."""
    if w.command == "worker":
        return [sys.executable, "-m", "workers"]
    try:
        words = shlex.split(w.command)
    except ValueError as e:
        raise ConfigError(f"worker {w.name}: command: expected words as a shell has them, got {w.command!r}: {e}") from None
    if not words:
        raise ConfigError(f"worker {w.name}: command: expected what starts a worker, got nothing; leave the key out")
    return words


def _our_environment() -> dict[str, str]:
    """The environment of a process that is to find this installation's packages."""
    root = str(Path(__file__).resolve().parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)}


def _cannot_start(where: str, command: list[str], e: OSError) -> ConfigError:
    return ConfigError(f"{where}: cannot start {shlex.join(command)}: {e.filename or command[0]}: {e.strerror or e}; "
                       "the key `command` of the cluster file says what starts a worker")  # fmt: skip


def start_local(name: str, command: list[str], tag: str, log: Path) -> Process:
    """Start a process of this host that outlives us, its output in a log. Errors: ConfigError when it cannot start."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        out = open(log, "ab")  # noqa: SIM115, the block below closes it
    except OSError as e:
        raise ConfigError(f"{log}: cannot write the log of {name}: {e.strerror or e}; "
                          "XDG_STATE_HOME says where logs lie") from None  # fmt: skip
    with out:
        try:
            p = subprocess.Popen([*command, "--tag", tag], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                                 start_new_session=True, env=_our_environment())  # fmt: skip
        except OSError as e:
            raise _cannot_start(name, command, e) from None
    return Process(name, tag, p.pid, str(log))


def ssh(host: str, options: list[str], command: str) -> str:
    """Run a shell command on a host. Errors: Unavailable with what ssh said."""
    try:
        done = subprocess.run([*SSH, *options, "--", host, command], capture_output=True, text=True, timeout=SSH_S,
                              errors="replace", stdin=subprocess.DEVNULL, check=False)  # fmt: skip
    except FileNotFoundError:
        raise ConfigError("launcher ssh: the program ssh is not installed on this host") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{host}: ssh gave no answer within {SSH_S:.0f} s") from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise Unavailable(f"{host}: ssh ended with code {done.returncode}: {last}")
    return done.stdout


def start_ssh(name: str, w: WorkerSection, options: list[str], tag: str) -> Process:
    """Start a worker on another host; its log is in that host's temporary folder."""
    log = f"/tmp/ggmq-{tag}.log"
    command = f"{w.command} {shlex.join([*options, '--tag', tag])}"
    out = ssh(w.host, w.ssh_options, f"nohup {command} >{log} 2>&1 </dev/null & echo $!")
    if not re.fullmatch(r"\d+", out.strip()):
        raise Unavailable(f"{w.host}: expected a process number from the shell, got {out.strip()[:80]!r}")
    return Process(name, tag, int(out.strip()), f"{w.host}:{log}", w.host, w.ssh_options)


def alive(p: Process) -> bool:
    """Whether the process still runs and is ours. A host that cannot be asked counts as not alive."""
    if p.host:
        with contextlib.suppress(Unavailable):
            return bool(ssh(p.host, p.ssh_options, f"pgrep -f -- {shlex.quote('[-]-tag ' + p.tag)} || true").strip())
        return False
    try:
        arguments = Path(f"/proc/{p.pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return p.tag.encode() in arguments


def end(p: Process) -> bool:
    """End a process, kindly first. Returns: whether it was running. Errors: Unavailable when its host does not answer."""
    if p.host:
        pattern = shlex.quote("[-]-tag " + p.tag)
        out = ssh(p.host, p.ssh_options,
                  f"pgrep -f -- {pattern} >/dev/null && echo ran; pkill -TERM -f -- {pattern}; "
                  f"for i in 1 2 3 4 5; do pgrep -f -- {pattern} >/dev/null || break; sleep 1; done; "
                  f"pkill -KILL -f -- {pattern}; true")  # fmt: skip
        return "ran" in out
    if not alive(p):
        return False
    for s in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(p.pid, s)
        due = time.monotonic() + END_S
        while time.monotonic() < due and alive(p):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(p.pid, os.WNOHANG)
            time.sleep(0.02)
        if not alive(p):
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
                                  stdin=subprocess.DEVNULL, env=_our_environment())  # fmt: skip
        except OSError as e:
            raise _cannot_start(f"worker {w.name}", command, e) from None
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{w.name}: `{w.command} --device` gave no answer within {LIST_S:.0f} s") from None
        if done.returncode:
            raise Unavailable(f"{w.name}: `{w.command} --device` failed: {done.stderr.strip()[-300:]}")
        out = done.stdout
    found = re.findall(r"^  (\S+): .*\((\d+) MiB, (\d+) MiB free\)$", out, re.MULTILINE)
    return [(name, int(total) << 20, int(free) << 20) for name, total, free in found]
