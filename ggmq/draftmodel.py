"""Drafts by a small model: it guesses what the large one will say, and reads what was accepted of it.

It is a model of the same session with a memory of its own, on a device that the large one leaves free, if there is one. What
becomes of it never changes a text: where its worker is silent or lost, there are no drafts.

Threads: use from one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from ggmq.archs import open_arch
from ggmq.gguf import GGUF
from ggmq.model import Model, ModelConfig, place_model
from ggmq.pages import Held
from ggmq.runner import ARGMAX, Rows
from ggmq.speculation import SIZES, Drafter, Odds
from ggmq.tokenizer import Vocabulary
from protocol.errors import ConfigError, GgmqError, HandleError, OutOfMemory, Unavailable

GUESS = 0.6
"""How likely its tokens are right, before anything was tried."""
STEP_S = 1e-4
"""What a token of it costs, before any was made."""
RETRY = 64
"""Drafts that are done without after its worker failed, before it is asked again."""


class DraftModel:
    """A loaded model that drafts for the sequences of an engine.

    Attributes:
        step_s: what another token costs lately, in seconds.
        error: why it drafts nothing; empty while it does.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.step_s = STEP_S
        self.error = ""
        self._drafters: set[ModelDrafter] = set()
        self._n_idle = 0

    def drafter(self) -> ModelDrafter:
        """For one sequence, until it is closed."""
        drafter = ModelDrafter(self)
        self._drafters.add(drafter)
        return drafter

    def close(self, drafter: ModelDrafter) -> None:
        """A sequence has ended: what was held for it is free."""
        self._drafters.discard(drafter)
        if drafter.held is not None:
            self.model.store.release(drafter.held)
            drafter.held = None

    def free(self) -> None:
        """Give its memory back. Errors: Unavailable when a worker cannot be told."""
        self.model.free()

    def draft_all(self, wanted: list[tuple[Drafter, Sequence[int], int]]) -> list[list[int]]:
        """Drafts of several sequences, those of the model in batches."""
        out = [[] if isinstance(d, ModelDrafter) else d.draft(tokens, n) for d, tokens, n in wanted]
        mine = [(d, tokens, n, drafted) for (d, tokens, n), drafted in zip(wanted, out, strict=True)
                if isinstance(d, ModelDrafter) and n > 0]  # fmt: skip
        if not mine:
            return out
        try:
            self._draft(mine)
        except (Unavailable, HandleError) as e:
            self.error = str(e)
            self.model.note(f"no drafts of {self.model.arch.gguf.path.name}: {e}")
            self._n_idle = 0
            for _, _, _, drafted in mine:
                drafted.clear()
        for d, tokens, _, drafted in mine:
            d.try_out(len(tokens), drafted)
        return out

    def ready(self) -> bool:
        """Whether it can draft. After its worker was silent or lost it begins again a while later, there or elsewhere."""
        if self.error:
            self._n_idle += 1
            if not self._n_idle % RETRY:
                self._again()
        return not self.error

    def _again(self) -> None:
        infos = self.model.client.devices()
        if any(infos[s.assignment.device].state == "silent" for s in self.model.stages):
            return
        try:
            if not self.model.held():
                self.model.recover(Unavailable(self.error))
        except GgmqError:
            return
        self.error = ""
        if self.model.keeper.empty:
            self.model.keeper.empty.clear()
            for drafter in self._drafters:
                drafter.lose()

    def _draft(self, mine: list[tuple[ModelDrafter, Sequence[int], int, list[int]]]) -> None:
        """Read what is new of each text, then a token of each at a time."""
        parts: list[tuple[ModelDrafter, Sequence[int], list[int] | None]] = []
        for d, tokens, _, drafted in mine:
            n_read = d.catch_up(tokens)
            most = max(1, self.model.n_batch // len(mine))
            while len(tokens) - n_read > most:
                self._compute([(d, tokens[n_read : n_read + most], None)])
                n_read += most
            parts.append((d, tokens[n_read:], drafted))
        self._compute(parts)
        for i in range(1, max(n for _, _, n, _ in mine)):
            start = time.perf_counter()
            if not self._compute([(d, drafted[-1:], drafted) for d, _, n, drafted in mine if i < n and drafted]):
                self.step_s += 0.2 * (time.perf_counter() - start - self.step_s)

    def _compute(self, parts: list[tuple[ModelDrafter, Sequence[int], list[int] | None]]) -> bool:
        """A batch; what comes behind each part is put to its drafted tokens, if it has a place for them.

        Returns: whether a graph had to be put for it. Errors: OutOfMemory, and what the workers report.
        """
        rows = []
        for d, tokens, drafted in parts:
            held = d.hold()
            if self.model.store.grow(held, held.n_past + len(tokens)) is None:
                raise OutOfMemory(f"the memory of the draft model is full: {held.n_past + len(tokens)} tokens", 1, 0)
            outputs = range(len(tokens) - 1, len(tokens)) if drafted is not None else ()
            rows.append(Rows(tokens, held.n_past, held.pages, outputs, ARGMAX))
        if not rows:
            return True
        sent = self.model.runner.submit(rows)
        for (d, tokens, drafted), made in zip(parts, self.model.runner.wait(sent), strict=True):
            d.read(tokens)
            if drafted is not None:
                drafted.append(int(made[0]))
        return sent.is_new


class ModelDrafter(Drafter):
    """One sequence's drafts by a model.

    Attributes:
        held: what it holds in the model's memory.
    """

    def __init__(self, owner: DraftModel) -> None:
        super().__init__()
        self.owner = owner
        self.held: Held | None = None
        self._odds = Odds(GUESS)
        self._read: list[int] = []
        self._n_same = 0
        self._tried: tuple[int, list[int]] | None = None

    @property
    def step_s(self) -> float:  # type: ignore[override]
        return self.owner.step_s

    def follow(self, tokens: Sequence[int]) -> Odds | None:
        if self._tried is not None:
            at, drafted = self._tried
            n = next((i for i, (a, b) in enumerate(zip(drafted, tokens[at:], strict=False)) if a != b), -1)
            if n >= 0 or len(tokens) - at >= len(drafted):
                self._odds.note(n if n >= 0 else len(drafted), len(drafted))
                self._tried = None
        fits = len(tokens) + SIZES[-1] < self.owner.model.n_ctx
        return self._odds if fits and self.owner.ready() else None

    def try_out(self, at: int, drafted: list[int]) -> None:
        """These tokens were drafted for the text from there on; what comes tells how good they were."""
        self._tried = (at, list(drafted)) if drafted else None

    def begin(self) -> None:
        self._n_same, self._tried = 0, None

    def close(self) -> None:
        self.owner.close(self)

    def lose(self) -> None:
        """What was read is not there any more."""
        self._read.clear()
        self._n_same = 0
        if self.held is not None:
            self.owner.model.store.rewind(self.held, 0)

    def hold(self) -> Held:
        if self.held is None:
            self.held = self.owner.model.store.begin()
        return self.held

    def catch_up(self, tokens: Sequence[int]) -> int:
        """Forget what turned out otherwise. Returns: how many tokens of the text are read, not all of it."""
        n, most = self._n_same, min(len(self._read), len(tokens) - 1)
        while n < most and self._read[n] == tokens[n]:
            n += 1
        n = self.owner.model.store.rewind(self.hold(), min(n, most))
        del self._read[n:]
        self._n_same = n
        return n

    def read(self, tokens: Sequence[int]) -> None:
        """These were read behind what was."""
        self._read += tokens
        self.hold().n_past = len(self._read)


def load_draft(path: Path, target: Model, vocabulary: Vocabulary) -> DraftModel:
    """Load a model that drafts for another, which is loaded and has this vocabulary.

    Errors: ConfigError when it cannot draft for it; what placing and loading raise.
    """
    g = GGUF(path)
    check_same(vocabulary, Vocabulary(g))
    arch = open_arch(g)
    infos = target.client.devices()
    taken = {s.assignment.device for s in target.stages}
    usable = [i for i, d in enumerate(infos) if d.total_bytes]
    device = max((i for i in usable if infos[i].state == "ready"), default=0,
                 key=lambda i: (i not in taken, infos[i].free_bytes))  # fmt: skip
    split = [float(i == device) for i in usable]
    config = ModelConfig(path, target.n_ctx, target.n_seq, n_batch=target.n_batch, tensor_split=split)
    model = place_model(config, arch, target.client)
    if model.store.room.has_states:
        raise ConfigError(f"{path.name}: architecture {arch.hp.arch} keeps states, which cannot go back when a draft was "
                          "wrong; use another draft model")  # fmt: skip
    model.note, model.keeper.patience_s = target.note, 0.0
    model.load()
    return DraftModel(model)


def check_same(target: Vocabulary, draft: Vocabulary) -> None:
    """Errors: ConfigError that says where the vocabularies differ."""
    where = next((i for i, (a, b) in enumerate(zip(target.tokens, draft.tokens, strict=False)) if a != b), None)
    if where is not None:
        raise ConfigError(f"--spec-draft-model {draft.name}: expected the vocabulary of {target.name}; token {where} is "
                          f"{target.tokens[where]!r} there and {draft.tokens[where]!r} here")  # fmt: skip
    if len(target.tokens) != len(draft.tokens):
        raise ConfigError(f"--spec-draft-model {draft.name}: expected the vocabulary of {target.name} with "
                          f"{len(target.tokens)} tokens, got {len(draft.tokens)}")  # fmt: skip
