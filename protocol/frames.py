"""Frames: `[prefix][msgpack header][payload frame]*`, after ZeroMQ's routing id.

The prefix is fixed: magic, version, command, device, epoch, seq. Headers are msgpack under explicit limits, then typed
by msgspec; payload frames are raw bytes and never pass through msgpack.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import msgpack
import msgspec

from protocol import limits
from protocol.errors import GgmqError, ProtocolError, VersionError
from protocol.messages import (
    ANSWER,
    PAYLOAD_FRAMES,
    REPLY,
    REQUEST,
    Command,
    Error,
    GraphCompute,
    HandOver,
    Header,
    Hello,
    Ok,
    StageCompute,
)

PREFIX = struct.Struct("<4sBBHIQ")
MAGIC = b"GGMQ"

Frame = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Message:
    """One message, decoded.

    Attributes:
        device: index of the device it is for or from (the broker's numbering, or the worker's own).
        epoch, seq: which life of a connection, and which message of it; a reply repeats its request's.
        payload: raw frames; bytes or memoryviews.
    """

    command: Command
    header: Header
    payload: tuple[Frame, ...] = ()
    reply: bool = False
    device: int = 0
    epoch: int = 0
    seq: int = 0

    def answer(self, header: Header, payload: Sequence[Frame] = (), command: Command | None = None) -> Message:
        """The reply to this request."""
        return Message(command or self.command, header, tuple(payload), True, self.device, self.epoch, self.seq)

    def refusal(self, error: GgmqError) -> Message:
        """The ERROR reply to this request."""
        return self.answer(Error.of(error), command=Command.ERROR)


_encoder = msgspec.msgpack.Encoder()
_decoders = {kind: msgspec.msgpack.Decoder(kind) for kind in {*REQUEST.values(), *ANSWER.values()}}


def encode(m: Message) -> list[Frame]:
    """The frames of a message, without the routing id."""
    command = int(m.command) | (REPLY if m.reply else 0)
    prefix = PREFIX.pack(MAGIC, limits.PROTOCOL_VERSION, command, m.device, m.epoch, m.seq)
    return [prefix, _encoder.encode(m.header), *m.payload]


def _refuse_ext(code: int, data: bytes) -> NoReturn:
    raise ValueError(f"ext type {code}")


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key comes twice")
    return out


def _check_depth(data: bytes) -> None:
    """Refuse nesting beyond the limit before anything is built: walks containers only, without recursion."""
    depth, left, at = 0, [1], 0
    n = len(data)
    while left:
        if left[-1] == 0:
            left.pop()
            depth -= 1
            continue
        left[-1] -= 1
        if at >= n:
            raise ValueError("header ends in the middle of a value")
        b = data[at]
        at += 1
        children, skip = 0, 0
        if b <= 0x7F or b >= 0xE0 or b in (0xC0, 0xC2, 0xC3):
            continue
        if b <= 0x8F:
            children = 2 * (b & 15)
        elif b <= 0x9F:
            children = b & 15
        elif b <= 0xBF:
            skip = b & 31
        elif b in (0xDC, 0xDE, 0xDD, 0xDF):
            width = 2 if b in (0xDC, 0xDE) else 4
            children = int.from_bytes(data[at : at + width], "big") * (2 if b >= 0xDE else 1)
            at += width
        elif b in (0xC4, 0xC5, 0xC6, 0xD9, 0xDA, 0xDB):
            width = 1 << ((b - 0xC4) if b <= 0xC6 else (b - 0xD9))
            skip = int.from_bytes(data[at : at + width], "big")
            at += width
        elif 0xCA <= b <= 0xD3:
            skip = (4, 8, 1, 2, 4, 8, 1, 2, 4, 8)[b - 0xCA]
        else:
            raise ValueError(f"byte {b:#x} is no type that a header may hold")
        at += skip
        if at > n or children > limits.MAX_HEADER_ITEMS:
            raise ValueError("a length runs past the header or the limit")
        if b <= 0x9F or 0xDC <= b <= 0xDF:
            depth += 1
            if depth > limits.MAX_HEADER_DEPTH:
                raise ValueError(f"nested deeper than {limits.MAX_HEADER_DEPTH}")
            left.append(children)
    if at != n:
        raise ValueError(f"{n - at} bytes follow the header")


def decode_header(kind: type[Header], frame: Frame) -> Header:
    """The typed header in a frame.

    Errors: ProtocolError for anything but exactly one well-formed value of this type within the limits.
    """
    if len(frame) > limits.MAX_HEADER_BYTES:
        raise ProtocolError(f"{kind.__name__} header: at most {limits.MAX_HEADER_BYTES} bytes, got {len(frame)}")
    data = bytes(frame)
    try:
        header = _decoders[kind].decode(data)
        if _encoder.encode(header) == data:
            return header  # just what our own encoder writes: nothing in it is hidden from the typed decoder
    except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError):
        pass  # the careful way finds what is wrong, and says it
    try:
        _check_depth(data)
        raw = msgpack.unpackb(
            data,
            object_pairs_hook=_unique,
            ext_hook=_refuse_ext,
            strict_map_key=True,
            max_str_len=limits.MAX_STRING_BYTES,
            max_bin_len=limits.MAX_STRING_BYTES,
            max_array_len=limits.MAX_HEADER_ITEMS,
            max_map_len=limits.MAX_HEADER_ITEMS,
            max_ext_len=0,
        )
        return msgspec.convert(raw, kind, strict=True)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as e:
        raise ProtocolError(f"{kind.__name__} header: {e or type(e).__name__}") from None


def decode(frames: Sequence[Frame]) -> Message:
    """Parse a message. Nothing of the payload is looked at beyond its frame count.

    Errors: ProtocolError; the caller answers with it where `prefix_of` can still be read, and goes on.
    """
    if not 2 <= len(frames) <= limits.MAX_FRAMES + 2:
        raise ProtocolError(f"message: expected 2 to {limits.MAX_FRAMES + 2} frames, got {len(frames)}")
    command, reply, device, epoch, seq = prefix_of(frames[0])
    kind = (ANSWER if reply else REQUEST).get(command)
    if kind is None:
        raise ProtocolError(f"message: {command.name} is not a {'reply' if reply else 'request'}")
    header = decode_header(kind, frames[1])
    payload = tuple(frames[2:])
    if not reply:
        expected = PAYLOAD_FRAMES.get(command, 0)
        if isinstance(header, GraphCompute):
            expected = header.n_payload + sum(s.n_payload for s in header.route)
        elif isinstance(header, HandOver | StageCompute):
            expected = header.n_payload
        if len(payload) != expected:
            raise ProtocolError(f"{command.name}: expected {expected} payload frames, got {len(payload)}")
    if isinstance(header, Hello) and header.version != limits.PROTOCOL_VERSION:
        raise VersionError.between(limits.PROTOCOL_VERSION, header.version, header.software)
    return Message(command, header, payload, reply, device, epoch, seq)


def refusal_of(frames: Sequence[Frame], error: GgmqError) -> Message | None:
    """The ERROR reply to frames that are no message, as far as they say which one it was. None: they are a reply."""
    reply, device, epoch, seq = False, 0, 0, 0
    with contextlib.suppress(ProtocolError, IndexError):
        _, reply, device, epoch, seq = prefix_of(frames[0])
    return None if reply else Message(Command.ERROR, Ok(), (), False, device, epoch, seq).refusal(error)


def prefix_of(frame: Frame) -> tuple[Command, bool, int, int, int]:
    """Command, whether it is a reply, device, epoch and seq.

    Errors: ProtocolError when the frame is no prefix of this version.
    """
    if len(frame) != PREFIX.size:
        raise ProtocolError(f"message: expected a prefix of {PREFIX.size} bytes, got {len(frame)}")
    magic, version, command, device, epoch, seq = PREFIX.unpack(bytes(frame))
    if magic != MAGIC:
        raise ProtocolError(f"message: expected the mark {MAGIC!r}, got {magic!r}; is the peer a ggmq of another kind?")
    if version != limits.PROTOCOL_VERSION and command & ~REPLY != Command.HELLO:
        raise VersionError.between(limits.PROTOCOL_VERSION, version)
    try:
        return Command(command & ~REPLY), bool(command & REPLY), device, epoch, seq
    except ValueError:
        raise ProtocolError(f"message: command {command & ~REPLY} is unknown") from None
