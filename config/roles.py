"""What each key may do on the bus, and whose key stands behind a routing id. Pure.

Whoever has the cluster's key may do all. A key of its own has one role: a worker's lends devices and hands activations over
to other workers, a client's uses devices; neither commands workers as a broker does.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from protocol import limits
from protocol.errors import ProtocolError


class Role(StrEnum):
    CLUSTER = "cluster"
    WORKER = "worker"
    CLIENT = "client"


SAYS = {Role.WORKER: ("worker", "worker-bulk", "peer"), Role.CLIENT: ("client",)}
"""As what HELLO may present the holder of a key of its own."""
MAX_CALLERS = 3 * limits.MAX_CLIENTS
DOES = {Role.WORKER: "lends devices", Role.CLIENT: "uses devices"}


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a message, as its connection proved it.

    Attributes:
        key: the public key, as Z85 text; empty where there are no keys.
        name: of a key of its own, as the list of keys has it.
    """

    key: str
    role: Role
    name: str = ""


ANYBODY = Caller("", Role.CLUSTER)
"""Who comes over a path of this host, or in a cluster without keys."""


Where = TypeVar("Where", bound=Hashable)


class Callers(Generic[Where]):
    """By which key each routing id said HELLO. A routing id is chosen by the peer, and free again when its connection is
    closed, so what it was allowed must not pass to whoever takes it next."""

    def __init__(self) -> None:
        self._known: dict[Where, Caller] = {}

    def is_another(self, where: Where, caller: Caller) -> bool:
        """Whether HELLO was said there by another key, whose connection is gone."""
        known = self._known.get(where)
        return known is not None and known.key != caller.key

    def greet(self, where: Where, caller: Caller, role: str) -> None:
        """HELLO in a role. Errors: ProtocolError when its key may not say it."""
        if caller.role is not Role.CLUSTER and role not in SAYS[caller.role]:
            raise ProtocolError(f"HELLO: the key {caller.name or caller.key[:8]} is a {caller.role}'s: it "
                                f"{DOES[caller.role]}, and may not be a {role} here; use a key for that "
                                "(`ggmq keys new NAME --role ...` on the main host)")  # fmt: skip
        self._known.pop(where, None)
        self._known[where] = caller
        if len(self._known) > MAX_CALLERS:  # of workers, which may come under as many routing ids as they like
            oldest = next((w for w, c in self._known.items() if c.role is Role.WORKER), where)
            self.forget(oldest)

    def all(self) -> dict[Where, Caller]:
        return dict(self._known)

    def forget(self, where: Where) -> None:
        self._known.pop(where, None)

    def keep(self, wheres: Collection[Where]) -> None:
        """Forget all others."""
        if len(self._known) > len(wheres) or any(w not in wheres for w in self._known):
            self._known = {w: c for w, c in self._known.items() if w in wheres}
