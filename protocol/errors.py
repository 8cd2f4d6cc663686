"""The errors of ggmq: a stable code each, and messages that say *where: expected X, got Y; do Z*.

A code means the same on every host and in every version. `retryable` tells that the same request may succeed later.
"""

from __future__ import annotations

from typing import Self


class GgmqError(Exception):
    """Root of all errors that a user or a peer may see.

    Attributes:
        code: stable name of the kind of error.
        retryable: the same request may succeed later without a change.
        worker, device: where it happened, by the names that DEVICE_INFO has; empty where it is no place.
    All four, and the message, travel in ERROR replies; `str` names the place once, before the message.
    """

    code = "error"
    retryable = False
    worker = device = ""

    @property
    def message(self) -> str:
        """What happened, without the place."""
        return str(self.args[0]) if self.args else ""

    def at(self, worker: str, device: str) -> Self:
        """Say where it happened; who knows it first knows it best."""
        if not self.worker and not self.device:
            self.worker, self.device = worker, device
        return self

    def __str__(self) -> str:
        return f"{self._place}{self.message}"

    @property
    def _place(self) -> str:
        place = " ".join(name for name in (self.worker, self.device) if name)
        return f"{place}: " if place else ""


class ConfigError(GgmqError):
    """A cluster file, option or key file is wrong; the message starts with `file:line` or the option's name."""

    code = "config"


class InvalidValue(GgmqError):
    """A field of a request, or an argument, is not what it should be; the message starts with its path.

    Attributes:
        param: the path, `messages[0].content`.
    """

    code = "invalid_value"

    def __init__(self, message: str, param: str = "") -> None:
        super().__init__(message)
        self.param = param


class FormatError(GgmqError):
    """A GGUF file breaks the format; the message gives the byte offset, what was expected and what came."""

    code = "format"


class ProtocolError(GgmqError):
    """A peer sent something that the protocol forbids. The receiver refuses it and goes on."""

    code = "protocol"


class ForeignCluster(ProtocolError):
    """The two sides belong to different clusters, or one of them to none."""

    code = "foreign_cluster"


class VersionError(ProtocolError):
    """The two sides speak different versions of the protocol."""

    code = "version"

    @classmethod
    def between(cls, ours: int, theirs: int, software: str = "") -> VersionError:
        """`software`: what the peer says that it runs."""
        named = f" ({software})" if software else ""
        older = "this side" if ours < theirs else "the peer's side"
        return cls(f"this side speaks protocol {ours}, the peer protocol {theirs}{named}; upgrade ggmq on {older}")


class GraphError(ProtocolError):
    """A graph, a node, a shape, a stride or an op parameter is not one that the op table allows.

    Attributes:
        tensor: index of the one that is wrong, or -1.
    """

    code = "graph"
    tensor = -1


class HandleError(ProtocolError):
    """A buffer, graph or session handle is unknown, freed, foreign, or used outside its extent."""

    code = "handle"


class DeviceError(GgmqError):
    """The device could not do what was asked."""

    code = "device"


class UnsupportedOp(DeviceError):
    """This device has no kernel for this node."""

    code = "unsupported_op"


class OutOfMemory(DeviceError):
    """Units: both figures are bytes."""

    code = "out_of_memory"

    def __init__(self, message: str, need_bytes: int = 0, free_bytes: int = 0) -> None:
        super().__init__(message)
        self.need_bytes, self.free_bytes = need_bytes, free_bytes


class KernelError(DeviceError):
    """A kernel refused its data (an index outside its table, for example) or failed."""

    code = "kernel"


class Unavailable(GgmqError):
    """Something that is normally there is not: try again or elsewhere."""

    code = "unavailable"
    retryable = True


class WorkerLost(Unavailable):
    """Where it names its worker, the message is the reason."""

    code = "worker_lost"

    def __str__(self) -> str:
        return f"worker {self.worker} ({self.device}) was lost: {self.message}" if self.worker else self.message


class Overloaded(Unavailable):
    code = "overloaded"


class DeadlineExceeded(Unavailable):
    code = "deadline_exceeded"


class Cancelled(GgmqError):
    code = "cancelled"


class RemoteError(GgmqError):
    """An error of another process whose code this version does not know: it keeps that code."""

    code = "remote"

    def __str__(self) -> str:
        return f"{self._place}{self.code}: {self.message}"


class InternalError(GgmqError):
    """A bug of ours; the message carries what led to it."""

    code = "internal"


def _all_codes(cls: type[GgmqError]) -> dict[str, type[GgmqError]]:
    found = {cls.code: cls}
    for sub in cls.__subclasses__():
        found.update(_all_codes(sub))
    return found


BY_CODE: dict[str, type[GgmqError]] = _all_codes(GgmqError)


def from_wire(code: str, message: str, retryable: bool, worker: str = "", device: str = "") -> GgmqError:
    """The error that an ERROR reply stands for; an unknown code becomes a RemoteError of this code."""
    error = BY_CODE.get(code, RemoteError)(message).at(worker, device)
    error.code, error.retryable = code, retryable
    return error
