"""`ggmq plan`, `up`, `status`, `down`, `broker`: clusters from a YAML file."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from broker.placement import SCRATCH_BYTES, Assignment
from config import launch
from config.auth import find_keys
from config.keys import KeyPair
from config.load import load_cluster
from config.schema import ClusterFile, expanded
from config.terminal import print_line, safe_line, safe_text
from ggmq.archs import open_arch
from ggmq.cli.options import BUNDLED, add_security, endpoint, endpoints, host_memory, require_file
from ggmq.cli.session import note
from ggmq.cluster import connect, local_bus, own_broker
from ggmq.gguf import GGUF
from ggmq.runner import default_n_ctx, plan
from protocol import messages as m
from protocol.errors import ConfigError, GgmqError, Unavailable

MIB = 1 << 20
START_S = 300.0


def add(commands: Any) -> None:
    for name, run, line in (("plan", _plan, "print where a cluster's layers would go"),
                            ("up", _up, "start a cluster"), ("down", _down, "end what `up` began")):  # fmt: skip
        p = commands.add_parser(name, help=line, description=line.capitalize() + ".")
        p.add_argument("cluster", type=Path, metavar="CLUSTER.yaml")
        p.set_defaults(run=run)
        if name == "plan":
            p.description = ("Print where a cluster's layers would go; nothing is loaded. Asks each host for its devices: "
                             "runs the file's `command` here and by ssh, and connects to workers that listen.")  # fmt: skip
            p.add_argument("--offline", action="store_true", help="run and contact nothing: take each worker's memory_mib, "
                           "for local ones without it what this host has free")  # fmt: skip
    s = commands.add_parser("status", help="workers, memory and layers of clusters",
                            description="Workers, memory and layers of the clusters that run.")  # fmt: skip
    s.add_argument("cluster", type=Path, nargs="?", metavar="CLUSTER.yaml", help="only this one")
    s.add_argument("--broker", type=endpoint, metavar="ENDPOINT", help="ask this broker instead")
    add_security(s)
    s.set_defaults(run=_status)
    b = commands.add_parser("broker", help="a broker that several clients share", description="Run a broker.")
    b.add_argument("--listen", type=endpoint, default="tcp://127.0.0.1:5555", metavar="ENDPOINT",
                   help="(default %(default)s)")  # fmt: skip
    b.add_argument("--rpc", type=endpoints, default=[], metavar="HOST:PORT,...", help="workers that listen")
    b.add_argument("--tag", default="", help=argparse.SUPPRESS)
    add_security(b)
    b.set_defaults(run=_broker)


def _keys(cluster: ClusterFile) -> KeyPair | None:
    named = expanded(cluster.security.keys) if cluster.security.keys else None
    return find_keys(named, cluster.security.insecure)


def _model(cluster: ClusterFile, file: Path) -> Path:
    if not cluster.model.path:
        return BUNDLED
    path = expanded(cluster.model.path)
    path = path if path.is_absolute() else file.parent / path
    return require_file(path)


def apply_cluster(args: argparse.Namespace, file: Path) -> None:
    """Let a cluster file fill in what the command line left open. Errors: ConfigError when it is not up."""
    cluster = load_cluster(file)
    if launch.read_state(launch.state_path(cluster.name)) is None:
        raise ConfigError(f"{file}: cluster {cluster.name} is not up; run `ggmq up {file}`")
    args.broker = cluster.broker.listen
    args.worker_order = _order(cluster)
    args.keys = expanded(cluster.security.keys) if cluster.security.keys else args.keys
    args.insecure = args.insecure or cluster.security.insecure
    if args.model is None and not args.hf_repo:
        args.model = _model(cluster, file)
    args.ctx_size = args.ctx_size or cluster.model.context
    args.tensor_split = args.tensor_split or cluster.split.tensor_split or None


def _order(cluster: ClusterFile) -> list[str]:
    """Names of the workers on the bus, in the file's order."""
    return [f"{w.host}:{w.port}" if w.launcher == "none" else w.name for w in cluster.workers]


# -- plan --------------------------------------------------------------------------------------------------------------


def _infos(cluster: ClusterFile) -> list[m.ListedDevice]:
    """The devices of a cluster that is not up, as their hosts describe them."""
    out: list[m.ListedDevice] = []
    for w in cluster.workers:
        if w.launcher == "none":
            with local_bus(_keys(cluster)) as bus:
                bus.add_remote(f"{w.host}:{w.port}")
                out += bus.start().devices()
            continue
        listed = {name.upper(): (total, free) for name, total, free in launch.list_devices(w)}
        for device in w.devices:
            if device.upper() not in listed:
                raise ConfigError(f"worker {w.name}: device {device} is not there; {w.host} has {', '.join(listed)}")
            total, free = listed[device.upper()]
            if w.memory_mib:
                total = free = w.memory_mib * MIB
            host = w.host if w.launcher == "ssh" else os.uname().nodename
            out.append(m.ListedDevice(device, device.lower(), "", host, total, free, w.threads, not w.memory_mib, w.name))
    return out


def _infos_offline(cluster: ClusterFile, file: Path) -> list[m.ListedDevice]:
    """The devices as the file alone has them; nothing is run and nobody is asked.

    Errors: ConfigError names the worker whose memory only its host could tell.
    """
    out: list[m.ListedDevice] = []
    for i, (w, order) in enumerate(zip(cluster.workers, _order(cluster), strict=True)):
        for device in w.devices:
            if w.memory_mib:
                total = free = w.memory_mib * MIB
            elif w.launcher == "local" and device.upper() in ("CPU", "REFERENCE"):
                total, free = host_memory()
            else:
                raise ConfigError(f"{file}: $.workers[{i}].memory_mib: worker {w.name}: expected the MiB that {device} "
                                  "lends, since --offline asks nobody; add the key, or plan without --offline")  # fmt: skip
            host = w.host if w.launcher != "local" else os.uname().nodename
            out.append(m.ListedDevice(device, device.lower(), "", host, total, free, w.threads, not w.memory_mib, order))
    return out


def _plan(args: argparse.Namespace) -> int:
    cluster = load_cluster(args.cluster)
    infos = _infos_offline(cluster, args.cluster) if args.offline else _infos(cluster)
    arch = open_arch(GGUF(_model(cluster, args.cluster)))
    n_ctx = default_n_ctx(arch, cluster.model.context)
    assignments = plan(arch, infos, n_ctx, cluster.split.tensor_split or None, order=_order(cluster))
    print_line(f"cluster {cluster.name}: {arch.gguf.path.name}, {arch.hp.n_layer} layers, context {n_ctx}")
    _print_stages(infos, assignments)
    return 0


def _print_stages(infos: Sequence[m.ListedDevice], assignments: Sequence[Assignment]) -> None:
    rows = [("stage", "device", "layers", "weights MiB", "KV MiB", "free MiB")]
    for i, a in enumerate(assignments):
        d = infos[a.device]
        ends = ("embedding, " if a.first else "") + f"{a.layers.start}-{a.layers.stop - 1}" + (", output" if a.last else "")
        where = safe_line(f"{d.worker} {d.name}")
        rows.append((str(i), where, ends, f"{a.weight_bytes / MIB:.1f}", f"{a.kv_bytes / MIB:.1f}",
                     f"{d.free_bytes / MIB:.0f}"))  # fmt: skip
    idle = [f"{d.worker} {d.name}" for i, d in enumerate(infos) if all(a.device != i for a in assignments)]
    widths = [max(len(r[c]) for r in rows) for c in range(6)]
    for r in rows:
        cells = enumerate(zip(r, widths, strict=True))
        print("  ".join(cell.ljust(w) if c < 3 else cell.rjust(w) for c, (cell, w) in cells))
    without = f"; without layers: {', '.join(idle)}" if idle else ""
    print_line(f"{SCRATCH_BYTES // MIB} MiB more on each device for scratch{without}")


# -- up, down, status --------------------------------------------------------------------------------------------------


def _up(args: argparse.Namespace) -> int:
    cluster = load_cluster(args.cluster)
    known = launch.read_state(launch.state_path(cluster.name))
    if known is not None and any(launch.alive(p) for p in known.processes):
        raise ConfigError(f"cluster {cluster.name} is up (from {known.file}); `ggmq down {args.cluster}` ends it")
    keys = _keys(cluster)
    host = cluster.broker.listen.removeprefix("tcp://").rsplit(":", 1)[0]
    if keys is None and not cluster.security.insecure and not (host == "localhost" or host.startswith("127.")):
        raise ConfigError(f"{args.cluster}: $.broker.listen: {host} can be reached from the network and there is no "
                          "cluster key; run `ggmq keys new`, or set security.insecure")  # fmt: skip
    state = launch.ClusterState(cluster.name, str(args.cluster.resolve()), cluster.broker.listen, cluster.security.keys,
                                cluster.security.insecure, [])  # fmt: skip
    try:
        _start_all(cluster, state, keys)
    except (GgmqError, KeyboardInterrupt):
        for p in reversed(state.processes):
            tail = launch.log_tail(p)
            if tail:
                print_line(f"-- last lines of {p.name} ({p.log}):", file=sys.stderr)
                print(safe_text(tail), file=sys.stderr, flush=True)
        _end_all(state)
        raise
    print_line(f"cluster {cluster.name} is up at {cluster.broker.listen}; "
          f"try: ggmq run --cluster {args.cluster} -p \"Once upon a time\"")  # fmt: skip
    return 0


def _start_all(cluster: ClusterFile, state: launch.ClusterState, keys: KeyPair | None) -> None:
    logs = launch.state_folder() / "logs" / cluster.name
    listening = [f"{w.host}:{w.port}" for w in cluster.workers if w.launcher == "none"]
    command = [sys.executable, "-m", "ggmq", "broker", "--listen", cluster.broker.listen]
    if listening:
        command += ["--rpc", ",".join(listening)]
    if cluster.security.insecure:
        command.append("--insecure")
    elif cluster.security.keys:
        command += ["--keys", str(expanded(cluster.security.keys))]

    def started(p: launch.Process) -> None:
        state.processes.append(p)
        launch.write_state(state)
        print_line(f"started {p.name} (process {p.pid}{' on ' + p.host if p.host else ''}, log {p.log})")

    tag = launch.new_tag(cluster.name)
    started(launch.start_local("broker", command, tag, logs / "broker.log"))
    for w in cluster.workers:
        if w.launcher == "none":
            continue
        for device in w.devices:
            tag, options = launch.new_tag(cluster.name), launch.worker_options(cluster, w, device)
            name = f"{w.name}/{device}"
            if w.launcher == "ssh":
                started(launch.start_ssh(name, w, options, tag))
            else:
                here = [*launch.local_command(w), *options]
                started(launch.start_local(name, here, tag, logs / f"{w.name}-{device}.log"))
    want = sum(len(w.devices) for w in cluster.workers)
    _await(cluster, state, keys, want)


def _await(cluster: ClusterFile, state: launch.ClusterState, keys: KeyPair | None, want: int) -> None:
    due = time.monotonic() + START_S
    last = -1
    client = None
    try:
        while True:
            dead = next((p for p in state.processes if not p.host and not launch.alive(p)), None)
            if dead is not None:
                raise Unavailable(f"{dead.name} ended before it was ready; see {dead.log}")
            if client is None:
                with contextlib.suppress(GgmqError):
                    client = connect(cluster.broker.listen, keys)
            n = sum(1 for d in client.devices() if d.total_bytes) if client is not None else 0
            if n != last:
                print_line(f"{n} of {want} devices are there")
                last = n
            if n >= want:
                return
            if time.monotonic() > due:
                raise Unavailable(f"{want - n} of {want} devices did not come within {START_S:.0f} s; see the logs")
            time.sleep(0.2)
    finally:
        if client is not None:
            client.close()


def _end_all(state: launch.ClusterState) -> int:
    """End every process; one whose host does not answer stays in the state file. Returns how many could not be ended."""
    left = []
    for p in reversed(state.processes):
        try:
            ran = launch.end(p)
            print_line(f"{'ended' if ran else 'was not running:'} {p.name}")
        except GgmqError as e:
            left.append(p)
            print_line(f"ggmq: {p.name} could not be ended: {e}", file=sys.stderr)
    if left:
        launch.write_state(msgspec.structs.replace(state, processes=left[::-1]))
    else:
        with contextlib.suppress(FileNotFoundError):
            launch.state_path(state.name).unlink()
    return len(left)


def _down(args: argparse.Namespace) -> int:
    cluster = load_cluster(args.cluster)
    state = launch.read_state(launch.state_path(cluster.name))
    if state is None:
        print_line(f"cluster {cluster.name} is not up")
        return 0
    return 1 if _end_all(state) else 0


def _status(args: argparse.Namespace) -> int:
    if args.broker:
        _print_broker(args.broker, find_keys(args.keys, args.insecure), None)
        return 0
    states = launch.all_states()
    if args.cluster is not None:
        name = load_cluster(args.cluster).name
        states = [s for s in states if s.name == name]
    if not states:
        print("no cluster is up; start one with `ggmq up CLUSTER.yaml`")
        return 0
    bad = 0
    for state in states:
        print_line(f"cluster {state.name} ({state.file}), broker {state.endpoint}")
        for p in state.processes:
            running = launch.alive(p)
            bad += not running
            print_line(f"  {p.name}: {'running' if running else 'NOT RUNNING'}, process {p.pid}"
                  f"{' on ' + p.host if p.host else ''}, log {p.log}")  # fmt: skip
        keys = find_keys(expanded(state.keys) if state.keys else None, state.insecure)
        try:
            _print_broker(state.endpoint, keys, Path(state.file))
        except GgmqError as e:
            bad += 1
            print_line(f"  broker: {e}")
    return 1 if bad else 0


def _print_broker(endpoint: str, keys: KeyPair | None, file: Path | None) -> None:
    client = connect(endpoint, keys, note)
    try:
        infos = client.devices()
        layers: dict[int, str] = {}
        if file is not None:
            with contextlib.suppress(GgmqError):
                cluster = load_cluster(file)
                arch = open_arch(GGUF(_model(cluster, file)))
                n_ctx = default_n_ctx(arch, cluster.model.context)
                for a in plan(arch, infos, n_ctx, cluster.split.tensor_split or None, order=_order(cluster)):
                    layers[a.device] = f", layers {a.layers.start}-{a.layers.stop - 1} of {arch.gguf.path.name}"
        for i, d in enumerate(infos):
            if d.state == "none":
                continue
            if d.state != "ready":
                print_line(f"  device {i}: {d.worker} {d.name}: {d.state}")
                continue
            s = client.stats(i)
            print_line(f"  device {i}: {d.worker} {d.name}: {d.total_bytes // MIB} MiB, {s.free_bytes // MIB} MiB free, "
                  f"{s.buffer_bytes // MIB} MiB in {s.n_buffers} buffers of {s.n_sessions} sessions, "
                  f"{s.n_computes} graphs run{layers.get(i, '')}")  # fmt: skip
    finally:
        client.close()


def _broker(args: argparse.Namespace) -> int:
    keys = find_keys(args.keys, args.insecure)
    host = args.listen.removeprefix("tcp://").rsplit(":", 1)[0]
    if keys is None and not args.insecure and not (host == "localhost" or host.startswith("127.")):
        raise ConfigError(f"--listen {args.listen}: this address can be reached from the network and there is no "
                          "cluster key; run `ggmq keys new`, or pass --insecure")  # fmt: skip
    with own_broker(args.listen, args.rpc, keys) as loop:
        print_line(f"broker at {loop.endpoints[0]}, security: {'CURVE, cluster key' if keys else 'none'}")
        loop.run()
    return 0
