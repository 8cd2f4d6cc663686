"""Stop texts in a stream: the text up to the first of them, whatever pieces it comes in, and nothing shown too early."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ggmq.stops import StopTexts

short = st.text("ab", max_size=4)


@given(st.lists(short, max_size=12), st.lists(short, max_size=3))
def test_pieces_make_no_difference(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    ends = sorted((at, -len(s), s) for s in stops if s and (at := whole.find(s)) >= 0)
    watch = StopTexts(stops)
    shown = ""
    for piece in pieces:
        shown += watch.feed(piece)
        assert whole.startswith(shown)
    if not ends:
        assert not watch.found and shown + watch.finish() == whole
        return
    assert watch.found
    at = whole.find(watch.found)
    # one that ends earlier is found before one that begins earlier and is still coming
    assert shown == whole[:at] and not watch.finish()
    assert not any(s in shown for s in stops if s)


def test_the_beginning_of_one_is_held_back() -> None:
    watch = StopTexts(["</end>"])
    assert [watch.feed(x) for x in ("one <", "/e", "lse </end> two")] == ["one ", "", "</else "]
    assert watch.found == "</end>"
