"""Messages: round trips, arbitrary bytes, one field mutated, and the named threats of headers."""

from __future__ import annotations

import time

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import limits
from protocol import messages as m
from protocol.errors import ProtocolError
from protocol.frames import Message, decode, decode_header, encode
from protocol.messages import ANSWER, REQUEST, Command
from tests.support import strategies

ALLOC = m.AllocBuffer(1, 2, 3)


@given(strategies.messages())
def test_a_request_comes_back_as_it_was(message: Message) -> None:
    assert decode([bytes(f) for f in encode(message)]) == message


@pytest.mark.parametrize("command", sorted(ANSWER))
def test_every_reply_has_a_header_that_round_trips(command: Command) -> None:
    kind = ANSWER[command]

    @given(strategies.headers(kind))
    def check(header: m.Header) -> None:
        if isinstance(header, m.Hello):
            return
        message = Message(command, header, (), True)
        assert decode([bytes(f) for f in encode(message)]) == message

    check()


@given(st.lists(st.binary(max_size=200), max_size=6))
def test_arbitrary_frames_are_refused_with_a_protocol_error(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        decode(frames)


@given(strategies.messages(), st.data())
def test_one_byte_changed_is_refused_or_still_a_valid_message(message: Message, data: st.DataObject) -> None:
    frames = [bytes(f) for f in encode(message)]
    which = data.draw(st.integers(0, 1))
    at = data.draw(st.integers(0, len(frames[which]) - 1))
    changed = bytearray(frames[which])
    changed[at] ^= data.draw(st.integers(1, 255))
    frames[which] = bytes(changed)
    try:
        again = decode(frames)
    except ProtocolError:
        return
    assert decode([bytes(f) for f in encode(again)]) == again


def test_a_header_cut_at_any_byte_is_refused() -> None:
    whole = msgpack.packb({"session": 1, "buffer": 2, "n_bytes": 3, "content": b"weights"})
    decode_header(m.AllocBuffer, whole)
    for n in range(len(whole)):
        with pytest.raises(ProtocolError):
            decode_header(m.AllocBuffer, whole[:n])


THREATS = {
    "wrong type": msgpack.packb({"session": "1", "buffer": 2, "n_bytes": 3}),
    "a float for a count": msgpack.packb({"session": 1.0, "buffer": 2, "n_bytes": 3}),
    "negative": msgpack.packb({"session": 1, "buffer": 2, "n_bytes": -3}),
    "beyond 64 bits": msgpack.packb({"session": 1, "buffer": (1 << 64) - 1, "n_bytes": 3}),
    "buffer id 0": msgpack.packb({"session": 1, "buffer": 0, "n_bytes": 3}),
    "unknown field": msgpack.packb({"session": 1, "buffer": 2, "n_bytes": 3, "more": 1}),
    "missing field": msgpack.packb({"session": 1, "buffer": 2}),
    "depth bomb": b"\x91" * 60_000 + b"\xc0",
    "array of 2^32-1": b"\xdd\xff\xff\xff\xff",
    "map of 2^32-1": b"\xdf\xff\xff\xff\xff",
    "string of 2^32-1": b"\xdb\xff\xff\xff\xff",
    "bytes of 2^32-1": b"\xc6\xff\xff\xff\xff",
    "2 MB of empty lists": b"\xdd\x00\x1e\x84\x80" + b"\x90" * 2_000_000,
    "60 KB of empty lists": b"\xdc\xea\x60" + b"\x90" * 60_000,
    "trailing bytes": msgpack.packb({"session": 1, "buffer": 2, "n_bytes": 3}) + b"\xc0",
    "ext type": msgpack.packb({"session": 1, "buffer": 2, "n_bytes": msgpack.ExtType(1, b"x")}),
    "timestamp": b"\xd6\xff\x00\x00\x00\x01",
    "duplicate key": b"\x84\xa7session\x01\xa7session\x01\xa6buffer\x02\xa7n_bytes\x03",
    "a key that is no string": msgpack.packb({1: 2, "session": 1, "buffer": 2, "n_bytes": 3}),
    "not a map": msgpack.packb([1, 2, 3]),
    "broken UTF-8": b"\x83\xa7session\x01\xa6buffer\x02\xa7n_byte\xff\x03",
    "empty": b"",
    "never used byte": b"\xc1",
}


@pytest.mark.parametrize("threat", THREATS)
def test_threats_in_headers_are_refused_fast(threat: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ProtocolError):
        decode_header(m.AllocBuffer, THREATS[threat])
    # the bound of 50 ms is a promise about work done, not about this machine: a hundred times over it means a scan
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("n", [0, 2, 3])
def test_a_payload_frame_more_or_less_is_refused(n: int) -> None:
    frames = [*encode(Message(Command.SET_TENSOR, m.SetTensor(1, 1, 0, 4)))[:2], *[b"abcd"] * n]
    with pytest.raises(ProtocolError, match="payload"):
        decode(frames)


def test_another_version_is_refused_except_in_hello() -> None:
    frames = [bytearray(f) for f in encode(Message(Command.ALLOC_BUFFER, ALLOC))]
    frames[0][4] = 99
    with pytest.raises(ProtocolError, match="protocol"):
        decode([bytes(f) for f in frames])
    hello = Message(Command.HELLO, m.Hello(limits.PROTOCOL_VERSION + 1, "client"))
    with pytest.raises(ProtocolError, match="upgrade ggmq on this side"):
        decode([bytes(f) for f in encode(hello)])


def test_every_command_has_a_request_and_a_reply() -> None:
    assert set(REQUEST) == set(Command) - {Command.ERROR}
    assert set(ANSWER) == set(Command)
