"""Queues by key: bounded, in order within a key, and nobody waits behind another's crowd."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggmq.queues import SHARE, FairQueue
from protocol.errors import Overloaded


def test_who_was_served_least_is_next() -> None:
    q: FairQueue[str] = FairQueue(100)
    for i in range(5):
        q.put("a", f"a{i}")
    q.put("b", "b0")
    first = q.take()
    q.charge("a", 10)
    assert (first, q.take()) == ("a0", "b0")


def test_who_was_away_has_saved_nothing_up() -> None:
    q: FairQueue[str] = FairQueue(100)
    for i in range(20):
        q.put("a", f"a{i}")
        assert q.take() == f"a{i}"
        q.charge("a", 10)
    for i in range(4):
        q.put("a", f"a{i}")
        q.put("b", f"b{i}")
    order = []
    while q:
        order.append(q.take())
        q.charge(order[-1][0], 10)
    assert [x[0] for x in order[-6:]].count("b") == 3, order


def test_one_key_leaves_room_for_others() -> None:
    q: FairQueue[int] = FairQueue(8)
    for i in range(int(8 * SHARE)):
        q.put("a", i)
    with pytest.raises(Overloaded, match="no key may have more"):
        q.put("a", 99)
    for i in range(2):
        q.put("b", i)
    with pytest.raises(Overloaded, match="room for 8"):
        q.put("c", 0)
    assert len(q) == 8


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["put", "take", "remove"])), max_size=60))
def test_nothing_is_lost_and_each_key_keeps_its_order(steps: list[tuple[str, str]]) -> None:
    q: FairQueue[int] = FairQueue(10)
    waiting: dict[str, list[int]] = {}
    for i, (key, what) in enumerate(steps):
        if what == "put":
            try:
                q.put(key, i)
                waiting.setdefault(key, []).append(i)
            except Overloaded:
                assert len(q) == 10 or q.n_of(key) == int(10 * SHARE)
        elif what == "take" and q:
            got = q.take()
            owner = next(k for k, ids in waiting.items() if got in ids)
            assert waiting[owner].pop(0) == got
            q.charge(owner, 1)
        elif what == "remove":
            mine = waiting.get(key, [])
            assert q.remove(key, mine[-1] if mine else -1) == bool(mine)
            mine[-1:] = []
        assert sorted(q) == sorted(i for ids in waiting.values() for i in ids) and len(q) == len(list(q))
