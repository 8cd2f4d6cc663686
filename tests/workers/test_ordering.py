"""Messages that overtake each other on the way have their turns in the order in which they were sent, each once."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from workers.ordering import HELD_S, MAX_HELD, Ordering

A, B = b"a", b"b"


def taken(order: Ordering[int], *seqs: int, epoch: int = 1, now_s: float = 0.0) -> list[int]:
    return [x for seq in seqs for x in order.take(A, epoch, seq, seq, now_s)]


def begun() -> Ordering[int]:
    order: Ordering[int] = Ordering()
    order.hello(A, 1, 0)
    return order


@given(st.permutations(range(1, 12)))
def test_any_order_becomes_the_one_of_the_numbers(seqs: list[int]) -> None:
    assert taken(begun(), *seqs) == list(range(1, 12))


@given(st.lists(st.integers(1, 30), max_size=60), st.data())
def test_nothing_comes_twice_that_was_held_and_nothing_is_kept_for_ever(seqs: list[int], data: st.DataObject) -> None:
    order, out, now_s, highest = begun(), list[int](), 0.0, 0
    for seq in seqs:
        now_s += data.draw(st.sampled_from([0.0, HELD_S]))
        for x in (*order.due(now_s), *order.take(A, 1, seq, seq, now_s)):
            if x > highest:  # any other is an old number, which a worker fences
                out.append(x)
                highest = x
    for _ in range(30):
        now_s += HELD_S
        out += order.due(now_s)
    assert all(a < b for a, b in pairwise(out)) and not order.due(now_s + HELD_S)
    assert max(out, default=0) == max(seqs, default=0)


def test_what_is_missing_for_too_long_is_not_waited_for_and_is_known_once_when_it_comes() -> None:
    order = begun()
    assert taken(order, 1, 3, 4, 6) == [1]
    assert order.due(HELD_S / 2) == []
    assert order.due(HELD_S) == [3, 4] and order.due(2 * HELD_S) == [6]
    assert [order.was_skipped(A, 1, seq) for seq in (2, 2, 5, 3, 7)] == [True, False, True, False, False]
    assert taken(order, 7) == [7]


def test_a_peer_holds_so_many_and_no_more() -> None:
    order = begun()
    assert taken(order, *range(2, MAX_HELD + 2)) == []
    assert taken(order, MAX_HELD + 2) == list(range(2, MAX_HELD + 3))


def test_another_epoch_begins_anew_and_its_hello_again_does_not() -> None:
    order = begun()
    assert taken(order, 2, epoch=7) == [2], "of an epoch that is not this one: for others to judge"
    assert taken(order, 2) == []
    order.hello(A, 1, 0)
    assert taken(order, 1) == [1, 2]
    order.hello(A, 2, 5)
    assert taken(order, 7, epoch=2) == [] and taken(order, 6, epoch=2) == [6, 7]
    assert order.take(B, 1, 9, 9, 0.0) == [9], "who said no HELLO has no order"
    order.keep([])
    assert taken(order, 9, epoch=2) == [9]
