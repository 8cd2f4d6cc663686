"""Graphs by ggml's op names for NumPy arrays, and their way to a device."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ggmq.archs.builder import GraphBuilder, pad
from ggmq.cluster import Client
from ggmq.conversation import wrong
from protocol import limits
from protocol import messages as m
from protocol.dtypes import GGMLType, contiguous_nb
from protocol.encoding import encode_graph, graph_digest
from protocol.errors import GgmqError, GraphError
from protocol.frames import Frame
from protocol.graph import Graph as Frozen
from protocol.graph import Tensor, f32_bits
from protocol.ops import GLU_KINDS, OPS, UNARY_KINDS
from protocol.validation import validate

Array = npt.NDArray[Any]
Recipe = Callable[..., "int | Mapping[str, int]"]
"""A graph as a function: of a `Graph`, and of a tensor for each array, by its name. It returns a tensor, or several by
name."""

_TYPES: dict[np.dtype[Any], GGMLType] = {
    np.dtype(np.float32): GGMLType.F32, np.dtype(np.float16): GGMLType.F16, np.dtype(np.int8): GGMLType.I8,
    np.dtype(np.int16): GGMLType.I16, np.dtype(np.int32): GGMLType.I32,
}  # fmt: skip
_DTYPES = {type_id: dtype for dtype, type_id in _TYPES.items()} | {GGMLType.I64: np.dtype(np.int64)}
_FLAT = ("ARGMAX", "ARANGE", "SSM_SCAN")
"""Ops whose results are rows, whatever their sources are."""
_AS_SECOND = ("MUL_MAT", "OUT_PROD", "GET_ROWS")
"""Ops whose results have the dimensions of their second source."""


class Graph(GraphBuilder):
    """A graph that is being built: each method adds one op and returns its tensor, a number.

    Methods have ggml's names and shapes, `ne`, whose first number is of the dimension that NumPy has last: an array of shape
    [3, 32] is a tensor of ne (32, 3, 1, 1). Ops without a method of their own are added by `op`; docs/ops.md has them all.
    """

    def op(self, name: str, *sources: int, ne: Sequence[int] = (), type: int | None = None, **params: float) -> int:
        """An op of the table by its name, `RMS_NORM` or `SILU`.

        ne: of the result, where it is not that of the first source; type: of it; the first source's, or what the op has.
        params: its parameters by name; 0 where they are not said.
        Errors: InvalidValue for a name that there is not.
        """
        op = OPS.get(name)
        if op is None or op.view or name == "NONE" or op.writes >= 0:
            raise wrong("op", f"there is no op {name[:64]!r} that makes a tensor; docs/ops.md lists what there is")
        words = [0] * limits.MAX_OP_PARAMS
        if op.kind >= 0:
            words[0] = op.kind
        for key, value in params.items():
            if key not in op.params:
                raise wrong(key, f"{name} has no such parameter; expected one of {', '.join(op.params) or 'none'}")
            p = op.params[key]
            words[p.index] = int(value) if p.kind == "i32" else f32_bits(value)
        if not sources and not ne:
            raise wrong("ne", f"expected the shape of what {name} makes, since it has no sources")
        if type is None:
            first = self.tensors[sources[0]].type if sources else GGMLType.F32
            type = first if first in op.out else int(min(op.out))
        kind = "UNARY" if name in UNARY_KINDS else "GLU" if name in GLU_KINDS else name
        return self._node(kind, type, ne or self.ne(sources[0]), sources, words)


def run(client: Client, device: int, recipe: Recipe, arrays: Mapping[str, Any]) -> Array | dict[str, Array]:
    """The results of a graph on a device; nothing of it stays there but its plan.

    Errors: InvalidValue for arrays that do not go with it, GraphError, and what the device reports.
    """
    given = {name: _contiguous(name, value) for name, value in arrays.items()}
    graph, outputs, buffers = _built(client, recipe, given)
    named = outputs if isinstance(outputs, Mapping) else {"": outputs}
    if not named:
        raise wrong("graph", "expected a tensor, or several by name, got none")
    ranks = _ranks(graph, given)
    results = [_result(graph, x, name) for name, x in named.items()]
    whole = graph.graph(results)
    try:
        validate(whole)
    except GraphError as e:
        raise GraphError(f"graph: {e}") from None
    inputs = [given[name] for name in graph.input_names]
    computed = _computed(client, device, whole, inputs, {buffer: given[name] for name, buffer in buffers.items()})
    got = {name: _array(graph.tensors[r], raw, ranks[x])
           for (name, x), r, raw in zip(named.items(), results, computed, strict=True)}  # fmt: skip
    return got if isinstance(outputs, Mapping) else got[""]


def _contiguous(name: str, value: Any) -> Array:
    """An array as tensors have them. Errors: InvalidValue for a type or a shape that no tensor has."""
    array = np.asarray(value)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    elif array.dtype == np.int64:
        info = np.iinfo(np.int32)
        if array.size and not info.min <= array.min() <= array.max() <= info.max:
            raise wrong(name, "expected whole numbers of 32 bits, got larger ones")
        array = array.astype(np.int32)
    if array.dtype not in _TYPES:
        raise wrong(name, f"expected an array of {', '.join(map(str, _TYPES))}, got {array.dtype}")
    if not 1 <= array.ndim <= 4 or not array.size:
        raise wrong(name, f"expected 1 to 4 dimensions, none of them 0, got shape {array.shape}")
    return np.ascontiguousarray(array)


def _built(
    client: Client, recipe: Recipe, given: Mapping[str, Array]
) -> tuple[Graph, int | Mapping[str, int], dict[str, int]]:
    """The graph that a recipe makes for these arrays, its outputs, and the buffers of those that are large."""
    if not callable(recipe):
        raise wrong("graph", f"expected a function of a Graph and of its inputs, got {type(recipe).__name__}")
    try:
        inspect.signature(recipe).bind(None, **given)
    except TypeError as e:
        raise wrong("graph", f"its inputs are not the arrays that came: {e}") from None
    graph, buffers = Graph(), dict[str, int]()
    inputs = {}
    for name, array in given.items():
        ne, type_id = array.shape[::-1], _TYPES[array.dtype]
        if array.nbytes > limits.MAX_CHUNK_BYTES:
            buffers[name] = client.new_buffer()
            inputs[name] = graph.leaf(type_id, ne, buffers[name], 0)
        else:
            inputs[name] = graph.input(name, type_id, ne)
    return graph, recipe(graph, **inputs), buffers


def _ranks(graph: Graph, given: Mapping[str, Array]) -> list[int]:
    """How many dimensions each tensor has for NumPy: ggml's have four, of which the last may be 1."""
    leaves = iter(given.values())
    ranks: list[int] = []
    for t in graph.tensors:
        rank = max((i + 1 for i, n in enumerate(t.ne) if n != 1), default=1)
        sources = [ranks[s] for s in t.src if s >= 0]
        if t.op == "NONE":
            rank = next(leaves).ndim
        elif t.op in _AS_SECOND and len(sources) > 1:
            rank = max(rank, sources[1] + (t.op == "GET_ROWS"))
        elif t.op not in (*_FLAT, "RESHAPE", "VIEW"):
            rank = max(rank, *sources) if sources else rank
        ranks.append(rank)
    return ranks


def _result(graph: Graph, x: Any, name: str) -> int:
    """The tensor to send back for an output: contiguous, no leaf, and of a type that NumPy has."""
    if not isinstance(x, int) or not 0 <= x < len(graph.tensors):
        raise wrong("graph", f"expected a tensor{f' for {name}' if name else ''}, got {x!r}")
    t = graph.tensors[x]
    if t.type not in _DTYPES:
        return graph.dup(x, GGMLType.F32)
    return graph.cont(x)


def _computed(
    client: Client, device: int, graph: Frozen, inputs: Sequence[Array], large: Mapping[int, Array]
) -> Sequence[Frame]:
    """large: arrays that lie in buffers."""
    try:
        for buffer, array in large.items():
            _put(client, device, buffer, array)
        frame = encode_graph(graph)
        digest, session = graph_digest(frame), client.session
        client.request(m.GraphPut(session, digest), [frame], device)
        payload = [array.data.cast("B") for array in inputs]
        return client.request(m.GraphCompute(session, digest, len(payload)), payload, device).payload
    except BaseException:
        client.cancel()
        raise
    finally:
        for buffer in large:
            with contextlib.suppress(GgmqError):  # of a worker that is lost nothing is held
                client.request(m.FreeBuffer(client.session, buffer), device=device)


def _put(client: Client, device: int, buffer: int, array: Array) -> None:
    """An array into a buffer of its own, in chunks."""
    data = array.data.cast("B")
    ne, n = pad(array.shape[::-1]), array.nbytes
    client.request(m.AllocBuffer(client.session, buffer, n), device=device)
    asked: list[int] = []
    for at in range(0, n, limits.MAX_CHUNK_BYTES):
        header = m.SetTensor(client.session, buffer, 0, n, at, int(_TYPES[array.dtype]), ne)
        asked.append(client.submit(header, [data[at : at + limits.MAX_CHUNK_BYTES]], device))
        if len(asked) >= limits.CREDIT_CHUNKS:
            client.wait(asked.pop(0))
    for seq in asked:
        client.wait(seq)


def _array(t: Tensor, raw: Frame, rank: int) -> Array:
    assert t.nb == contiguous_nb(t.type, t.ne)  # it was made so
    return np.frombuffer(raw, _DTYPES[GGMLType(t.type)]).reshape(t.ne[:rank][::-1]).copy()
