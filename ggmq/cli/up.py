"""`ggmq up` and `ggmq down`: the processes of a cluster, from nothing to ready, and back."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from config import launch, running
from config.handing import hand_out, place_of_key
from config.installed import module_command
from config.keys import KeyPair, require
from config.launch import LocalStart
from config.load import load_cluster
from config.remote import RemoteStart
from config.roles import Role
from config.running import ClusterState, Process
from config.schema import ClusterFile, WorkerSection, expanded
from config.terminal import print_line, safe_text
from ggmq.cli.clusterfile import keys_of_cluster
from ggmq.cluster import Client, connect
from protocol import messages as m
from protocol.errors import ConfigError, GgmqError, Unavailable

START_S = 300.0
LISTEN_S = 60.0
BROKER = "broker"


@dataclass(slots=True)
class Starting:
    """What this `up` has begun, beside what ran already.

    Attributes:
        state: of the whole cluster, as its file has it.
        keys: the cluster's.
        mine: the processes begun here; they end with an `up` that fails.
        handed: hosts, with places there, that are known to have a key.
    """

    cluster: ClusterFile
    state: ClusterState
    keys: KeyPair | None
    mine: list[LocalStart | RemoteStart] = field(default_factory=list)
    handed: set[tuple[str, str]] = field(default_factory=set)

    def hand_out(self, w: WorkerSection) -> None:
        """Give a worker's host a key of its own, if it has none. Errors: Unavailable, ConfigError."""
        place = place_of_key(self.cluster, w)
        if self.keys is None or (w.host, place) in self.handed:
            return
        self.handed.add((w.host, place))
        name = hand_out(self.keys, w, place, f"{self.cluster.name}-{w.name}")
        if name:
            print_line(f"gave {w.host} a worker's key of its own, {name}, as {place} there; `ggmq keys remove {name}` takes "
                       "back what it may")  # fmt: skip

    def began(self, start: LocalStart | RemoteStart) -> None:
        """Keep track of a process, in the place of one of its name that died."""
        p = start.process
        self.mine.append(start)
        self.state.processes = [q for q in self.state.processes if q.name != p.name] + [p]
        running.write_state(self.state)
        print_line(f"started {p.name} (process {p.pid}{' on ' + p.host if p.host else ''}, log {p.log})")

    def check(self) -> None:
        """Errors: Unavailable names the process that has ended, its log and the log's last line."""
        for s in self.mine:
            ended = s.ended()
            if ended:
                raise _ended(s.process, ended)


def up(args: argparse.Namespace) -> int:
    cluster = load_cluster(args.cluster)
    with running.held(cluster.name):
        state = running.read_state(running.state_path(cluster.name))
        alive = [p for p in state.processes if launch.alive(p)] if state is not None else []
        keys = keys_of_cluster(cluster)
        require(keys, Role.CLUSTER, "`ggmq up`", "run it on the main host, where the cluster's key is")
        _check_reach(args.cluster, cluster, keys)
        if state is None or not alive:
            state = ClusterState(cluster.name, str(args.cluster.resolve()), cluster.broker.listen, cluster.security.keys,
                                 cluster.security.insecure, [], running.new_cluster_id())  # fmt: skip
        elif not state.id:
            raise ConfigError(f"cluster {cluster.name} is up (from {state.file}), begun by another version of ggmq; "
                              f"`ggmq down {args.cluster}` ends it")  # fmt: skip
        starting = Starting(cluster, state, keys)
        missing = _missing_processes(cluster, alive)
        for p in alive:
            if p.name not in _wanted(cluster):
                print_line(f"note    {p.name} runs, and {args.cluster} does not name it; `ggmq down` ends it",
                           file=sys.stderr)  # fmt: skip
        if not missing:
            print_line(f"cluster {cluster.name} is up at {state.endpoint}, every process of it runs; nothing to start")
            return 0
        try:
            _start(starting, missing)
            _await(starting, keys)
        except (GgmqError, KeyboardInterrupt):
            _undo(starting, alive)
            raise
        finally:
            for s in starting.mine:
                if isinstance(s, RemoteStart):
                    s.leave()
    again = f"; {len(alive)} processes ran already" if alive else ""
    print_line(f"cluster {cluster.name} is up at {state.endpoint}{again}; "
               f"try: ggmq run --cluster {args.cluster} -p \"Once upon a time\"")  # fmt: skip
    return 0


def down(args: argparse.Namespace) -> int:
    cluster = load_cluster(args.cluster)
    with running.held(cluster.name):
        state = running.read_state(running.state_path(cluster.name))
        if state is None:
            print_line(f"cluster {cluster.name} is not up")
            return 0
        return 1 if _end(state, state.processes) else 0


def _check_reach(file: Path, cluster: ClusterFile, keys: KeyPair | None) -> None:
    host = cluster.broker.listen.removeprefix("tcp://").rsplit(":", 1)[0]
    if keys is None and not cluster.security.insecure and not (host == "localhost" or host.startswith("127.")):
        raise ConfigError(f"{file}: $.broker.listen: {host} can be reached from the network and there is no "
                          "cluster key; run `ggmq keys new`, or set security.insecure")  # fmt: skip
    if cluster.broker.advertise or not (host in ("localhost", "0.0.0.0", "*") or host.startswith("127.")):
        return
    for i, w in enumerate(cluster.workers):
        there = w.host.rpartition("@")[2]
        if w.launcher == "ssh" and there != "localhost" and not there.startswith("127."):
            raise ConfigError(f"{file}: $.workers[{i}].host: worker {w.name} on {w.host} cannot dial a broker at {host}: "
                              "set broker.listen to tcp://0.0.0.0:0, and broker.advertise to tcp://ADDRESS:0 with the "
                              "address of this host as the other sees it")  # fmt: skip


# -- starting ----------------------------------------------------------------------------------------------------------


def _wanted(cluster: ClusterFile) -> dict[str, tuple[WorkerSection, str] | None]:
    """Names of the processes that a cluster file describes, with worker and device; the broker comes first."""
    workers = [w for w in cluster.workers if w.launcher != "none"]
    return {BROKER: None, **{f"{w.name}/{device}": (w, device) for w in workers for device in w.devices}}


def _missing_processes(cluster: ClusterFile, alive: Sequence[Process]) -> list[str]:
    there = {p.name for p in alive}
    return [name for name in _wanted(cluster) if name not in there]


def _start(starting: Starting, names: Sequence[str]) -> None:
    cluster, state = starting.cluster, starting.state
    logs, wanted = running.state_folder() / "logs" / cluster.name, _wanted(cluster)
    environment = {running.CLUSTER_ID: state.id}
    for name in names:
        tag, described = running.new_tag(cluster.name), wanted[name]
        if described is None:
            _start_broker(starting, tag, logs / "broker.log", environment)
            continue
        w, device = described
        options = launch.worker_options(cluster, w, device, _dialled(cluster, state))
        if w.launcher == "ssh":
            starting.hand_out(w)
            starting.began(RemoteStart(name, w, options, tag, state.id))
        else:
            command = [*launch.local_command(w), *options]
            starting.began(LocalStart(name, command, tag, logs / f"{w.name}-{device}.log", environment))
        starting.check()


def _dialled(cluster: ClusterFile, state: ClusterState) -> str:
    """What workers dial: as the file says, with the port that the broker has where it leaves that open."""
    said = cluster.broker.advertise or state.endpoint
    host, port = said.rsplit(":", 1)
    return said if int(port) else f"{host}:{state.endpoint.rsplit(':', 1)[1]}"


def _start_broker(starting: Starting, tag: str, log: Path, environment: dict[str, str]) -> None:
    """Start the broker and wait until it listens: it tells where, through a pipe."""
    cluster, state = starting.cluster, starting.state
    listening = [f"{w.host}:{w.port}" for w in cluster.workers if w.launcher == "none"]
    tells, told = os.pipe()
    try:
        command = [*module_command("ggmq"), "broker", "--listen", state.endpoint, "--tell-fd", str(told), "--log-timestamps"]
        if listening:
            command += ["--rpc", ",".join(listening)]
        if cluster.security.insecure:
            command.append("--insecure")
        elif cluster.security.keys:
            command += ["--keys", str(expanded(cluster.security.keys))]
        broker = LocalStart(BROKER, command, tag, log, environment, [told])
        os.close(told)
        told = -1
        starting.began(broker)
        said = b""
        due = time.monotonic() + LISTEN_S
        while not said.endswith(b"\n"):
            ready, _, _ = select.select([tells], [], [], max(0.0, due - time.monotonic()))
            chunk = os.read(tells, 4096) if ready else b""
            if not ready:
                raise Unavailable(f"the broker did not listen within {LISTEN_S:.0f} s; see {log}")
            if not chunk:  # it closed its end without a word: it is ending
                while not (ended := broker.ended()) and time.monotonic() < due:
                    time.sleep(0.02)
                raise _ended(broker.process, ended)
            said += chunk
    finally:
        os.close(tells)
        if told >= 0:
            os.close(told)
    state.endpoint = said.decode().strip()
    running.write_state(state)


def _ended(p: Process, how: str) -> Unavailable:
    return Unavailable(f"{p.name} ended before it was ready; it {how} (log {p.log})")


def _await(starting: Starting, keys: KeyPair | None) -> None:
    """Until every device of the cluster is on its bus. Errors: Unavailable as soon as a process has ended."""
    cluster, state = starting.cluster, starting.state
    want = sum(len(w.devices) for w in cluster.workers)
    due = time.monotonic() + START_S
    last = -1
    client: Client | None = None
    try:
        while True:
            starting.check()
            if client is None:
                with contextlib.suppress(Unavailable):
                    client = connect(state.endpoint, keys, cluster=bytes.fromhex(state.id))
            there = _there(cluster, client.devices()) if client is not None else {}
            n = sum(there.values())
            if n != last:
                print_line(f"{n} of {want} devices are there")
                last = n
            if n >= want:
                starting.check()
                return
            if time.monotonic() > due:
                late = ", ".join(w.name for w in cluster.workers if there.get(w.name, 0) < len(w.devices))
                raise Unavailable(f"{want - n} of {want} devices did not come within {START_S:.0f} s ({late}); see the logs "
                                  f"of their workers, which dial {_dialled(cluster, state)}")  # fmt: skip
            time.sleep(0.1)
    finally:
        if client is not None:
            client.close()


def _there(cluster: ClusterFile, infos: Sequence[m.ListedDevice]) -> dict[str, int]:
    """How many devices of each worker are ready; those of workers that the file does not name do not count."""
    ready = [d for d in infos if d.state == "ready"]
    out = {}
    for w in cluster.workers:
        address = f"{w.host}:{w.port}"  # one that listens may have a name of its own
        n = sum(d.address == address if w.launcher == "none" else d.worker == w.name for d in ready)
        out[w.name] = min(n, len(w.devices))
    return out


# -- ending ------------------------------------------------------------------------------------------------------------


def _undo(starting: Starting, alive: Sequence[Process]) -> None:
    """Show what the processes begun here wrote last, and end them; what ran before goes on."""
    mine = [s.process for s in starting.mine]
    for p in reversed(mine):
        tail = launch.log_tail(p)
        if tail:
            print_line(f"-- last lines of {p.name} ({p.log}):", file=sys.stderr)
            print(safe_text(tail), file=sys.stderr, flush=True)
    _end(starting.state, mine, alive)


def _end(state: ClusterState, processes: Sequence[Process], others: Sequence[Process] = ()) -> int:
    """End processes. One whose host does not answer stays in the state file, with the others.

    Returns: how many could not be ended.
    """
    left = []
    for p in reversed(processes):
        try:
            ran = launch.end(p)
            print_line(f"{'ended' if ran else 'was not running:'} {p.name}")
        except GgmqError as e:
            left.append(p)
            print_line(f"ggmq: {p.name} could not be ended: {e}; `ggmq down` again when its host answers, or, if that "
                       f"has gone for good, remove {running.state_path(state.name)}", file=sys.stderr)  # fmt: skip
    if left or others:
        running.write_state(msgspec.structs.replace(state, processes=[*others, *left[::-1]]))
    else:
        running.remove_state(state)
    return len(left)
