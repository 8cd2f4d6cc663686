"""What crosses the wire, and nothing else: types, ops, graphs, messages, frames, limits, errors."""

from protocol.limits import PROTOCOL_VERSION

__all__ = ["PROTOCOL_VERSION"]
