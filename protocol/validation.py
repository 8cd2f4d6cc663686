"""A graph held against the op table: done on both ends, before a byte of data is touched."""

from __future__ import annotations

from collections.abc import Sequence

from protocol import limits
from protocol.dtypes import TYPES, tensor_bytes
from protocol.errors import GraphError
from protocol.graph import Graph, Tensor
from protocol.ops import op_of
from protocol.rules import Sources, need


def validate(graph: Graph) -> None:
    """Hold every tensor of a graph against the table. Iterative, linear, and touches no data.

    Errors: GraphError names the first tensor that is wrong.
    """
    tensors = graph.tensors
    if len(tensors) > limits.MAX_GRAPH_TENSORS:
        raise GraphError(f"graph: at most {limits.MAX_GRAPH_TENSORS} tensors, got {len(tensors)}")
    roots: list[int] = []
    starts: list[int] = []
    for what, indices in (("input", graph.inputs), ("output", graph.outputs)):
        if len(set(indices)) != len(indices) or any(not 0 <= i < len(tensors) for i in indices):
            raise GraphError(f"graph: {what} indices {indices[:8]} repeat or point outside {len(tensors)} tensors")
    inputs = set(graph.inputs)
    scratch = 0
    for i, t in enumerate(tensors):
        _check_layout(tensors, i, roots, starts)
        try:
            _validate_node(tensors, t, i)
        except GraphError as e:
            wrong = GraphError(f"tensor {i} ({t.op}): {e}")
            wrong.tensor = i
            raise wrong from None
        if op_of(t).writes >= 0:
            target = t.src[op_of(t).writes]
            if (roots[i], starts[i], t.nb) != (roots[target], starts[target], tensors[target].nb):
                raise GraphError(f"tensor {i} ({t.op}): its bytes must be those of its target, tensor {target}")
        if t.op == "NONE" and t.view_src < 0:
            if i in inputs and t.buffer:
                raise GraphError(f"tensor {i}: an input has no buffer of its own")
            if i not in inputs and not t.buffer:
                raise GraphError(f"tensor {i}: a leaf is an input or has a buffer; this one has neither")
        elif i in inputs:
            raise GraphError(f"tensor {i}: only a leaf can be an input")
        if t.view_src < 0 and not t.buffer:
            scratch += t.extent_bytes()
            if scratch > limits.MAX_TENSOR_BYTES:
                raise GraphError(f"graph: its results need more than {limits.MAX_TENSOR_BYTES} bytes")


def _validate_node(tensors: Sequence[Tensor], t: Tensor, i: int) -> None:
    op = op_of(t)
    if t.op == "NONE":
        need(not t.src, "a leaf has no sources")
        return
    if len(t.src) > len(op.sources):
        raise GraphError(f"at most {len(op.sources)} sources, got {len(t.src)}")
    s = Sources()
    for j, source in enumerate(op.sources):
        index = t.src[j] if j < len(t.src) else -1
        if index < 0:
            need(index == -1 and source.optional, f"source {j} ({source.name}) is required, got {index}")
            s.append(None)
            continue
        need(index < i, f"source {j} is tensor {index}, which does not come before it")
        a = tensors[index]
        need(a.type in source.types, f"source {j} ({source.name}) may not be of type {a.type}")
        need(op.allow_empty or 0 not in a.ne, f"source {j} ({source.name}) is empty: {a.ne}")
        s.append(a)
    need(t.type in op.out, f"the result may not be of type {t.type}")
    need(op.allow_empty or 0 not in t.ne, f"the result is empty: {t.ne}")
    op.rule(t, s, op.values(t.params))
    if op.view:
        return
    if op.writes >= 0:
        need(t.view_src >= 0, f"writes into source {op.writes}; its view_src must say so")
    elif t.view_src >= 0:
        need(op.inplace, "cannot work in place")
    if t.view_src >= 0:
        _check_no_overlap(t, i)


def _check_layout(tensors: Sequence[Tensor], i: int, roots: list[int], starts: list[int]) -> None:
    """Type, shape, strides and extent of tensor `i`; fills in its root and the offset of its first byte in the root.

    Every corner of the extent is checked, in Python integers, which do not wrap.
    """
    t = tensors[i]
    info = TYPES.get(t.type)
    if info is None:
        raise GraphError(f"tensor {i}: type id {t.type} is not a live ggml type")
    if any(n < 0 for n in t.ne) or any(n < 0 for n in t.nb):
        raise GraphError(f"tensor {i}: ne and nb must not be negative, got ne {t.ne}, nb {t.nb}")
    if t.ne[0] % info.block:
        raise GraphError(f"tensor {i}: {info.type.name} has blocks of {info.block}, got ne[0] = {t.ne[0]}")
    if t.n_elements > limits.MAX_TENSOR_BYTES or tensor_bytes(t.type, t.ne) > limits.MAX_TENSOR_BYTES:
        raise GraphError(f"tensor {i}: ne {t.ne} is larger than {limits.MAX_TENSOR_BYTES} bytes")
    if t.view_src < 0:
        if t.view_src != -1 or t.view_offs:
            raise GraphError(f"tensor {i}: no view, but view_src {t.view_src}, view_offs {t.view_offs}")
        if not t.contiguous:
            raise GraphError(f"tensor {i}: a tensor that is no view is contiguous; got nb {t.nb} for ne {t.ne}")
        roots.append(i)
        starts.append(0)
        return
    if t.view_src >= i:
        raise GraphError(f"tensor {i}: view of tensor {t.view_src}, which does not come before it")
    if t.view_offs < 0:
        raise GraphError(f"tensor {i}: view offset {t.view_offs} is negative")
    if t.buffer:
        raise GraphError(f"tensor {i}: a view has its root's buffer and none of its own")
    root, start = roots[t.view_src], starts[t.view_src] + t.view_offs
    size = tensor_bytes(tensors[root].type, tensors[root].ne)
    bound = max(size, info.bytes)
    if 0 not in t.ne:
        if any(n > bound for n in t.nb):
            raise GraphError(f"tensor {i}: strides {t.nb} reach past its root of {size} bytes")
        if info.quantized and t.nb[0] != info.bytes:
            raise GraphError(f"tensor {i}: blocks of {info.type.name} lie {info.bytes} bytes apart, got nb[0] = {t.nb[0]}")
        if any(n % _alignment(t.type) for n in (*t.nb, start)):
            raise GraphError(f"tensor {i}: strides {t.nb} or offset {start} are not aligned to its type")
    if start + t.extent_bytes() > size:
        raise GraphError(
            f"tensor {i}: view of bytes {start}..{start + t.extent_bytes()} of a root that has {size}; "
            "its last element lies outside"
        )
    roots.append(root)
    starts.append(start)


def _alignment(type_id: int) -> int:
    info = TYPES[type_id]
    return info.bytes if not info.quantized else 1


def _check_no_overlap(t: Tensor, i: int) -> None:
    """Refuse a written view whose elements share bytes (ordered strides must not fold back)."""
    info = TYPES[t.type]
    dims = sorted(
        (nb, n) for nb, n in zip(t.nb, (t.ne[0] // info.block, *t.ne[1:]), strict=True) if n > 1
    )
    reach = info.bytes
    for nb, n in dims:
        if nb < reach:
            raise GraphError(f"tensor {i}: strides {t.nb} of ne {t.ne} make elements overlap; it cannot be written")
        reach = nb * (n - 1) + reach
