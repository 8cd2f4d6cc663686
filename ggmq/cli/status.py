"""`ggmq status`: what runs of the clusters that are up, for people and as JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from config import launch, running
from config.auth import find_keys
from config.keys import KeyPair
from config.load import load_cluster
from config.running import ClusterState, Process
from config.schema import expanded
from config.terminal import print_line
from ggmq.archs import open_arch
from ggmq.cli.clusterfile import MIB, model_of_cluster, worker_order
from ggmq.cli.session import note
from ggmq.cluster import Client, connect
from ggmq.gguf import GGUF
from ggmq.placement import default_n_ctx, plan
from protocol import messages as m
from protocol.errors import GgmqError, Unavailable


def status(args: argparse.Namespace) -> int:
    """Exit code 1 when a process of a cluster does not run, or its broker does not answer."""
    if args.broker:
        with open_client(args.broker, find_keys(args.keys, args.insecure), b"") as client:
            found = [{"broker": args.broker, "devices": _devices(client, {})}]
    else:
        states = running.all_states()
        if args.cluster is not None:
            name = load_cluster(args.cluster).name
            states = [s for s in states if s.name == name]
        found = [_cluster(s) for s in states]
    if args.json:
        print(json.dumps({"clusters": found}, indent=1), flush=True)
    else:
        for c in found:
            _print(c)
        if not found:
            print("no cluster is up; start one with `ggmq up CLUSTER.yaml`")
    return 1 if any(c.get("error") or any(not p["running"] for p in c.get("processes", ())) for c in found) else 0


def _cluster(state: ClusterState) -> dict[str, Any]:
    out: dict[str, Any] = {"name": state.name, "file": state.file, "broker": state.endpoint,
                           "processes": [_process(p) for p in state.processes], "devices": [], "error": ""}  # fmt: skip
    try:
        keys = find_keys(expanded(state.keys) if state.keys else None, state.insecure)
        with open_client(state.endpoint, keys, bytes.fromhex(state.id)) as client:
            out["devices"] = _devices(client, _planned(Path(state.file), client.devices()))
    except GgmqError as e:
        out["error"] = str(e)
    return out


def _process(p: Process) -> dict[str, Any]:
    """`running` is null when its host does not answer; `error` tells why."""
    out: dict[str, Any] = {"name": p.name, "pid": p.pid, "host": p.host, "log": p.log, "running": None, "error": ""}
    try:
        out["running"] = launch.alive(p)
    except Unavailable as e:
        out["error"] = str(e)
    return out


def _planned(file: Path, infos: Sequence[m.ListedDevice]) -> dict[int, dict[str, Any]]:
    """By device, the layers that a run with this cluster's file would place there; nothing where there is no such plan."""
    with contextlib.suppress(GgmqError):
        cluster = load_cluster(file)
        arch = open_arch(GGUF(model_of_cluster(cluster, file)))
        n_ctx = default_n_ctx(arch, cluster.model.context)
        found = plan(arch, infos, arch.room(n_ctx), cluster.split.tensor_split or None, order=worker_order(cluster))
        return {a.device: {"model": arch.gguf.path.name, "first_layer": a.layers.start, "last_layer": a.layers.stop - 1}
                for a in found}  # fmt: skip
    return {}


def _devices(client: Client, planned: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    out = []
    for i, d in enumerate(client.devices()):
        if d.state == "none":
            continue
        entry: dict[str, Any] = {"device": i, "worker": d.worker, "name": d.name, "state": d.state,
                                 "retired": d.retired}  # fmt: skip
        if d.state == "ready":
            s = client.stats(i)
            entry |= {"total_bytes": d.total_bytes, "free_bytes": s.free_bytes, "buffer_bytes": s.buffer_bytes,
                      "kept_bytes": s.kept_bytes, "n_buffers": s.n_buffers, "n_sessions": s.n_sessions,
                      "n_graphs_run": s.n_computes, "n_fallbacks": s.n_fallbacks, "planned": planned.get(i)}  # fmt: skip
        out.append(entry)
    return out


@contextlib.contextmanager
def open_client(endpoint: str, keys: KeyPair | None, cluster: bytes) -> Iterator[Client]:
    """A client, until the block ends. cluster: as `connect`'s. Errors: as `connect`'s."""
    client = connect(endpoint, keys, note, cluster)
    try:
        yield client
    finally:
        client.close()


def _print(c: dict[str, Any]) -> None:
    if "name" in c:
        print_line(f"cluster {c['name']} ({c['file']}), broker {c['broker']}")
    for p in c.get("processes", ()):
        how = {True: "running", False: "NOT RUNNING"}.get(p["running"], f"not known: {p['error']}")
        print_line(f"  {p['name']}: {how}, process {p['pid']}{' on ' + p['host'] if p['host'] else ''}, log {p['log']}")
    if c.get("error"):
        print_line(f"  broker: {c['error']}")
    for d in c["devices"]:
        begin = f"  device {d['device']}: {d['worker']} {d['name']}: "
        if d["state"] != "ready":
            print_line(begin + d["state"])
            continue
        begin += "to be left, " if d["retired"] else ""
        loaded = f"{d['buffer_bytes'] // MIB} MiB loaded in {d['n_buffers']} buffers of {d['n_sessions']} sessions"
        kept = f", {d['kept_bytes'] // MIB} MiB kept for the next run" if d["kept_bytes"] else ""
        p = d["planned"]
        planned = f", planned: layers {p['first_layer']}-{p['last_layer']} of {p['model']}" if p else ""
        slow = f", {d['n_fallbacks']} nodes of them in NumPy" if d["n_fallbacks"] else ""
        print_line(f"{begin}{d['total_bytes'] // MIB} MiB, {d['free_bytes'] // MIB} MiB free, {loaded}{kept}, "
                   f"{d['n_graphs_run']} graphs run{slow}{planned}")  # fmt: skip
