"""Reads again what layers had read that were loaded anew, for every sequence, into the cells where it lay.

A token's keys and values have the same bits whenever they are computed and with whom, so the stages before a lost one write
what is there already, and those behind it are not asked. Pages that are in files need not be computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence

from ggmq.archs.memory import PAGE
from ggmq.model import Model
from ggmq.names import ROOT, Content, as_bytes
from ggmq.pages import Held
from ggmq.runner import PIECE, Rows, UnderWay
from ggmq.scheduler import Sequence as Text


def read_again(model: Model, texts: Iterable[Text], empty: set[int]) -> None:
    """`empty`: the layers that have lost what was read. Nothing may be under way.

    A text whose first pages were given back, or whose layers keep states, begins again, and what nobody holds is forgotten.
    Errors: what the workers report.
    """
    store, stages = model.store, model.stages
    n_stages = 1 + max(i for i, s in enumerate(stages) if empty.intersection(s.assignment.layers))
    held = {text: text.held for text in texts if text.held is not None}
    whole = {text: h for text, h in held.items() if store.is_whole(h)}
    store.forget(but=list(whole.values()))
    for text, h in held.items():
        text.n_read = min(text.n_read, h.n_past)
    filled = set[tuple[int, int]]()
    if model.prompts is not None:
        named = {(window, page): content for text, h in whole.items() for window, page, content in _named(text, h)}
        filled = model.prompts.refill([(*at, content) for at, content in named.items()], empty)
    # several pieces under way keep several stages busy
    n_batch, sent = model.n_batch if n_stages == 1 else PIECE, deque[UnderWay]()
    for rows in _batches([r for text, h in whole.items() for r in _pages(text, h, filled)], n_batch):
        sent.append(model.runner.submit(rows, n_stages))
        if len(sent) > n_stages:
            model.runner.wait(sent.popleft())
    for under_way in sent:
        model.runner.wait(under_way)


def _named(text: Text, held: Held) -> Iterator[tuple[int, int, Content]]:
    """The full pages of a text, with what they hold, in each window."""
    for i, before in enumerate([ROOT, *held.keys][: len(held.keys)]):
        content = Content(before, as_bytes(text.tokens[PAGE * i : PAGE * (i + 1)]))
        for window, pages in held.pages.items():
            yield window, pages[i], content


def _pages(text: Text, held: Held, filled: Collection[tuple[int, int]]) -> list[Rows]:
    """What was read of a text, a page each, save those that are filled."""
    pages = {window: list(pages) for window, pages in held.pages.items()}
    return [Rows(text.tokens[at : min(at + PAGE, text.n_read)], at, pages) for at in range(0, text.n_read, PAGE)
            if not all((window, mine[at // PAGE]) in filled for window, mine in pages.items())]  # fmt: skip


def _batches(rows: Sequence[Rows], n_batch: int) -> Iterator[list[Rows]]:
    """Rows in batches of so many tokens. Each page once, though several texts have it; consecutive ones as one."""
    longest: dict[tuple[int, ...], Rows] = {}
    for r in rows:
        page = tuple(pages[r.first // PAGE] for pages in r.pages.values())
        if page not in longest or len(longest[page].tokens) < len(r.tokens):
            longest[page] = r
    batch, n = list[Rows](), 0
    for r in longest.values():
        if batch and n + len(r.tokens) > n_batch:
            yield batch
            batch, n = [], 0
        n += len(r.tokens)
        before = batch[-1] if batch else None
        if before is not None and before.pages is r.pages and before.first + len(before.tokens) == r.first:
            batch[-1] = Rows([*before.tokens, *r.tokens], before.first, r.pages)
        else:
            batch.append(r)
    if batch:
        yield batch
