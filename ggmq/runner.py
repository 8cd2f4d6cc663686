"""Batches through the stages of a loaded model.

`submit` sends one GRAPH_COMPUTE; activations pass from stage to stage by themselves, so the main host sees one round trip
a batch however many stages there are. Many batches may be under way: while one is at the second stage, the next is at the
first. That is how the pieces of a prompt and several sequences keep every stage busy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from ggmq.archs.base import Arch
from ggmq.archs.memory import PAGE, SCRAP_PAGE, SCRAP_SLOT, ZERO_SLOT, Room
from ggmq.archs.stage import Batch
from ggmq.cluster import Client
from ggmq.loader import PlacedStage
from ggmq.pages import PageCopy
from protocol import messages as m
from protocol.dtypes import GGMLType
from protocol.encoding import encode_graph, graph_digest
from protocol.errors import FormatError, HandleError
from protocol.frames import Frame

CTX_STEP = 256
MIN_PAGES = 4
TURN_S = 0.1
"""A compute of a prompt takes about so long when others wait for the same worker."""
MIN_PIECE = 16
PIECE = 64
"""Tokens of a prompt that move on together when there are several stages."""
MAX_GRAPHS = 128
MAX_COPIES = 256
"""Parts of pages that are on their way to be copied at once."""

HIDDEN, ARGMAX, ALL = -2, -1, 0
"""What is wanted behind a token: its hidden state, the id with the largest logit, all logits, or a number of candidates."""

CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32)])
"""A token that may be taken."""


class Rows(Struct, frozen=True):
    """Consecutive tokens of one sequence in a batch.

    Attributes:
        first: position of the first of them in the sequence.
        pages: the sequence's pages, by window.
        outputs: indices of those behind which something is wanted.
        want: what: HIDDEN, ARGMAX, ALL, or a number of candidates.
        slots: where the sequence's state is read from and written to.
    """

    tokens: Sequence[int] | npt.NDArray[np.int32]
    first: int
    pages: Mapping[int, Sequence[int]]
    outputs: Sequence[int] = ()
    want: int = ARGMAX
    slots: tuple[int, int] = (ZERO_SLOT, SCRAP_SLOT)


class UnderWay(NamedTuple):
    """A batch that was sent: in it, for each of its `Rows`, what is wanted and which rows of that kind are theirs.

    `is_new`: its graphs were put for it.
    """

    seq: int
    batch: Batch
    n_tokens: int
    wants: list[tuple[int, range]]
    is_new: bool = False


class Compiled(Struct, frozen=True):
    """The graphs of one batch: digest and input names, a stage each."""

    digests: tuple[bytes, ...]
    inputs: tuple[tuple[str, ...], ...]


def bucket(n: int) -> int:
    """The size that a batch of n is padded to: n itself up to 16, then eight sizes for each doubling."""
    step = 1 << max(0, n.bit_length() - 4)
    return n if n <= 16 else -(-n // step) * step


class Runner:
    """Runs batches of any sequences on the stages.

    Attributes:
        n_ctx: the longest context of a sequence, in tokens.
        activations: their type between stages, F32 or F16.
        compute_s: time that workers spent computing, summed over stages.
        tokens_per_s: what a stage has lately made of a prompt; 0 while that is not known.
    Threads: use from one.
    """

    def __init__(
        self, client: Client, arch: Arch, stages: Sequence[PlacedStage], room: Room, n_ctx: int,
        activations: GGMLType = GGMLType.F32,
    ) -> None:  # fmt: skip
        self.client, self.arch, self.stages, self.room, self.n_ctx = client, arch, stages, room, n_ctx
        self.activations = activations
        self.compute_s = self.tokens_per_s = 0.0
        self._graphs: dict[Batch, Compiled] = {}

    def forget_graphs(self) -> None:
        """The stages lie elsewhere now, or have lost their graphs."""
        self._graphs.clear()

    def piece_of_a_turn(self) -> int:
        """Tokens that take about TURN_S in a stage, a power of two, so that few graphs serve."""
        n = int(TURN_S * self.tokens_per_s)
        return max(MIN_PIECE, 1 << (n.bit_length() - 1)) if n else PIECE

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        """Copy pages on every stage, in all layers of their window. Errors: what the workers report."""
        session, asked = self.client.session, deque[int]()
        places = [(stage.assignment.device, memory, c) for stage in self.stages for memory in stage.memory.values()
                  for c in copies if memory.has_window(c.window)]  # fmt: skip
        for device, memory, c in places:
            for (source, n), (target, _) in zip(memory.page_bytes(c.source), memory.page_bytes(c.target), strict=True):
                copy = m.CopyTensor(session, memory.buffer, source, memory.buffer, target, n, n)
                asked.append(self.client.submit(copy, device=device))
                if len(asked) == MAX_COPIES:
                    self.client.wait(asked.popleft())
        for seq in asked:
            self.client.wait(seq)

    # -- batches -------------------------------------------------------------------------------------------------------

    def submit(self, parts: Sequence[Rows], n_stages: int = 0) -> UnderWay:
        """Send a batch on its way, and do not wait for it.

        n_stages: it goes through the first so many only; what comes out of the last of them is of no use. 0: all.
        Errors: FormatError for a token outside the vocabulary, or a position outside the context; HandleError when the model
            has been freed.
        """
        if not all(s.parts for s in self.stages):
            raise HandleError(f"{self.arch.gguf.path.name}: the model has been freed; load it again")
        n_vocab = self.arch.hp.n_vocab
        if not parts or not all(len(p.tokens) and all(0 <= t < n_vocab for t in p.tokens) for p in parts):
            raise FormatError(f"tokens: expected at least one, each of 0 to {n_vocab - 1}")
        last = max(p.first + len(p.tokens) for p in parts)
        if last > self.n_ctx:
            raise FormatError(f"context: {last} tokens do not fit {self.n_ctx}; use a larger -c")
        layout = _Layout(parts, self.room)
        n_ctx = -(-self.n_ctx // CTX_STEP) * CTX_STEP  # as llama.cpp counts it when it chooses between LongRoPE's factors
        batch = layout.batch(n_ctx, n_vocab, self.activations)
        is_new = batch not in self._graphs
        compiled = self._compile(batch)
        feeds: dict[str, Frame] = {}
        payloads: list[list[Frame]] = []
        for names in compiled.inputs:
            for name in names:
                if name not in feeds and name != "hidden":
                    feeds[name] = self._feed(name, layout, batch)
            payloads.append([feeds[name] for name in names if name != "hidden"])
        steps = list(zip(self.stages, compiled.digests, payloads, strict=True))[: n_stages or None]
        route = [m.RouteStep(s.assignment.device, digest, len(payload)) for s, digest, payload in steps[1:]]
        header = m.GraphCompute(self.client.session, compiled.digests[0], len(payloads[0]), route)
        frames = [f for _, _, payload in steps for f in payload]
        seq = self.client.submit(header, frames, self.stages[0].assignment.device)
        return UnderWay(seq, batch, layout.n, layout.wants, is_new)

    def wait(self, sent: UnderWay) -> list[npt.NDArray[Any]]:
        """What a batch gave, for each of its `Rows`. Errors: what the workers report.

        Shapes: int32 [n] for ARGMAX, CANDIDATE [n, at least as many as wanted], float32 [n, n_vocab] for ALL,
        float32 [n, n_embd] for HIDDEN, where n are the outputs.
        """
        reply = self.client.wait(sent.seq)
        assert isinstance(reply.header, m.ComputeDone)  # the decoder gives GRAPH_COMPUTE's reply this type
        self.compute_s += reply.header.compute_s
        if sent.n_tokens >= MIN_PIECE and reply.header.compute_s:
            self.tokens_per_s = sent.n_tokens * len(self.stages) / reply.header.compute_s
        b, raw = sent.batch, list(reply.payload)
        given: dict[int, npt.NDArray[Any]] = {}
        if b.n_argmax:
            given[ARGMAX] = np.frombuffer(raw.pop(0), np.int32)
        if b.n_top:
            candidates = given[1] = np.empty((b.n_top, b.top_k), CANDIDATE)
            candidates["id"] = np.frombuffer(raw.pop(0), np.int32).reshape(candidates.shape)
            candidates["logit"] = np.frombuffer(raw.pop(0), np.float32).reshape(candidates.shape)
        if b.n_logits:
            given[ALL] = np.frombuffer(raw.pop(0), np.float32).reshape(b.n_logits, self.arch.hp.n_vocab)
        if b.n_hidden:
            given[HIDDEN] = np.frombuffer(raw.pop(0), np.float32).reshape(b.n_hidden, self.arch.hp.n_embd)
        out = []
        for want, rows in sent.wants:
            kind = 1 if want == ARGMAX and b.n_top else min(want, 1)
            taken = given[kind][rows.start : rows.stop] if rows else np.empty(0, np.int32)
            out.append(_greedy(taken) if want == ARGMAX and kind == 1 and rows else taken)
        return out

    def _compile(self, batch: Batch) -> Compiled:
        known = self._graphs.get(batch)
        if known is not None:
            return known
        digests, inputs, pending = [], [], []
        for s in self.stages:
            graph, names = self.arch.build(s.stage, s.placed, s.memory, batch)
            frame = encode_graph(graph)
            digest = graph_digest(frame)
            put = m.GraphPut(self.client.session, digest)
            pending.append(self.client.submit(put, [frame], device=s.assignment.device))
            digests.append(digest)
            inputs.append(tuple(names))
        for seq in pending:
            self.client.wait(seq)
        while len(self._graphs) >= MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        compiled = self._graphs[batch] = Compiled(tuple(digests), tuple(inputs))
        return compiled

    def _feed(self, name: str, x: _Layout, batch: Batch) -> Frame:
        """The bytes of an input."""
        if name == "numbers":
            return np.array([number for part in batch.numbers() for number in x.part(part)], np.int32).tobytes()
        scale, length = self.arch.attn_temperature()
        return (np.log(np.floor(np.array(x.positions) / length) + 1) * scale + 1).astype(np.float32).tobytes()


def _greedy(candidates: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """The token with the largest logit of each row, of several the first, as ARGMAX takes it."""
    logits = np.where(np.isnan(candidates["logit"]), -np.inf, candidates["logit"])
    largest = logits == logits.max(1, keepdims=True)
    return np.where(largest, candidates["id"], np.iinfo(np.int32).max).min(1).astype(np.int32)


class _Layout:
    """Where the tokens of a batch stand, padded to sizes that many share. Padding sees nothing and writes to scrap."""

    def __init__(self, parts: Sequence[Rows], room: Room) -> None:
        self.parts, self.room = parts, room
        self.tokens, self.positions, self.rows = list[int](), list[int](), list[int]()
        groups: dict[int, list[int]] = {}
        self.wants, longest = [], 0
        self.top_k = max((p.want for p in parts if p.outputs), default=0)
        greedy = 1 if self.top_k > 0 else ARGMAX  # beside candidates it is one of them: fewer shapes
        for row, p in enumerate(parts):
            start, n = len(self.tokens), len(p.tokens)
            self.tokens.extend(p.tokens)
            self.positions.extend(range(p.first, p.first + n))
            self.rows += [row] * n
            longest = max(longest, p.first + n)
            known = groups.setdefault(greedy if p.want == ARGMAX else min(p.want, 1), [])
            self.wants.append((p.want, range(len(known), len(known) + len(p.outputs))))
            known += [start + i for i in p.outputs]
        self.n, self.n_seqs = len(self.tokens), bucket(len(parts))
        self.n_pages = max(MIN_PAGES, 1 << ((longest - 1) // PAGE).bit_length())
        self.n_seen = [at + 1 for at in self.positions]
        self.slots = [p.slots for p in parts] + [(ZERO_SLOT, SCRAP_SLOT)] * (self.n_seqs - len(parts))
        # with states every sequence has as many tokens, so whole sequences are added
        padding = (self.n_seqs - len(parts)) * len(parts[0].tokens) if room.has_states else bucket(self.n) - self.n
        if padding:
            for numbers in (self.tokens, self.positions, self.rows, self.n_seen):
                numbers += [0] * padding
        # rows of one kind stand together: ARGMAX, then candidates, then all logits, then hidden states
        self.counts, self.out_ids = dict.fromkeys((ARGMAX, 1, ALL, HIDDEN), 0), list[int]()
        for kind in self.counts:
            if ids := groups.get(kind):
                n = self.counts[kind] = bucket(len(ids))
                self.out_ids += ids
                self.out_ids += [min(ids[-1] + i, len(self.tokens) - 1) for i in range(1, 1 + n - len(ids))]

    def batch(self, n_ctx: int, n_vocab: int, hidden: GGMLType) -> Batch:
        n, top_k = len(self.tokens), 0
        if self.counts[1]:
            top_k = min(n_vocab, 1 << max(0, self.top_k - 1).bit_length())
        return Batch(n, self.n_seqs, self.n_pages, self.counts[ARGMAX], self.counts[1], top_k, self.counts[ALL],
                     self.counts[HIDDEN], self.out_ids == list(range(n)), self.room.windows, self.room.has_states, n_ctx,
                     hidden)  # fmt: skip

    def part(self, name: str) -> Sequence[int]:
        """Numbers of the batch by their name in the graphs."""
        name, _, window = name.partition(".")
        match name:
            case "pages":
                return self.table(int(window))
            case "cells":
                return self.cells(int(window))
            case "state_from" | "state_to":
                return [slots[name == "state_to"] for slots in self.slots]
        numbers: Sequence[int] = getattr(self, name)
        return numbers

    def table(self, window: int) -> list[int]:
        """Each sequence's pages. Shapes: [n_seqs, n_pages]."""
        out: list[int] = []
        for p in self.parts:
            pages = p.pages[window][: self.n_pages]
            out += pages
            out += [SCRAP_PAGE] * (self.n_pages - len(pages))
        return out + [SCRAP_PAGE] * (self.n_pages * (self.n_seqs - len(self.parts)))

    def cells(self, window: int) -> list[int]:
        """The cell that each token's keys and values go to."""
        cells = []
        for p in self.parts:
            pages = p.pages[window]
            cells += [PAGE * pages[at // PAGE] + at % PAGE for at in range(p.first, p.first + len(p.tokens))]
        return cells + [PAGE * SCRAP_PAGE] * (len(self.tokens) - self.n)
