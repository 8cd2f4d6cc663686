"""Messages as nobody should send them: valid ones with any values, and what becomes of bytes on the way to nonsense."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from random import Random
from typing import Any

import msgspec

from protocol import PROTOCOL_VERSION
from protocol import messages as m
from protocol.frames import PREFIX, Message, encode
from protocol.limits import MAX_BUFFER_BYTES
from protocol.messages import REQUEST, Command

NUMBERS = (0, 1, 2, 3, 7, 8, 50, 63, 64, 127, 128, 255, 256, 1000, 4095, 65_535, 1 << 20, (1 << 31) - 1, 1 << 31,
           (1 << 32) - 1, MAX_BUFFER_BYTES - 1, MAX_BUFFER_BYTES, (1 << 62) - 1, (1 << 63) - 1)  # fmt: skip
WORDS = ("", "a", "CPU", "tcp://127.0.0.1:1", "../../etc/passwd", "ß" * 20, "\0", "x" * 250)


def header(kind: type[m.Header], rng: Random, known: Sequence[int] = (), digests: Sequence[bytes] = ()) -> m.Header:
    """A valid header with values that are often at a bound, or those of something that is there."""
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)  # headers are
    return msgspec.convert({f.encode_name: _value(f.type, rng, known, digests) for f in info.fields}, kind)


def _value(t: Any, rng: Random, known: Sequence[int], digests: Sequence[bytes]) -> Any:
    i = msgspec.inspect
    match t:
        case i.IntType():
            low = t.ge if t.ge is not None else 0
            high = t.le if t.le is not None else (t.lt or 1 << 63) - 1
            value = rng.choice(known) if known and rng.random() < 0.6 else rng.choice(NUMBERS)
            return max(low, min(high, value))
        case i.FloatType():
            return rng.choice((0.0, 1.0, -1.0, 1e300, float("inf"), float("nan")))
        case i.BoolType():
            return rng.random() < 0.5
        case i.StrType():
            return rng.choice(WORDS)
        case i.BytesType():
            low, high = t.min_length or 0, t.max_length if t.max_length is not None else 40
            fitting = [d for d in digests if low <= len(d) <= high]
            return rng.choice(fitting) if fitting and rng.random() < 0.6 else rng.randbytes(rng.choice((low, high)))
        case i.ListType():
            return [_value(t.item_type, rng, known, digests) for _ in range(rng.randrange(3))]
        case i.TupleType():
            return tuple(_value(x, rng, known, digests) for x in t.item_types)
        case i.NoneType():
            return None
        case i.UnionType():
            return _value(rng.choice(t.types), rng, known, digests)
        case i.StructType():
            return {f.encode_name: _value(f.type, rng, known, digests) for f in t.fields}
    raise AssertionError(f"no value for {t}")


def valid(
    rng: Random, commands: Sequence[Command], epoch: int, seq: int, known: Sequence[int] = (), digests: Sequence[bytes] = (),
    payloads: Sequence[bytes] = (),
) -> list[bytes]:  # fmt: skip
    """The frames of a request that the decoder takes, most of the time."""
    command = rng.choice(commands)
    said = header(REQUEST[command], rng, known, digests)
    if isinstance(said, m.Hello):
        said = msgspec.structs.replace(said, version=PROTOCOL_VERSION, devices=[])
    n = m.PAYLOAD_FRAMES.get(command, 0)
    if isinstance(said, m.GraphCompute):
        said = msgspec.structs.replace(said, n_payload=rng.randrange(3), route=said.route[:1])
        said = msgspec.structs.replace(said, route=[msgspec.structs.replace(r, n_payload=1) for r in said.route])
        n = said.n_payload + len(said.route)
    elif isinstance(said, m.StageCompute | m.HandOver):
        n = rng.randrange(3)
        said = msgspec.structs.replace(said, n_payload=n)
    payload = [rng.choice(payloads) if payloads and rng.random() < 0.5 else rng.randbytes(rng.choice((0, 1, 64, 300)))
               for _ in range(n)]  # fmt: skip
    return [bytes(f) for f in encode(Message(command, said, tuple(payload), False, rng.randrange(2), epoch, seq))]


def mutated(frames: list[bytes], rng: Random) -> list[bytes]:
    """One to three changes: a byte, a cut, noise, a frame more or less, a prefix that lies."""
    out = list(frames)
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(out))
        kind = rng.randrange(7)
        if kind == 0 and out[i]:
            changed = bytearray(out[i])
            changed[rng.randrange(len(changed))] = rng.randrange(256)
            out[i] = bytes(changed)
        elif kind == 1:
            out[i] = out[i][: rng.randrange(len(out[i]) + 1)]
        elif kind == 2:
            out[i] = rng.randbytes(rng.randrange(200))
        elif kind == 3:
            out.insert(i, rng.randbytes(rng.randrange(40)))
        elif kind == 4 and len(out) > 1:
            del out[i]
        elif kind == 5 and len(out[0]) == PREFIX.size:
            fields = list(PREFIX.unpack(out[0]))
            at = rng.choice((2, 3, 4))
            fields[at] = rng.choice((0, 1, 255, 65_535)) % (256 if at == 2 else 65_536)
            out[0] = PREFIX.pack(*fields)
        elif kind == 6:
            out[i] = out[i] + struct.pack(">I", rng.choice(NUMBERS) & 0xFFFFFFFF)
    return out
