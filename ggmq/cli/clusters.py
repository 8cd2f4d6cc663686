"""The commands for clusters from a YAML file, of which `ggmq plan` and `ggmq broker` are here."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config import launch, running
from config.auth import find_keys
from config.load import load_cluster
from config.memory import available_bytes, memory_bytes
from config.schema import ClusterFile
from config.terminal import print_line, safe_line, stamp_lines
from ggmq.archs import open_arch
from ggmq.cli import status, up
from ggmq.cli.clusterfile import MIB, keys_of_cluster, model_of_cluster, worker_order
from ggmq.cli.options import add_security, endpoint, endpoints
from ggmq.cluster import local_bus, own_broker
from ggmq.gguf import GGUF
from ggmq.placement import SCRATCH_BYTES, Assignment, default_n_ctx, plan
from protocol import messages as m
from protocol.errors import ConfigError


def add(commands: Any) -> None:
    for name, run, line in (("plan", _plan, "print where a cluster's layers would go"),
                            ("up", up.up, "start a cluster, or what died of one that is up"),
                            ("down", up.down, "end what `up` began")):  # fmt: skip
        p = commands.add_parser(name, help=line, description=line.capitalize() + ".")
        p.add_argument("cluster", type=Path, metavar="CLUSTER.yaml")
        p.set_defaults(run=run)
        if name == "plan":
            p.description = ("Print where a cluster's layers would go; nothing is loaded. Asks each host for its devices: "
                             "runs the file's `command` here and by ssh, and connects to workers that listen.")  # fmt: skip
            p.add_argument("--offline", action="store_true", help="run and contact nothing: take each worker's memory_mib, "
                           "for local ones without it what this host has free")  # fmt: skip
    s = commands.add_parser("status", help="workers, memory and layers of clusters",
                            description="Workers, memory and layers of the clusters that run. Exit code 1: something of "
                            "them does not.")  # fmt: skip
    s.add_argument("cluster", type=Path, nargs="?", metavar="CLUSTER.yaml", help="only this one")
    s.add_argument("--broker", type=endpoint, metavar="ENDPOINT", help="ask this broker instead")
    s.add_argument("--json", action="store_true", help="print JSON: the same, sizes in bytes")
    add_security(s)
    s.set_defaults(run=status.status)
    b = commands.add_parser("broker", help="a broker that several clients share", description="Run a broker.")
    b.add_argument("--listen", type=endpoint, default="tcp://127.0.0.1:0", metavar="ENDPOINT",
                   help="port 0: any that is free, which it prints (default %(default)s)")  # fmt: skip
    b.add_argument("--rpc", type=endpoints, default=[], metavar="HOST:PORT,...", help="workers that listen")
    b.add_argument("--tag", default="", help=argparse.SUPPRESS)
    b.add_argument("--tell-fd", type=int, help=argparse.SUPPRESS)  # where the endpoint is written once it listens
    b.add_argument("--log-timestamps", action="store_true", help="begin each line with the time")
    add_security(b)
    b.set_defaults(run=_broker)


# -- plan --------------------------------------------------------------------------------------------------------------


def _infos(cluster: ClusterFile) -> list[m.ListedDevice]:
    """The devices of a cluster that is not up, as their hosts describe them."""
    out: list[m.ListedDevice] = []
    for w in cluster.workers:
        if w.launcher == "none":
            with local_bus(keys_of_cluster(cluster)) as bus:
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
    for i, (w, order) in enumerate(zip(cluster.workers, worker_order(cluster), strict=True)):
        for device in w.devices:
            if w.memory_mib:
                total = free = w.memory_mib * MIB
            elif w.launcher == "local" and device.upper() in ("CPU", "REFERENCE"):
                total, free = memory_bytes(), available_bytes()
            else:
                raise ConfigError(f"{file}: $.workers[{i}].memory_mib: worker {w.name}: expected the MiB that {device} "
                                  "lends, since --offline asks nobody; add the key, or plan without --offline")  # fmt: skip
            host = w.host if w.launcher != "local" else os.uname().nodename
            out.append(m.ListedDevice(device, device.lower(), "", host, total, free, w.threads, not w.memory_mib, order))
    return out


def _plan(args: argparse.Namespace) -> int:
    cluster = load_cluster(args.cluster)
    infos = _infos_offline(cluster, args.cluster) if args.offline else _infos(cluster)
    arch = open_arch(GGUF(model_of_cluster(cluster, args.cluster)))
    n_ctx = default_n_ctx(arch, cluster.model.context)
    assignments = plan(arch, infos, arch.room(n_ctx), cluster.split.tensor_split or None, order=worker_order(cluster))
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


# -- broker --------------------------------------------------------------------------------------------------------------


def _broker(args: argparse.Namespace) -> int:
    if args.log_timestamps:
        stamp_lines()
    keys = find_keys(args.keys, args.insecure)
    host = args.listen.removeprefix("tcp://").rsplit(":", 1)[0]
    if keys is None and not args.insecure and not (host == "localhost" or host.startswith("127.")):
        raise ConfigError(f"--listen {args.listen}: this address can be reached from the network and there is no "
                          "cluster key; run `ggmq keys new`, or pass --insecure")  # fmt: skip
    with own_broker(args.listen, args.rpc, keys, running.own_cluster_id()) as loop:
        print_line(f"broker at {loop.endpoints[0]}, security: {'CURVE, cluster key' if keys else 'none'}")
        if args.tell_fd is not None:
            with open(args.tell_fd, "w") as f:
                print(loop.endpoints[0], file=f)
        loop.run()
    return 0
