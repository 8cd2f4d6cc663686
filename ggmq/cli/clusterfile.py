"""What a cluster file says to the commands that use it."""

from __future__ import annotations

import argparse
from pathlib import Path

from config import running
from config.auth import find_keys
from config.keys import KeyPair
from config.load import load_cluster
from config.schema import ClusterFile, expanded
from ggmq.cli.options import require_file
from ggmq.hub import BUNDLED
from protocol.errors import ConfigError

MIB = 1 << 20


def keys_of_cluster(cluster: ClusterFile) -> KeyPair | None:
    named = expanded(cluster.security.keys) if cluster.security.keys else None
    return find_keys(named, cluster.security.insecure)


def model_of_cluster(cluster: ClusterFile, file: Path) -> Path:
    if not cluster.model.path:
        return BUNDLED
    path = expanded(cluster.model.path)
    path = path if path.is_absolute() else file.parent / path
    return require_file(path)


def apply_cluster(args: argparse.Namespace, file: Path) -> None:
    """Let a cluster file fill in what the command line left open. Errors: ConfigError when it is not up."""
    cluster = load_cluster(file)
    state = running.read_state(running.state_path(cluster.name))
    if state is None:
        raise ConfigError(f"{file}: cluster {cluster.name} is not up; run `ggmq up {file}`")
    args.broker, args.cluster_id = state.endpoint, bytes.fromhex(state.id)
    args.worker_order = worker_order(cluster)
    args.keys = expanded(cluster.security.keys) if cluster.security.keys else args.keys
    args.insecure = args.insecure or cluster.security.insecure
    if args.model is None and not args.hf_repo:
        args.model = model_of_cluster(cluster, file)
    args.ctx_size = args.ctx_size or cluster.model.context
    args.tensor_split = args.tensor_split or cluster.split.tensor_split or None


def worker_order(cluster: ClusterFile) -> list[str]:
    """Names of the workers on the bus, in the file's order."""
    return [f"{w.host}:{w.port}" if w.launcher == "none" else w.name for w in cluster.workers]
