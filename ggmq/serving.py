"""Models that are served: one bus, and for each model a client, an engine and its thread.

`serving([ModelConfig(...)])` is how everyone gets them: `ggmq serve`, and the Python API.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

from ggmq.archs import open_arch
from ggmq.archs.base import Arch
from ggmq.bus import Bus, open_bus
from ggmq.cluster import Client
from ggmq.engine import Engine
from ggmq.gguf import GGUF
from ggmq.loader import Progress
from ggmq.model import DRAIN_S, Model, ModelConfig, place_model
from ggmq.service import Service
from ggmq.tokenizer import Vocabulary
from ggmq.watching import BusWatch, Watched
from protocol.errors import GgmqError

REVIVE_S = 5.0


class Served(NamedTuple):
    """Services by name, and the bus beneath them."""

    services: dict[str, Service]
    watch: BusWatch


@contextlib.contextmanager
def serving(
    configs: Sequence[ModelConfig], names: Sequence[str] = (), *, n_queue: int = 256,
    engine: Callable[[Model, Vocabulary], Engine] = lambda model, vocabulary: Engine(model, vocabulary.end_ids),
    progress: Callable[[], AbstractContextManager[Progress | None]] = contextlib.nullcontext,
    note: Callable[[str], None] = lambda text: None, told: Callable[..., None] = lambda event, **figures: None,
) -> Iterator[Served]:  # fmt: skip
    """Bring up the bus of the first config, load all models on it, and answer requests until the block ends.

    names: of the models; those of their files where there are none.
    engine: makes an engine; it is asked again when a model had to be placed anew.
    told: as Service's, and `device` with what BusWatch sees change.
    Errors: FormatError, ConfigError, OutOfMemory, and what the workers report.
    """
    first = configs[0]
    files = [GGUF(c.path) for c in configs]
    archs = [open_arch(g) for g in files]
    with open_bus(first.bus, archs[0].hp.n_layer, files[0].path.absolute(), first.ngl, note) as bus:
        services: dict[str, Service] = {}
        clients: list[Client] = []

        def on_change(device: Watched) -> None:
            told("device", worker=device.info.worker, device=device.info.name, state=device.info.state)

        watch = BusWatch(bus.client.another(), on_change)
        try:
            for i, (config, arch) in enumerate(zip(configs, archs, strict=True)):
                clients.append(own := bus.client if not i else bus.client.another())
                name = names[i] if i < len(names) else _free_name(arch.gguf.path.stem, services)
                services[name] = serve_on(bus, own, config, arch, name, n_queue=n_queue, engine=engine, progress=progress,
                                          note=note, told=told)  # fmt: skip
            yield Served(services, watch)
        finally:
            for service in services.values():
                service.close()
            watch.close()
            for own in clients:
                with contextlib.suppress(GgmqError):  # whoever cannot be told now hears it from the broker
                    own.drain(DRAIN_S)
            for own in clients[1:]:
                own.close()


def serve_on(
    bus: Bus, own: Client, config: ModelConfig, arch: Arch, name: str, *, n_queue: int = 256,
    engine: Callable[[Model, Vocabulary], Engine] = lambda model, vocabulary: Engine(model, vocabulary.end_ids),
    progress: Callable[[], AbstractContextManager[Progress | None]] = contextlib.nullcontext,
    note: Callable[[str], None] = lambda text: None, told: Callable[..., None] = lambda event, **figures: None,
) -> Service:  # fmt: skip
    """Load a model on a bus that is up, and have it answer. Whoever closes the service drains `own`, which is its client.

    Errors: as `serving`'s.
    """
    vocabulary = Vocabulary(arch.gguf)
    vocabulary.check_rows(arch.hp.n_vocab)
    own.note = note

    def place() -> Model:
        start = time.perf_counter()
        if own.lost:
            own.reopen(0.0)
        if bus.revive():
            _await_all(own, bus.order)
        model = place_model(config, arch, own, bus.order, bus.host, note)
        model.keeper.revive = bus.revive
        with progress() as show:
            model.load(show)
        model.ready_s = time.perf_counter() - start
        return model

    return Service(place(), vocabulary, name, place, engine=lambda model: engine(model, vocabulary), n_slots=config.n_seq,
                   n_queue=n_queue, patience_s=config.patience_s, told=told)  # fmt: skip


def _await_all(client: Client, names: Sequence[str]) -> None:
    """Until the workers of these names are ready, or for REVIVE_S: what is missing then is done without."""
    due = time.monotonic() + REVIVE_S
    while not set(names) <= {d.worker for d in client.devices() if d.state == "ready"} and time.monotonic() < due:
        time.sleep(0.05)


def _free_name(stem: str, taken: dict[str, Service]) -> str:
    """The name of a file, or with a number where another has it."""
    return next(name for i in range(1, len(taken) + 2) if (name := stem if i == 1 else f"{stem}-{i}") not in taken)
