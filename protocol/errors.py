"""The errors of ggmq: a stable code each, and messages that say *where: expected X, got Y; do Z*.

A code means the same on every host and in every version. `retryable` tells that the same request may succeed later.
"""

from __future__ import annotations


class GgmqError(Exception):
    """Root of all errors that a user or a peer may see.

    Attributes:
        code: stable name of the kind of error; travels in ERROR replies.
        retryable: the same request may succeed later without a change.
    """

    code = "error"
    retryable = False


class ConfigError(GgmqError):
    """A cluster file, option or key file is wrong; the message starts with `file:line` or the option's name."""

    code = "config"


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
    code = "worker_lost"


class Overloaded(Unavailable):
    code = "overloaded"


class DeadlineExceeded(Unavailable):
    code = "deadline_exceeded"


class Cancelled(GgmqError):
    code = "cancelled"


class RemoteError(GgmqError):
    """An error of another process whose code this version does not know."""

    code = "remote"


class InternalError(GgmqError):
    """A bug of ours; the message carries what led to it."""

    code = "internal"


def _all_codes(cls: type[GgmqError]) -> dict[str, type[GgmqError]]:
    found = {cls.code: cls}
    for sub in cls.__subclasses__():
        found.update(_all_codes(sub))
    return found


BY_CODE: dict[str, type[GgmqError]] = _all_codes(GgmqError)


def from_wire(code: str, message: str) -> GgmqError:
    """The error that an ERROR reply stands for; an unknown code becomes a RemoteError that names it."""
    cls = BY_CODE.get(code)
    return cls(message) if cls is not None else RemoteError(f"{code}: {message}")
