"""Copies of what running texts have read, in this host's memory: a worker that is lost takes nothing with it.

Full pages are read from the devices beside what is computed. They are made where reading a text again would take longer than
a moment, and where the network carries them in passing; there is never more than a share of the memory that was free.

Threads: use from the engine's.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence

from config.memory import available_bytes
from ggmq.archs.memory import PAGE, SCRAP_PAGE
from ggmq.cluster import Client
from ggmq.loader import PlacedStage
from ggmq.names import Content
from ggmq.pagemoves import Place, Saving, Savings, ask, fill, places
from ggmq.pages import Store
from protocol.errors import Cancelled, GgmqError, HandleError, Unavailable
from protocol.frames import Frame

AGAIN_S = 0.5
"""What is read again in less than this needs no copies."""
MOST_BYTES, SHARE = 1 << 30, 8
"""All copies together, and at most one part in so many of the memory that was free when the model was loaded."""
TRIED_BYTES, TRIES, TOO_LONG_S, FAST = 1 << 16, 5, 0.1, 20e6
"""So many bytes of a device are read, again if its worker had something else to do; slower than so many a second, or so far
away, it has no copies."""
N_SAVING, N_AHEAD = 8, 4
"""Pages that are on their way here, and to devices, at once. What is asked for waits behind the batches that were sent."""


class PageCopies:
    """Of the pages of a loaded model. It has the methods of a `PromptCache` that an engine calls, and holds nothing up.

    stages: where its layers lie. tokens_per_s: how fast prompts are read; 0: not known yet.
    """

    busy = False

    def __init__(
        self, client: Client, store: Store, stages: Sequence[PlacedStage], tokens_per_s: Callable[[], float]
    ) -> None:  # fmt: skip
        self._client, self._store, self._stages, self._tokens_per_s = client, store, stages, tokens_per_s
        self._most_bytes = min(MOST_BYTES, available_bytes() // SHARE)
        self._kept: dict[tuple[int, bytes], bytes] = {}
        self._n_bytes = 0
        self._saving = Savings(client, store, stages, N_SAVING)
        self._off = True
        store.on_worth = self._is_worth

    def measure(self) -> None:
        """Learn whether the devices of all stages are near enough. Nothing may be under way."""
        tried = {p.device: p for window in self._store.room.windows for p in places(self._stages, window, SCRAP_PAGE)}
        self._off = True
        with contextlib.suppress(GgmqError):  # of a worker that was lost: what is asked next meets that too
            self._off = not all(map(self._is_near, tried.values()))

    def _is_near(self, place: Place) -> bool:
        n_bytes = min(TRIED_BYTES, place.n_bytes)
        for _ in range(TRIES):
            start = time.perf_counter()
            (seq,) = ask(self._client, [place._replace(n_bytes=n_bytes)])
            self._client.wait(seq)
            took_s = time.perf_counter() - start
            if n_bytes / took_s >= FAST:
                return True
            if took_s > TOO_LONG_S:
                break
        return False

    # -- for the engine ------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Take in copies that have come, and ask for the next. Errors: Unavailable, HandleError."""
        try:
            for s, cells in self._saving.come():
                self._keep(s, cells)
            self._saving.ask(self._goes_on, self._is_wanted)
        except (Unavailable, HandleError):
            raise
        except GgmqError:  # the text goes on without
            self._off = True

    wait = advance

    def refill(self, pages: Sequence[tuple[int, int, Content]], layers: Collection[int]) -> set[tuple[int, int]]:
        """As `PromptCache.refill`. Errors: Unavailable, HandleError."""
        done, filling = set[tuple[int, int]](), deque[list[int]]()
        for window, page, content in pages:
            cells = self._kept.get((window, content.name))
            if cells is not None:
                filling.append(fill(self._client, places(self._stages, window, page), cells, layers))
                done.add((window, page))
            while len(filling) >= N_AHEAD:
                self._arrived(filling.popleft())
        for asked in filling:
            self._arrived(asked)
        return done

    def stop(self) -> None:
        """End what is on its way. Errors: Unavailable."""
        for seq in self._saving.asked:
            with contextlib.suppress(Cancelled, HandleError):
                self._client.wait(seq)
        self.reset()

    def reset(self) -> None:
        """What was on its way is not any more."""
        self._saving.reset()

    def close(self, within_s: float = 0.0) -> None:
        """Nobody waits for anything any more. Idempotent."""
        self._saving.worth.clear()
        self._kept.clear()
        self._n_bytes = 0

    # -- inside --------------------------------------------------------------------------------------------------------

    def _is_worth(self, window: int, page: int) -> None:
        self._saving.worth[window, page] = None

    def _goes_on(self) -> bool:
        """Whether copies are of use, and there is room."""
        rate = self._tokens_per_s()
        if self._off or not rate or self._store.n_read < AGAIN_S * rate:
            return False
        if self._n_bytes >= self._most_bytes:
            self._drop()
        return self._n_bytes < self._most_bytes

    def _is_wanted(self, window: int, page: int, content: Content) -> bool:
        """Whether a text holds a page, which is full and has no copy yet."""
        return content.n == PAGE and not self._store.is_kept(window, page) and (window, content.name) not in self._kept

    def _keep(self, s: Saving, cells: Sequence[Frame]) -> None:
        self._drop()
        kept = self._kept[s.window, s.content.name] = b"".join(cells)
        self._n_bytes += len(kept)

    def _drop(self) -> None:
        """Forget what no text holds any more."""
        store = self._store
        for window, name in list(self._kept):
            page = store.names.page(window, name)
            if page is None or store.is_kept(window, page):
                self._n_bytes -= len(self._kept.pop((window, name)))

    def _arrived(self, asked: list[int]) -> None:
        for seq in asked:
            self._client.wait(seq)
