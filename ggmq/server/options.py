"""What a server is told: whom it lets in, what it bears, and what holds where a request says nothing."""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass, field

from ggmq.sampling import SamplingParams

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Attributes:
    host: where it listens.
    keys: digests of the API keys; empty: none is asked for.
    cors_origins: pages of other origins that may ask; `*` for all.
    max_body_bytes: of a request.
    timeout_s: so long a client may take to send a request, or to take a piece of an answer.
    max_connections: open at once.
    params, n_predict, enable_thinking: where a request says nothing.
    ignore_eos: end tokens are not taken unless a request says otherwise.
    """

    host: str = "127.0.0.1"
    keys: frozenset[bytes] = frozenset()
    cors_origins: frozenset[str] = frozenset()
    max_body_bytes: int = 16 * MIB
    timeout_s: float = 30.0
    max_connections: int = 512
    params: SamplingParams = field(default_factory=SamplingParams)
    n_predict: int = -1
    enable_thinking: bool = True
    ignore_eos: bool = False

    @property
    def guarded(self) -> bool:
        """No key is asked for, and only this host reaches it: pages of other sites in a browser here must not."""
        return not self.keys and is_loopback(self.host)


def digest_of(key: str) -> bytes:
    """What is kept of an API key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this host and nothing else."""
    name = host.strip("[]").lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        return False
