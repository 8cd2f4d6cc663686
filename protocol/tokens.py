"""Tokens of HELLO. Sixteen bytes name a process; one of a cluster adds sixteen that only who knows its id can make.

So two clusters on one host or network find out that they are two, with the same keys or without any. The id itself never
crosses the wire, and what one role has said proves nothing in the mouth of another.
"""

from __future__ import annotations

import hashlib
import hmac

NAME_BYTES = 16
CLUSTER_ID_BYTES = 16


def token(name: bytes, role: str, cluster: bytes) -> bytes:
    """What a process of this name says in HELLO. `cluster`: the id of its cluster; empty: of none."""
    return name + _proof(name, role, cluster) if cluster else name


def belongs(said: bytes, role: str, cluster: bytes) -> bool:
    """Whether a token proves that its sender, in this role, knows this id."""
    name, proof = said[:NAME_BYTES], said[NAME_BYTES:]
    return bool(cluster) and hmac.compare_digest(proof, _proof(name, role, cluster))


def answer(said: bytes, cluster: bytes) -> bytes:
    """A broker's token for one client: its own name is for workers alone, who know it again by it."""
    return token(said[:NAME_BYTES], "answer", cluster) if cluster and of_a_cluster(said) else b""


def of_a_cluster(said: bytes) -> bool:
    """Whether a token says that its sender belongs to some cluster."""
    return len(said) > NAME_BYTES


def number(said: bytes) -> int:
    """A number for the process that said a token, which does not tell the token; 0 for none. Below 2^53, for JSON."""
    return int.from_bytes(hashlib.blake2b(said, digest_size=8, person=b"ggmq process").digest(), "big") >> 11 if said else 0


def _proof(name: bytes, role: str, cluster: bytes) -> bytes:
    return hashlib.blake2b(role.encode() + b"\0" + name, key=cluster, digest_size=16, person=b"ggmq cluster").digest()
