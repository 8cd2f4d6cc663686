"""What devices bind: nodes in groups, places, hazards and what is shared, worked out without memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocol.dtypes import GGMLType
from protocol.errors import HandleError
from protocol.graph import Graph, Tensor
from protocol.validation import validate
from tests.support.strategies import leaf
from workers.devices.base import Buffer
from workers.devices.lower import SCRATCH, Hazards, Scratch, Span, lower

NE = (8, 3, 1, 1)
ROW = leaf(GGMLType.F32, (8, 1, 1, 1))
NORM_SCALE = ("RMS_NORM", "MUL")


def node(op: str, *src: int, ne: tuple[int, int, int, int] = NE, params: tuple[int, ...] = ()) -> Tensor:
    return replace(leaf(GGMLType.F32, ne), op=op, src=src, params=(*params, *(0,) * (16 - len(params))))


def ops(graph: Graph, *patterns: tuple[str, ...]) -> list[tuple[str, ...]]:
    validate(graph)
    return [tuple(n.op.name for n in group) for group in lower(graph, patterns).groups]


def test_neighbours_are_together_where_nobody_else_wants_what_lies_between() -> None:
    x, w = leaf(GGMLType.F32, NE), ROW
    pair = (x, w, node("RMS_NORM", 0), node("MUL", 2, 1))
    assert ops(Graph(pair, (0, 1), (3,)), NORM_SCALE) == [NORM_SCALE]
    assert ops(Graph(pair, (0, 1), (3,))) == [("RMS_NORM",), ("MUL",)], "the device has no kernel for both"
    assert ops(Graph(pair, (0, 1), (2, 3)), NORM_SCALE) == [("RMS_NORM",), ("MUL",)], "an output"
    again = (*pair, node("ADD", 3, 2))
    assert ops(Graph(again, (0, 1), (4,)), NORM_SCALE) == [("RMS_NORM",), ("MUL",), ("ADD",)], "another reader"
    swapped = (x, w, node("RMS_NORM", 1, ne=ROW.ne), node("MUL", 0, 2))
    assert ops(Graph(swapped, (0, 1), (3,)), NORM_SCALE) == [("RMS_NORM",), ("MUL",)], "not its first source"


def test_the_longest_pattern_counts() -> None:
    graph = Graph((leaf(GGMLType.F32, NE), ROW, node("RMS_NORM", 0), node("MUL", 2, 1), node("ADD", 3, 1)), (0, 1), (4,))
    longer = (*NORM_SCALE, "ADD")
    assert ops(graph, NORM_SCALE, longer) == [longer]
    assert ops(graph, ("MUL", "ADD"), NORM_SCALE) == [NORM_SCALE, ("ADD",)]


def test_results_have_places_that_do_not_meet_while_they_live() -> None:
    graph = Graph((leaf(GGMLType.F32, NE), node("SQR", 0), node("SQRT", 1), node("SQR", 2), node("ADD", 3, 1)), (0,), (4,))
    lowered = lower(graph)
    assert {span.buffer for span in lowered.places} == {SCRATCH}
    assert not any(lowered.places[1].meets(lowered.places[i]) for i in (2, 3, 4)), "read by the last"
    assert lowered.scratch_bytes < 5 * 128 and all(span.end <= lowered.scratch_bytes for span in lowered.places)


def test_what_a_run_reads_is_not_laid_over() -> None:
    graph = Graph((leaf(GGMLType.F32, NE), *(node(op, i) for i, op in enumerate(("SQR", "SQRT", "LOG")))), (0,), (3,))
    validate(graph)
    for runs, shared in (((), True), ((("SQRT", "LOG"),), False), ((("LOG", "SQRT"),), True)):
        places = lower(graph, (), runs).places
        assert places[1].meets(places[3]) is shared


def test_leaves_that_are_read_as_weights_only() -> None:
    w = replace(leaf(GGMLType.F32, (8, 5, 1, 1)), buffer=1)
    product = node("MUL_MAT", 0, 1, ne=(5, 3, 1, 1))
    assert lower(Graph((w, leaf(GGMLType.F32, NE), product), (1,), (2,))).weights == {0}
    twice = node("MUL_MAT", 0, 0, ne=(5, 5, 1, 1))
    assert lower(Graph((w, twice), (), (1,))).weights == frozenset(), "its own columns"
    lowered = lower(Graph((w, leaf(GGMLType.F32, NE), product), (1,), (2,)))
    lowered.check({1: Buffer(160)})
    for held in ({}, {1: Buffer(159)}):
        with pytest.raises(HandleError, match="buffer"):
            lowered.check(held)


def test_steps_wait_for_what_they_depend_on_and_for_nothing_else() -> None:
    a, b, c, behind = Span(0, 0, 8), Span(0, 8, 16), Span(1, 0, 8), Span(0, 7, 9)
    hazards = Hazards()
    assert [hazards.waits([a], [b]), hazards.waits([a], [c]), hazards.waits([c], [])] == [False, False, True]
    assert not hazards.waits([b], [a]), "all have waited since these were touched"
    assert hazards.waits([behind], []) and not hazards.waits([behind], [])
    assert hazards.waits([], [b]), "what is read is not written over"
    hazards.clear()
    assert not hazards.waits([], [b]) and hazards.waits([], [behind])


def test_what_is_quantised_is_shared_and_its_place_used_again() -> None:
    w = [replace(leaf(GGMLType.Q8_0, (32, 4, 1, 1)), buffer=1, offset=136 * i) for i in range(3)]
    x = leaf(GGMLType.F32, (32, 2, 1, 1))
    products = [node("MUL_MAT", i, j, ne=(4, 2, 1, 1)) for i, j in ((0, 3), (1, 3), (2, 4))]
    scratch = Scratch(lower(Graph((*w, x, x, *products), (3, 4), (5, 6, 7))))
    start = scratch.n_bytes
    first, second, third = scratch.columns(3, 96), scratch.columns(3, 96), scratch.columns(4, 96)
    assert (first[1], second[1], third[1]) == (True, False, True)
    assert first[0] == second[0] == third[0] == Span(SCRATCH, start, start + 96)
    assert scratch.shared("angles", 100)[1] and not scratch.shared("angles", 100)[1]
    assert scratch.n_bytes == start + 128 + 128
