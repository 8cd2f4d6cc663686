"""Commands and workers on other hosts, over the system's ssh."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time

from config.running import CLUSTER_ID, Process
from config.schema import WorkerSection
from protocol.errors import ConfigError, Unavailable

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
SSH_S = 60.0
NOT_FOUND = 127
"""What a shell ends with when there is no such command."""


def ssh(host: str, options: list[str], command: str, given: str = "") -> str:
    """Run a shell command on a host, with `given` as its standard input.

    Errors: Unavailable with what ssh, or the command, said last.
    """
    try:
        done = subprocess.run([*SSH, *options, "--", host, command], capture_output=True, text=True, timeout=SSH_S,
                              errors="replace", input=given, check=False)  # fmt: skip
    except FileNotFoundError:
        raise _no_ssh() from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{host}: ssh gave no answer within {SSH_S:.0f} s") from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise Unavailable(f"{host}: ssh ended with code {done.returncode}: {last}{_advice(done.returncode, host)}")
    return done.stdout


def for_shell(words: list[str]) -> str:
    """Words of a command line for a POSIX shell, which expands the `~` at the beginning of a path."""
    return " ".join("~/" + shlex.quote(w[2:]) if w.startswith("~/") and w != "~/" else shlex.quote(w) for w in words)


class RemoteStart:
    """A worker that is being started over ssh. The connection stays until `leave`, to hear at once if the worker ends.

    Attributes:
        process: what runs there.
    Errors: ConfigError, or Unavailable with what ssh or the host said.
    """

    def __init__(self, name: str, w: WorkerSection, options: list[str], tag: str, cluster_id: str) -> None:
        self.host, self._tag, self._heard = w.host, tag, b""
        log = f"/tmp/ggmq-{tag}.log"
        command = f"{w.command} {for_shell([*options, '--tag', tag])}"
        try:
            pipe = subprocess.PIPE
            self._ssh = subprocess.Popen([*SSH, *w.ssh_options, "--", w.host, "sh -s"], stdin=pipe, stdout=pipe,
                                         stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        except FileNotFoundError:
            raise _no_ssh() from None
        assert self._ssh.stdin is not None and self._ssh.stdout is not None  # they are pipes
        os.set_blocking(self._ssh.stdout.fileno(), False)
        try:
            self._ssh.stdin.write(_SCRIPT.format(command=command, log=log, tag=tag, variable=CLUSTER_ID,
                                                 id=cluster_id).encode())  # fmt: skip
            self._ssh.stdin.close()
        except BrokenPipeError:  # it has ended, and said why
            pass
        due = time.monotonic() + SSH_S
        while not (found := re.search(rf"^{re.escape(tag)} pid (\d+)$", self._lines(), re.MULTILINE)):
            code = self._ssh.poll()
            if code is not None:
                said = self._said()
                self.leave()
                raise Unavailable(f"{w.host}: ssh ended with code {code}: {said}{_advice(code, w.host)}")
            if time.monotonic() > due:
                self.leave()
                raise Unavailable(f"{w.host}: ssh gave no answer within {SSH_S:.0f} s")
            time.sleep(0.02)
        self.process = Process(name, tag, int(found[1]), f"{w.host}:{log}", w.host, w.ssh_options)

    def ended(self) -> str:
        """How the worker ended, with the last line it wrote; empty while it runs."""
        code = self._ssh.poll()
        lines = self._lines()
        end = re.search(rf"^{re.escape(self._tag)} ended (\d+)$", lines, re.MULTILINE)
        if end is not None and code is not None:
            last = lines[end.end() :].strip().splitlines()
            said = last[-1] if last else "it wrote nothing"
            return f"ended with code {end[1]} on {self.host}: {said}{_advice(int(end[1]), self.host)}"
        return "" if code is None else f"may have ended: ssh to {self.host} ended with code {code}: {self._said()}"

    def leave(self) -> None:
        """Close the connection; what was started goes on there."""
        self._ssh.kill()
        self._ssh.wait()
        assert self._ssh.stdout is not None  # it is a pipe
        self._ssh.stdout.close()

    def _lines(self) -> str:
        assert self._ssh.stdout is not None  # it is a pipe
        while chunk := self._ssh.stdout.read(65536):
            self._heard += chunk
        return self._heard.decode(errors="replace")

    def _said(self) -> str:
        """The last line that is not the script's own."""
        lines = [line.strip() for line in self._lines().splitlines()]
        return next((x for x in reversed(lines) if x not in ("", ".") and not x.startswith(self._tag)), "no message")


_SCRIPT = """\
{variable}={id}; export {variable}
nohup {command} >{log} 2>&1 </dev/null &
worker=$!
echo {tag} pid $worker
(trap '' PIPE; n=0; while [ $n -lt 600 ] && echo . 2>/dev/null; do sleep 1; n=$((n+1)); done; kill $$) &
listening=$!
wait $worker
code=$?
kill $listening
echo {tag} ended $code
tail -n 5 {log}
"""
"""Starts a worker and waits for its end, or until nobody listens any more, ten minutes at most. It is read from standard
input, so that neither the id nor the tag stands among the arguments of the shell."""


def _no_ssh() -> ConfigError:
    return ConfigError("launcher ssh: the program ssh is not installed on this host")


def _advice(code: int, host: str) -> str:
    if code != NOT_FOUND:
        return ""
    return (f"; the key `command` of the cluster file names what starts a worker on {host}, such as "
            "~/ggmq/.venv/bin/worker")  # fmt: skip
