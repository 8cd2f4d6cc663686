"""The version of this software; that of the protocol is `protocol.PROTOCOL_VERSION`."""

__version__ = "0.1.0"
