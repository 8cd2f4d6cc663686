"""What a message is: the ids of commands on the wire."""

from __future__ import annotations

from enum import IntEnum

REPLY = 0x80


class Command(IntEnum):
    """Command ids; a reply carries its request's id with REPLY set."""

    HELLO = 1
    DEVICE_INFO = 2
    ALLOC_BUFFER = 3
    FREE_BUFFER = 4
    SET_TENSOR = 5
    SET_TENSOR_HASH = 6
    GET_TENSOR = 7
    COPY_TENSOR = 8
    GRAPH_PUT = 9
    GRAPH_COMPUTE = 10
    CANCEL = 11
    PING = 12
    DRAIN = 13
    STATS = 14
    ERROR = 15
    LINK = 16
    PEER_LISTEN = 17
    PEER_DIAL = 18
    HAND_OVER = 19
    RELEASE = 20
    STAGE_COMPUTE = 21
    TRACE = 22
    RETIRE = 23
    FETCH_TENSOR = 24
    READ_WEIGHT = 25
    HAVE_WEIGHTS = 26
