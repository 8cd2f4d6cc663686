"""Commands and their headers. One struct for a request, one for its reply; unknown fields and wrong types are refused.

The layout of Hello's header never changes: it is what two versions use to find out that they differ.
Units: `_bytes`, `_s` in the names; `at` and `offset` are bytes.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct, structs

from protocol import limits
from protocol.commands import REPLY as REPLY
from protocol.commands import Command as Command
from protocol.errors import GgmqError, from_wire

U64 = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Epoch = Annotated[int, Meta(ge=0, lt=1 << 32)]
"""As wide as a frame's prefix has it."""
Size = Annotated[int, Meta(ge=0, le=limits.MAX_BUFFER_BYTES)]
Handle = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
Short = Annotated[str, Meta(max_length=256)]
Digest = Annotated[bytes, Meta(min_length=16, max_length=16)]
Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Ticket = Annotated[bytes, Meta(max_length=16)]
Dim = Annotated[int, Meta(ge=0, le=limits.MAX_TENSOR_BYTES)]
Ne = tuple[Dim, Dim, Dim, Dim]
FileOffset = Annotated[int, Meta(ge=0, lt=1 << 62)]


class Header(Struct, forbid_unknown_fields=True, frozen=True):
    """Base of all headers."""


class DeviceInfo(Header, frozen=True):
    """What a device says of itself. `shares_memory` tells that devices of one `host` have one memory between them."""

    name: Short
    kind: Short
    description: Short = ""
    host: Short = ""
    total_bytes: Size = 0
    free_bytes: Size = 0
    n_threads: U64 = 0
    shares_memory: bool = False
    worker: Short = ""


class Hello(Header, frozen=True):
    """First message of every connection, both ways.

    `session`: a broker's to a client has its number; one to a worker says that some of its sessions go on there. A worker
    that dials in numbers its tries, so that the two channels of one are not taken for those of another.

    `role` is broker, worker, client, or the first two with `-bulk` for the second channel of the same `token`; peer is
    another worker, which hands over activations. A `token` names a process: a broker that says HELLO again under a new
    epoch finds its sessions as they were.
    """

    version: U64
    role: Short
    token: Annotated[bytes, Meta(max_length=32)] = b""
    epoch: Epoch = 0
    session: U64 = 0
    software: Short = ""
    devices: Annotated[list[DeviceInfo], Meta(max_length=256)] = []


class DeviceQuery(Header, frozen=True):
    """`first`: the index from which on they are wanted. With `abilities` the device that the message names is asked itself,
    and what it can run is in the answer."""

    first: U64 = 0
    abilities: bool = False


class ListedDevice(DeviceInfo, frozen=True):
    """A device as the broker knows it.

    `state`: ready; silent (its worker is there and answers nothing); lost (its worker's connection is closed); none (an
    index that no device has). `address`: where its worker listens, host:port. `n_sessions`: those that hold something
    there. `retired`: nothing new is to be placed there, and what lies there is to be moved. `process`: the same for as long
    as its worker runs, whatever becomes of brokers; 0: nobody knows. Of a device that was asked for
    its abilities: ops of the table and types of tensors that it runs fast, and others that it runs at all.
    """

    state: Short = "ready"
    address: Short = ""
    n_sessions: U64 = 0
    retired: bool = False
    process: U64 = 0
    fast_ops: Annotated[list[Short], Meta(max_length=1024)] = []
    slow_ops: Annotated[list[Short], Meta(max_length=1024)] = []
    fast_types: Annotated[list[U64], Meta(max_length=256)] = []
    slow_types: Annotated[list[U64], Meta(max_length=256)] = []


class DeviceList(Header, frozen=True):
    """Devices from the index that was asked for on, as many as fit, of `n_devices` in all."""

    devices: Annotated[list[ListedDevice], Meta(max_length=1024)] = []
    n_devices: U64 = 0


class AllocBuffer(Header, frozen=True):
    """The client names the buffer, so that it need not wait for the reply to use it.

    `content`: the name of what it will hold (`protocol.content`), where that is known. Found: a session that ended has left
    a buffer of that content, and this is it now; a new one holds zeros.
    `secret`: instead of that, what nobody else can know. Where the session ends because its broker has gone, the buffer
    stays for a while, and whoever names the same has it as it is (Found).
    """

    session: U64
    buffer: Handle
    n_bytes: Size
    content: Annotated[bytes, Meta(max_length=32)] = b""
    secret: Annotated[bytes, Meta(max_length=32)] = b""


class FreeBuffer(Header, frozen=True):
    session: U64
    buffer: Handle


class SetTensor(Header, frozen=True):
    """One chunk of a tensor of `n_bytes` that starts at `offset`; the payload goes to `offset + at`.

    With `hash` (BLAKE3 of the whole tensor) the chunks come in order, are verified at the end and may be cached.
    """

    session: U64
    buffer: Handle
    offset: Size
    n_bytes: Size
    at: Size = 0
    type: U64 = 0
    ne: Ne = (0, 1, 1, 1)
    hash: Annotated[bytes, Meta(max_length=32)] = b""


class SetTensorHash(Header, frozen=True):
    """Fill the tensor from what the worker has: its cache, or `file` in its model folder from byte `file_offset`.

    Whatever is said about the file, only bytes of this hash are taken.
    """

    session: U64
    buffer: Handle
    offset: Size
    n_bytes: Size
    hash: Hash
    type: U64
    ne: Ne
    file: Short = ""
    file_offset: FileOffset = 0


class Found(Header, frozen=True):
    """`at`, of a weight that is not there: so many of its first bytes are, and chunks may go on behind them."""

    found: bool
    at: Size = 0


class Extent(Header, frozen=True):
    """Bytes of a buffer."""

    buffer: Handle
    offset: Size
    n_bytes: Size


class GetTensor(Header, frozen=True):
    """Bytes of a buffer, and behind them those of `more` extents, in one frame."""

    session: U64
    buffer: Handle
    offset: Size
    n_bytes: Size
    more: Annotated[list[Extent], Meta(max_length=limits.MAX_EXTENTS)] = []

    @property
    def extents(self) -> list[Extent]:
        return [Extent(self.buffer, self.offset, self.n_bytes), *self.more]


class CopyTensor(Header, frozen=True):
    session: U64
    src_buffer: Handle
    src_offset: Size
    dst_buffer: Handle
    dst_offset: Size
    n_bytes: Size
    dst_n_bytes: Size


class GraphPut(Header, frozen=True):
    """The payload is the graph frame; `digest` is its blake2b-128."""

    session: U64
    digest: Digest


class RouteStep(Header, frozen=True):
    """A later stage of a GRAPH_COMPUTE: the outputs of the stage before are its first inputs."""

    device: Annotated[int, Meta(ge=0, lt=1 << 16)]
    digest: Digest
    n_payload: Annotated[int, Meta(ge=0, le=limits.MAX_FRAMES)]


class Give(Header, frozen=True):
    """Where the outputs of a graph go instead of into its reply: a link that the worker dialled, and under what name."""

    link: Handle
    ticket: Ticket


class GraphCompute(Header, frozen=True):
    """A client asks for a graph, and for those of the later stages of `route`.

    The payload holds the inputs in graph order, then those of each step of the route. The broker makes a STAGE_COMPUTE for
    each stage of it.
    """

    session: U64
    digest: Digest
    n_payload: Annotated[int, Meta(ge=0, le=limits.MAX_FRAMES)]
    route: Annotated[list[RouteStep], Meta(max_length=limits.MAX_ROUTE_STEPS)] = []


class StageCompute(Header, frozen=True):
    """A broker has a worker run one graph. The payload holds the inputs in graph order.

    `take`: the first inputs are those that another worker hands over under this ticket, and the payload holds the others.
    `give`: the outputs go on to the next worker. `spent_s` and `spent_nodes`: what earlier stages took, which the reply
    adds to its own.
    """

    session: U64
    digest: Digest
    n_payload: Annotated[int, Meta(ge=0, le=limits.MAX_FRAMES)]
    take: Ticket = b""
    give: Give | None = None
    spent_s: float = 0.0
    spent_nodes: U64 = 0


class ComputeDone(Header, frozen=True):
    """The payload holds the outputs in graph order, unless they were given to another worker."""

    compute_s: float = 0.0
    n_nodes: U64 = 0


class Link(Header, frozen=True):
    """A client asks that each of these devices hand its outputs straight to the next. Found: whether they now do."""

    session: U64
    devices: Annotated[list[Annotated[int, Meta(ge=0, lt=1 << 16)]], Meta(max_length=limits.MAX_ROUTE_STEPS + 1)]


Key = Annotated[bytes, Meta(max_length=40)]


class PeerListen(Header, frozen=True, omit_defaults=True):
    """The broker asks a worker to be reachable for others. `keys`: the public keys of those that have keys of their own;
    whose key is not named again is cut off."""

    keys: Annotated[list[Key], Meta(max_length=1024)] = []


class PeerAddress(Header, frozen=True):
    """`endpoint` empty: where the broker reaches this worker, others do. `instance` is the token of its HELLO."""

    endpoint: Short
    instance: Annotated[bytes, Meta(max_length=32)]


class PeerDial(Header, frozen=True, omit_defaults=True):
    """The broker asks a worker to connect to another, and names the link. Found: it is that instance, and answers.

    `key`: the other's public key, if it has one of its own.
    """

    link: Handle
    endpoint: Short
    instance: Annotated[bytes, Meta(max_length=32)]
    device: Annotated[int, Meta(ge=0, lt=1 << 16)]
    key: Key = b""


class HandOver(Header, frozen=True):
    """Outputs of a graph, from worker to worker, for the STAGE_COMPUTE that takes this ticket. Ok: they arrived."""

    ticket: Annotated[bytes, Meta(min_length=16, max_length=16)]
    n_payload: Annotated[int, Meta(ge=0, le=limits.MAX_FRAMES)]
    spent_s: float = 0.0
    spent_nodes: U64 = 0


class Weight(Header, frozen=True):
    """A weight by its hash, and where it lies in a GGUF file that a worker may have in its model folder; `file` may be
    empty."""

    hash: Hash
    n_bytes: Size
    file: Short = ""
    file_offset: FileOffset = 0


class FetchTensor(Header, frozen=True):
    """Fill the tensor from another worker, that of device `source`; what came of it before is not asked for again.

    `link`: what the worker calls its link to that one; a broker says it, whatever a client said. Found: it is there, and has
    the hash; otherwise `at` says how far it came, and whoever asked may ask again or send the rest.
    """

    session: U64
    buffer: Handle
    offset: Size
    type: U64
    ne: Ne
    weight: Weight
    source: Annotated[int, Meta(ge=0, lt=1 << 16)]
    link: U64 = 0


class ReadWeight(Header, frozen=True):
    """Another worker asks for the bytes of a weight from `at` on, a chunk at most. Found: the payload holds them."""

    weight: Weight
    at: Size


class HaveWeights(Header, frozen=True):
    """Which of these weights could be read from this device's worker? Nothing is read for the answer."""

    weights: Annotated[list[Weight], Meta(max_length=limits.MAX_WEIGHTS_ASKED)]


class Had(Header, frozen=True):
    """The indices of those that are there, or seem to be."""

    which: Annotated[list[Annotated[int, Meta(ge=0, lt=limits.MAX_WEIGHTS_ASKED)]],
                     Meta(max_length=limits.MAX_WEIGHTS_ASKED)] = []  # fmt: skip


class Cancel(Header, frozen=True):
    session: U64
    seq: U64


class Ping(Header, frozen=True):
    nonce: U64


class Drain(Header, frozen=True):
    """Finish what is in flight for the session, then free all that it holds."""

    session: U64


class Release(Header, frozen=True):
    """Free what ended sessions have left on a device. Found: whether there was anything."""


class Retire(Header, frozen=True):
    """A client tells the broker that all who hold something on a device are to leave it, or that it may be used again."""

    retired: bool


class StatsQuery(Header, frozen=True):
    pass


class Stats(Header, frozen=True):
    """What a device holds now, and counters since the start of its process.

    `kept_bytes`: weights that ended sessions left for the next; `free_bytes` counts them, `buffer_bytes` does not.
    `n_fallbacks`: nodes that were computed without a kernel of the device's own.
    `handed_out_bytes`: those of `wire_out_bytes` that went to workers.
    """

    device: Short = ""
    free_bytes: Size = 0
    total_bytes: Size = 0
    rss_bytes: Size = 0
    n_sessions: U64 = 0
    n_buffers: U64 = 0
    buffer_bytes: Size = 0
    kept_bytes: Size = 0
    n_graphs: U64 = 0
    n_computes: U64 = 0
    n_refused: U64 = 0
    n_fenced: U64 = 0
    payload_in_bytes: U64 = 0
    wire_in_bytes: U64 = 0
    wire_out_bytes: U64 = 0
    handed_out_bytes: U64 = 0
    cache_hits: U64 = 0
    cache_misses: U64 = 0
    cache_repairs: U64 = 0
    n_fallbacks: U64 = 0
    kernel_compiles: U64 = 0


class TraceQuery(Header, frozen=True):
    """Note when the next `n_computes` of a session come, wait and run; 0: none any more.

    With `broker` it is the broker that notes when it passed them on, not the device that the message names.
    """

    session: U64
    n_computes: Annotated[int, Meta(ge=0, le=limits.MAX_TRACED_COMPUTES)] = 0
    broker: bool = False


class Traced(Header, frozen=True):
    """The payload holds what was noted since the last question (`protocol.tracing`). `now_ns`: the clock of its times."""

    now_ns: U64


class Error(Header, frozen=True):
    """A GgmqError as it crosses the wire."""

    code: Short
    message: Annotated[str, Meta(max_length=4096)]
    retryable: bool = False
    worker: Short = ""
    device: Short = ""

    @staticmethod
    def of(error: GgmqError) -> Error:
        """A message that is too long loses its end."""
        return Error(error.code, error.message[:4096], error.retryable, error.worker[:256], error.device[:256])

    def error(self) -> GgmqError:
        """The error that this stands for."""
        return from_wire(self.code, self.message, self.retryable, self.worker, self.device)

    def at(self, worker: str, device: str) -> Error:
        """As `GgmqError.at`."""
        known = self.worker or self.device
        return self if known else structs.replace(self, worker=worker[:256], device=device[:256])


class Ok(Header, frozen=True):
    pass


REQUEST: dict[Command, type[Header]] = {
    Command.HELLO: Hello, Command.DEVICE_INFO: DeviceQuery, Command.ALLOC_BUFFER: AllocBuffer,
    Command.FREE_BUFFER: FreeBuffer, Command.SET_TENSOR: SetTensor, Command.SET_TENSOR_HASH: SetTensorHash,
    Command.GET_TENSOR: GetTensor, Command.COPY_TENSOR: CopyTensor, Command.GRAPH_PUT: GraphPut,
    Command.GRAPH_COMPUTE: GraphCompute, Command.CANCEL: Cancel, Command.PING: Ping, Command.DRAIN: Drain,
    Command.STATS: StatsQuery, Command.LINK: Link, Command.PEER_LISTEN: PeerListen, Command.PEER_DIAL: PeerDial,
    Command.HAND_OVER: HandOver, Command.RELEASE: Release, Command.STAGE_COMPUTE: StageCompute, Command.TRACE: TraceQuery,
    Command.RETIRE: Retire, Command.FETCH_TENSOR: FetchTensor, Command.READ_WEIGHT: ReadWeight,
    Command.HAVE_WEIGHTS: HaveWeights,
}  # fmt: skip
COMMAND_OF: dict[type[Header], Command] = {kind: command for command, kind in REQUEST.items()}
ANSWER: dict[Command, type[Header]] = {
    **dict.fromkeys(REQUEST, Ok), Command.HELLO: Hello, Command.DEVICE_INFO: DeviceList, Command.ALLOC_BUFFER: Found,
    Command.SET_TENSOR_HASH: Found, Command.GRAPH_COMPUTE: ComputeDone, Command.PING: Ping, Command.STATS: Stats,
    Command.ERROR: Error, Command.LINK: Found, Command.PEER_LISTEN: PeerAddress, Command.PEER_DIAL: Found,
    Command.RELEASE: Found, Command.STAGE_COMPUTE: ComputeDone, Command.TRACE: Traced,
    Command.FETCH_TENSOR: Found, Command.READ_WEIGHT: Found, Command.HAVE_WEIGHTS: Had,
}  # fmt: skip
PAYLOAD_FRAMES: dict[Command, int] = {Command.SET_TENSOR: 1, Command.GRAPH_PUT: 1}
"""Payload frames that a request carries; computes and HAND_OVER say it in their headers, every other has none."""
BULK = frozenset({Command.SET_TENSOR, Command.SET_TENSOR_HASH, Command.FETCH_TENSOR})
"""Commands that travel on the bulk channel."""
NOT_CLIENTS = frozenset({Command.PEER_LISTEN, Command.PEER_DIAL, Command.HAND_OVER, Command.STAGE_COMPUTE,
                         Command.READ_WEIGHT})  # fmt: skip
"""Requests between a broker and workers only: a client could have a worker connect anywhere, or take what
is another's."""
