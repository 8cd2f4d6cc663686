"""A model on the bus: what lies where, and what happens when a worker is lost.

`load(ModelConfig(...))` is how everyone gets one: the command line, a cluster file, a program.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ggmq.archs import open_arch
from ggmq.archs.base import Arch
from ggmq.archs.memory import Room
from ggmq.bus import BusConfig, open_bus, settled, with_room
from ggmq.cluster import Client
from ggmq.gguf import GGUF
from ggmq.keeping import PATIENCE_S, Keeper
from ggmq.loader import Loader, LoadReport, PlacedStage, Progress
from ggmq.manifest import tensor_hashes
from ggmq.pagecopies import PageCopies
from ggmq.pagefiles import PageFiles
from ggmq.pages import Held, Store
from ggmq.placement import Assignment, default_n_ctx, plan
from ggmq.promptcache import DEFAULT_BYTES, PromptCache, identity
from ggmq.runner import ALL, ARGMAX, Rows, Runner
from protocol import messages as m
from protocol.dtypes import GGMLType
from protocol.errors import DeadlineExceeded, FormatError, GgmqError, HandleError, OutOfMemory, Unavailable

MAX_TRIES = 3
"""So often in a row something is tried again that a lost worker had ended."""
LINKED_S = 0.5
"""When the weights are there, links are waited for so long."""
DRAIN_S = 0.5


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What to load, and how.

    Attributes:
        path: the GGUF file.
        ctx_size: context of a sequence in tokens; 0: the model's, at most 4096.
        n_seq: sequences that run at once, at most.
        n_tokens: tokens of all sequences together that the KV cache has room for, at least one whole context; where it is
            short the youngest wait. 0: a whole context for each.
        n_batch: tokens of prompts that are read at once, at most.
        tensor_split: shares of the layers, a device each; None: by free memory.
        ngl: layers on the lent devices, the first others stay on this host; None: all.
        activations: what crosses from stage to stage, F32 or F16.
        cache_type_k, cache_type_v: type of the KV cache, F16 or Q8_0.
        patience_s: for so long lost workers, or a broker that has gone, are waited for where nobody takes their place;
            None: PATIENCE_S, and a minute where requests of many wait.
        prompt_cache: folder in which what was read of prompts stays over a restart; None: it does not.
        prompt_cache_bytes: what the folder may hold, with what other models have there.
        bus: the devices.
    """

    path: Path
    ctx_size: int = 0
    n_seq: int = 1
    n_tokens: int = 0
    n_batch: int = 512
    tensor_split: Sequence[float] | None = None
    ngl: int | None = None
    activations: GGMLType = GGMLType.F32
    cache_type_k: GGMLType = GGMLType.F16
    cache_type_v: GGMLType = GGMLType.F16
    patience_s: float | None = None
    prompt_cache: Path | None = None
    prompt_cache_bytes: int = DEFAULT_BYTES
    bus: BusConfig = field(default_factory=BusConfig)


@contextlib.contextmanager
def load(
    config: ModelConfig, progress: Callable[[], AbstractContextManager[Progress | None]] = contextlib.nullcontext,
    note: Callable[[str], None] = lambda text: None, file: GGUF | None = None,
) -> Iterator[Model]:  # fmt: skip
    """Bring up the bus that a config describes, and load the model. Everything ends with the block.

    file: the config's, where it has been read already.
    progress: gives what is told how far loading is, while it lasts; note: told what a user should know while something is
    waited for.
    Errors: FormatError, ConfigError, OutOfMemory, and what the workers report.
    """
    start = time.perf_counter()
    g = file or GGUF(config.path)
    arch = open_arch(g)
    with open_bus(config.bus, arch.hp.n_layer, g.path.absolute(), config.ngl, note) as bus:
        client = bus.client
        client.note = note
        model = place_model(config, arch, client, bus.order, bus.host, note)
        model.keeper.revive = bus.revive
        try:
            with progress() as show:
                model.load(show)
            model.ready_s = time.perf_counter() - start
            yield model
        finally:
            with contextlib.suppress(GgmqError):  # whoever cannot be told now hears it from the broker
                client.drain(DRAIN_S)


def place_model(
    config: ModelConfig, arch: Arch, client: Client, order: Sequence[str] = (), host: str = "",
    note: Callable[[str], None] = lambda text: None,
) -> Model:  # fmt: skip
    """A model on the devices of a bus that is there; nothing is loaded yet. Several may share one client.

    order: names of the workers as devices are to be taken; host: the one that keeps the layers that `ngl` leaves.
    Errors: OutOfMemory, ConfigError.
    """
    n_ctx = default_n_ctx(arch, config.ctx_size)
    room = arch.room(n_ctx, config.n_seq, config.n_batch, config.cache_type_k, config.cache_type_v,
                     config.n_tokens)  # fmt: skip
    infos = settled(client, note)
    placed = partial(plan, arch, room=room, split=config.tensor_split, ngl=config.ngl, host=host, order=order)
    try:
        assignments = placed(infos)
    except OutOfMemory:  # workers of one host do not know what the others keep of runs that ended
        if not client.release():
            raise
        infos = with_room(client, infos)
        assignments = placed(infos)
    model = Model(client, arch, n_ctx, room, assignments, config.activations, config.n_batch, config.n_seq)
    keeper = model.keeper
    keeper.infos, keeper.plan, keeper.note, keeper.patience_s = infos, placed, note, config.patience_s or PATIENCE_S
    if config.prompt_cache is not None and room.has_states:
        note(f"--prompt-cache: {arch.gguf.path.name} keeps states, of which no part can be kept; prompts are read anew")
    elif config.prompt_cache is not None:
        model.keep_prompts = config.prompt_cache, config.prompt_cache_bytes
    return model


class Model:
    """A model on the devices of a bus.

    Attributes:
        n_ctx: the longest context of a sequence, in tokens.
        n_batch: tokens of prompts that there is room for at once.
        n_seq: sequences that run at once, at most.
        stages: what lies where.
        store: who holds which pages of its memory.
        direct: activations go from worker to worker; otherwise they pass through the broker.
        infos: the devices as they were when layers were last placed.
        load_s: how long it took to be loaded, in seconds; ready_s: with all that came before, the bus among it.
        keeper: keeps the layers on devices that are ready.
        keep_prompts: folder in which pages are to be kept, and bytes that it may have; prompts: the pages there,
            or copies of those that running texts hold.
    Threads: use from one.
    """

    def __init__(
        self, client: Client, arch: Arch, n_ctx: int, room: Room, assignments: Sequence[Assignment],
        activations: GGMLType = GGMLType.F32, n_batch: int = 512, n_seq: int = 1,
    ) -> None:  # fmt: skip
        self.client, self.arch, self.n_ctx, self.n_batch, self.n_seq = client, arch, n_ctx, n_batch, n_seq
        self.store = Store(room)
        self._loader = Loader(client, arch, room)
        self.stages = [PlacedStage(a) for a in assignments]
        self.keeper = Keeper(client, arch, self._loader, self.stages, self.store, room, activations)
        self.runner = Runner(client, arch, self.stages, room, n_ctx, activations)
        self.direct = False
        self._linking = 0
        self.load_s = self.ready_s = 0.0
        self.keep_prompts: tuple[Path, int] | None = None
        self.prompts: PromptCache | PageCopies | None = None
        self._own: Held | None = None

    @property
    def report(self) -> LoadReport:
        return self._loader.report

    @property
    def infos(self) -> list[m.ListedDevice]:
        return self.keeper.infos

    @property
    def note(self) -> Callable[[str], None]:
        """Told what a user should know while something is waited for."""
        return self.keeper.note

    @note.setter
    def note(self, told: Callable[[str], None]) -> None:
        self.keeper.note = told

    # -- loading -------------------------------------------------------------------------------------------------------

    def load(self, progress: Progress | None = None) -> LoadReport:
        """Allocate on every stage's device and fill: what a worker has by hash is not sent. Goes on when a worker was silent
        for a while.

        Errors: what the workers report.
        """
        start = time.perf_counter()
        for n_left in reversed(range(MAX_TRIES)):
            try:
                self._load(progress)
                break
            except OutOfMemory:  # another worker of the same host may keep what nobody uses
                self.client.settle()
                self.free()
                if not n_left or not self.client.release():
                    raise
            except (Unavailable, HandleError) as e:  # a device that was forgotten has no number any more
                if not n_left:
                    raise
                self.recover(e if isinstance(e, Unavailable) else Unavailable(str(e)))
                self.keeper.empty.clear()
                break
        if self.keep_prompts is not None and self.prompts is None:
            self.prompts = self._prompt_cache(*self.keep_prompts)
        elif self.prompts is None and not self.store.room.has_states:
            self.prompts = PageCopies(self.client, self.store, self.stages, lambda: self.runner.tokens_per_s)
        self._measure()
        self.load_s = time.perf_counter() - start
        return self.report

    def _load(self, progress: Progress | None) -> None:
        self._loader.report = LoadReport()
        self.runner.forget_graphs()
        hashed, total = 0, self.arch.gguf.n_bytes

        def on_hash(n: int) -> None:
            nonlocal hashed
            hashed += n
            if progress is not None:
                progress("hashing", hashed, total)

        hashes = self.keeper.hashes = tensor_hashes(self.arch.gguf, on_hash)
        for stage in self.stages:
            stage.parts = stage.parts or self._loader.place(stage.assignment).parts
        self._ask_links()
        self._loader.load([part for stage in self.stages for part in stage.parts.values()], hashes, progress)
        with contextlib.suppress(DeadlineExceeded):  # they are used when they are up
            self.client.await_reply(self._linking, LINKED_S)
        self.learn_links()

    def _prompt_cache(self, folder: Path, n_bytes: int) -> PromptCache:
        """Errors: ConfigError for a folder that cannot be one."""
        room, activations = self.store.room, self.runner.activations
        name = identity(self.arch, self.keeper.hashes, room, activations, self.n_ctx, self.stages, self.infos)

        def note(text: str) -> None:
            self.note(text)

        return PromptCache(self.client, self.store, self.stages, PageFiles(folder, name, n_bytes, note), note)

    def free(self) -> None:
        """Give its memory back. Errors: Unavailable when a worker cannot be told."""
        self._loader.free(part for stage in self.stages for part in stage.parts.values())
        self.runner.forget_graphs()
        for stage in self.stages:
            stage.parts = {}

    def _ask_links(self) -> None:
        """Have links dialled. Where a worker cannot reach the next one that takes a while; meanwhile the broker passes
        activations on."""
        self.direct = False
        self._linking = self.client.submit(m.Link(self.client.session, [s.assignment.device for s in self.stages]))

    def learn_links(self) -> bool:
        """Take in what became of links that were asked for. Returns: whether they are up now; they are used as soon as no
        batch is under way."""
        if not self.client.answered(self._linking):
            return False
        with contextlib.suppress(Unavailable, HandleError):  # of a device that was lost meanwhile: a batch meets that too
            self.direct = self.client.found(self._linking)
        return self.direct

    # -- when a worker is silent, lost or to be left ---------------------------------------------------------------------

    def recover(self, error: Unavailable) -> None:
        """Have all layers on devices that are ready again: where they were, or elsewhere. Their weights are there then; what
        they had read is not, of those that `keeper.empty` has.

        Errors: `error`, or what came after it, when a worker or the broker is waited for in vain.
        """
        self.keeper.restore(error)
        self._linked()

    def tend(self, infos: Sequence[m.ListedDevice], idle: bool, stop: Callable[[], None] = lambda: None) -> bool:
        """Leave devices that are to be left, with all that was read; no batch may be under way. idle: take new ones too.

        stop: ends what else is under way, before something moves.
        Returns: whether layers lie elsewhere now. Errors: Unavailable; OutOfMemory, and all is as it was.
        """
        wanted = self.keeper.wanted(infos, idle)
        if wanted is not None:
            stop()
            self.keeper.move(wanted, infos)
            self._linked()
        return wanted is not None

    def _linked(self) -> None:
        self.runner.forget_graphs()
        self._measure()
        self._ask_links()

    def _measure(self) -> None:
        if isinstance(self.prompts, PageCopies):
            self.prompts.measure()

    def held(self) -> bool:
        """Whether every stage still has its buffers: a worker that was started again has not. Errors: Unavailable."""
        return self.keeper.holds_all()

    def shares(self) -> bool:
        """Whether others hold something on the devices of the stages: their tokens come between the pieces of a prompt."""
        infos = self.client.devices()
        return any(infos[s.assignment.device].n_sessions > 1 for s in self.stages if s.assignment.device < len(infos))

    # -- one batch at a time -------------------------------------------------------------------------------------------

    def forward(
        self, tokens: Sequence[int] | npt.NDArray[np.int32], n_past: int, outputs: Sequence[int], want: int = ALL,
        held: Held | None = None,
    ) -> npt.NDArray[Any]:  # fmt: skip
        """Run tokens of one sequence at positions n_past, n_past + 1, ... as one batch; an engine runs many.

        held: what the sequence holds; None: of one that the model has for this.
        Shapes: float32 [len(outputs), n_vocab], the logits behind the tokens that `outputs` (indices) names; with `want`
        ARGMAX int32 [len(outputs)], with a number CANDIDATE [len(outputs), at least so many], the largest.
        Errors: what the workers report; FormatError for a token outside the vocabulary or a context that is full.
        """
        if held is None:
            held = self._own = self._own or self.store.begin()
        n = len(tokens)
        if n_past + n > self.n_ctx:
            raise FormatError(f"context: {n_past + n} tokens do not fit {self.n_ctx}; use a larger -c")
        if self.store.rewind(held, n_past) != n_past:
            raise FormatError(f"context: {n_past} tokens were to be there, but only {held.n_past} are")
        copies = self.store.grow(held, n_past + n)
        if copies is None:
            raise FormatError(f"context: no pages are left for {n} tokens; load the model for more sequences")
        self.runner.copy_pages(copies)
        held.unsure = None
        slots = self.store.next_slot(held) if self.store.room.n_slots else (0, 0)
        if slots is None:
            raise FormatError("context: no state is free for another sequence; load the model for more of them")
        sent = self.runner.submit([Rows(tokens, n_past, held.pages, outputs, want, slots)])
        held.n_past = n_past + n
        return self.runner.wait(sent)[0]

    def greedy(self, tokens: Sequence[int], n_past: int, held: Held | None = None) -> int:
        """The token with the largest logit behind `tokens`. Errors: as `forward`'s."""
        return int(self.forward(tokens, n_past, [len(tokens) - 1], ARGMAX, held)[0])
