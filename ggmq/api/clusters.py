"""Clusters, their devices, and the models on them: how a program gets them, and how all of it ends."""

from __future__ import annotations

import argparse
import html
import itertools
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack, overload

from config.auth import find_keys
from config.terminal import safe_line
from ggmq.api.answering import Answering
from ggmq.api.graphs import Recipe
from ggmq.api.opened import Opened
from ggmq.api.options import BusOptions, LoadOptions, ModelOptions, checked
from ggmq.archs import open_arch
from ggmq.archs.base import Arch
from ggmq.bus import BusConfig
from ggmq.cli.clusterfile import apply_cluster
from ggmq.cli.options import endpoint, endpoints, require_file
from ggmq.conversation import wrong
from ggmq.draftmodel import load_draft
from ggmq.engine import Engine
from ggmq.gguf import GGUF
from ggmq.hub import BUNDLED, download
from ggmq.model import Model as Loaded
from ggmq.model import ModelConfig
from ggmq.service import Service
from ggmq.tokenizer import Vocabulary
from protocol import messages as m
from protocol.dtypes import GGMLType
from protocol.errors import ConfigError, GgmqError, Unavailable

PathLike = str | os.PathLike[str]
PARALLEL = 4
MIB = 1 << 20
_NUMBERS = itertools.count()
_TYPES = ("activations", "cache_type_k", "cache_type_v")
_BUS = ("workers", "device", "worker_mem", "threads", "pin", "cache")


class Model(Answering):
    """A model on the devices of a cluster; `ggmq.load` and `Cluster.load` give one.

    Several answers may be asked for at once, from threads or from an event loop: `parallel` of them are made together, the
    others wait. The same prompt, options and seed give the same text in any company. A worker that is lost costs a pause.
    As a context manager it is closed at the end of its block, and in any case when the interpreter ends.

    Attributes:
        cluster: the devices.
        name: of the file, without `.gguf`.
    Threads: any.
    """

    def __init__(self, cluster: Cluster, service: Service, owns: bool) -> None:
        super().__init__(service)
        self.cluster, self.name, self._owns = cluster, service.name, owns
        self._closed = False
        self._end = weakref.finalize(self, cluster._opened.end, service)
        cluster._models[next(_NUMBERS)] = self

    def _open(self) -> Service:
        if self.closed:
            raise Unavailable(f"model {self.name} is closed; load it again")
        return self._service

    @property
    def closed(self) -> bool:
        return self._closed or self.cluster.closed

    @property
    def layers(self) -> list[tuple[str, int, int]]:
        """What lies where: the name of a device, its first layer, and the one behind its last."""
        model = self._service.model
        stages = [stage.assignment for stage in model.stages]
        return [(_name_of(model.infos[a.device]), a.layers.start, a.layers.stop) for a in stages]

    def close(self) -> None:
        """End its answers and free its memory; the workers that `ggmq.load` started for it end too. Idempotent."""
        self._closed = True
        self._end()
        if self._owns:
            self.cluster.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return f"<ggmq.Model {self.name}: closed>"
        where = ", ".join(f"{first}-{end - 1} on {device}" for device, first, end in self.layers)
        return f"<ggmq.Model {self.name}: layers {where}; context {self.n_ctx}>"


class Device:
    """A device of a cluster, as it was when it was asked for.

    Attributes:
        name: WORKER/DEVICE, `local0/CPU`. index: its number on the bus.
        kind, description, host: as the worker says.
        state: ready, silent or lost.
        total_bytes, free_bytes: of its memory.
        n_threads: that compute.
    """

    def __init__(self, opened: Opened, index: int, info: m.ListedDevice) -> None:
        self._opened, self.index = opened, index
        self.name, self.kind, self.description, self.host = _name_of(info), info.kind, info.description, info.host
        self.state, self.total_bytes, self.free_bytes = info.state, info.total_bytes, info.free_bytes
        self.n_threads = info.n_threads

    def run(self, graph: Recipe, /, **arrays: Any) -> Any:
        """Compute a graph on this device.

        graph: a function of a `Graph` and of a tensor for each array, by name: `lambda g, x: g.rms_norm(x, 1e-5)`. It
            returns a tensor, or a dict of several.
        arrays: NumPy's, of float32, float16, int8, int16 or int32; float64 becomes float32, and int64 int32.
        Returns: an array, or a dict of arrays by the same names.
        Shapes: in NumPy's order; a tensor's `ne` is that of its array turned around.
        Errors: InvalidValue for arrays that do not go with the graph; GraphError for what the op table forbids; DeviceError;
            Unavailable. Threads: any; one graph of a cluster runs at a time.
        """
        return self._opened.compute(self.index, graph, arrays)

    def __repr__(self) -> str:
        return (f"<ggmq.Device {self.name}: {self.state}, {self.description}, {self.free_bytes / MIB:.0f} of "
                f"{self.total_bytes / MIB:.0f} MiB free>")  # fmt: skip


class Cluster:
    """Devices on a bus; `ggmq.local_cluster` and `ggmq.connect` give one.

    As a context manager it is closed at the end of its block, and in any case when the interpreter ends: models on it end,
    and workers that were started for it. Threads: any.
    """

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self._models: weakref.WeakValueDictionary[int, Model] = weakref.WeakValueDictionary()
        self._end = weakref.finalize(self, opened.close)

    @property
    def closed(self) -> bool:
        return self._opened.closed

    @property
    def devices(self) -> list[Device]:
        """Those that are there now, also silent and lost ones, in the order in which they are taken. Errors: Unavailable."""
        infos, order = self._opened.devices(), list(self._opened.bus.order)
        found = [(order.index(d.worker) if d.worker in order else len(order), i) for i, d in enumerate(infos)
                 if d.state != "none"]  # fmt: skip
        return [Device(self._opened, i, infos[i]) for _, i in sorted(found)]

    def device(self, name: str | int) -> Device:
        """A device by name, WORKER/DEVICE, or by number; by its own name, CPU, the first of this name that is ready.

        Errors: InvalidValue for one that there is not; Unavailable.
        """
        devices = self.devices
        if isinstance(name, int):
            found = [d for d in devices if d.index == name]
        else:
            ready = [d for d in devices if d.state == "ready" and d.name.rpartition("/")[2] == name]
            found = [d for d in devices if d.name == name] or ready
        if not found:
            raise wrong("device", f"there is no device {name!r}; expected one of {', '.join(d.name for d in devices)}")
        return found[0]

    @property
    def models(self) -> list[Model]:
        """Those that this program has loaded on it, in the order in which they were loaded."""
        return [model for _, model in sorted(self._models.items()) if not model.closed]

    def load(self, model: PathLike | None = None, **options: Unpack[ModelOptions]) -> Model:
        """Load a model over the devices of this cluster.

        model: a GGUF file; the bundled story model where none is named. options: see `ModelOptions`.
        Errors: InvalidValue for an option; FormatError for a file that is no model; OutOfMemory; Unavailable.
        """
        said = checked(ModelOptions, options, "Cluster.load")
        return self._load(open_arch(_file(model)), said, BusConfig(), owns=False)

    def _load(self, arch: Arch, said: Mapping[str, Any], bus: BusConfig, owns: bool) -> Model:
        config = _model_config(arch, said, bus)
        service = self._opened.serve(config, arch, _engine(said, config.n_batch), said.get("progress", False))
        return Model(self, service, owns)

    def close(self) -> None:
        """Idempotent."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return "<ggmq.Cluster: closed>"
        try:
            devices = ", ".join(d.name if d.state == "ready" else f"{d.name} ({d.state})" for d in self.devices)
        except GgmqError as e:
            return f"<ggmq.Cluster: {e}>"
        return f"<ggmq.Cluster: {devices}>"

    def _repr_html_(self) -> str:
        """For notebooks: a table of the devices, and what lies on them."""
        try:
            devices = [] if self.closed else self.devices
        except GgmqError as e:
            return f"<p>ggmq.Cluster: {html.escape(str(e))}</p>"
        if not devices:
            return f"<p>ggmq.Cluster: {'closed' if self.closed else 'no devices'}</p>"
        held: dict[str, list[str]] = {}
        for model in self.models:
            for name, first, end in model.layers:
                held.setdefault(name, []).append(f"{model.name} {first}-{end - 1}")
        head = ("device", "state", "is", "free MiB", "of MiB", "layers")
        rows = [(d.name, d.state, d.description, f"{d.free_bytes / MIB:.0f}", f"{d.total_bytes / MIB:.0f}",
                 ", ".join(held.get(d.name, ()))) for d in devices]  # fmt: skip
        body = "".join(f"<tr>{_cells('td', row)}</tr>" for row in rows)
        return f"<table><thead><tr>{_cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def _cells(tag: str, texts: tuple[str, ...]) -> str:
    return "".join(f"<{tag}>{html.escape(safe_line(text))}</{tag}>" for text in texts)


def _name_of(d: m.ListedDevice) -> str:
    return f"{d.worker}/{d.name}"


# -- how a program gets them -----------------------------------------------------------------------------------------------


def load(model: PathLike | None = None, **options: Unpack[LoadOptions]) -> Model:
    """Load a model on devices of its own: workers of this host, and with `rpc` those of others.

    model: a GGUF file; the bundled story model where neither it nor `hf_repo` names one. options: see `BusOptions` and
    `ModelOptions`; their words are those of `ggmq run`.

        with ggmq.load("model.gguf", workers=2) as model:
            print(model.generate("Once upon a time", max_tokens=40))

    Workers end when the model is closed, and when this process ends, however it does.
    Errors: InvalidValue for an option; FormatError for a file that is no model; ConfigError; OutOfMemory; Unavailable.
    """
    said = checked(LoadOptions, options, "load")
    if model is not None and "hf_repo" in said:
        raise wrong("hf_repo", "a file is named already; leave one of them out")
    arch = open_arch(_file(download(said["hf_repo"]) if "hf_repo" in said else model))
    bus = _bus_config(said)
    cluster = Cluster(Opened(bus, arch, said.get("ngl")))
    try:
        return cluster._load(arch, said, bus, owns=True)
    except BaseException:
        cluster.close()
        raise


def local_cluster(**options: Unpack[BusOptions]) -> Cluster:
    """A cluster of one's own: workers of this host, and with `rpc` those of others.

    options: see `BusOptions`. Errors: InvalidValue for an option; ConfigError; Unavailable.
    """
    return Cluster(Opened(_bus_config(checked(BusOptions, options, "local_cluster"))))


@overload
def connect(broker: str, model: None = None, *, keys: PathLike | None = None, insecure: bool = False) -> Cluster: ...


@overload
def connect(
    broker: str, model: PathLike, *, keys: PathLike | None = None, insecure: bool = False, **options: Unpack[ModelOptions]
) -> Model: ...


def connect(
    broker: str, model: PathLike | None = None, *, keys: PathLike | None = None, insecure: bool = False,
    **options: Unpack[ModelOptions],
) -> Cluster | Model:  # fmt: skip
    """A cluster whose broker runs elsewhere: `ggmq up` and `ggmq broker` start one.

    broker: its endpoint, tcp://HOST:PORT, or the YAML file of a cluster that is up, which names its keys itself.
    model: a GGUF file, to be loaded at once. keys: the cluster's key file; the default one, if it is there. insecure: no
    encryption, no keys. options: see `ModelOptions`.
    Returns: the cluster, or where a model is named the model, which closes the connection with it.
    Errors: InvalidValue for an option; DeadlineExceeded when nothing answers there; as `load`'s.
    """
    said = checked(ModelOptions, options, "connect")
    if said and model is None:
        raise wrong(next(iter(said)), "expected a model with it")
    bus = _elsewhere(broker, keys, insecure)
    arch = open_arch(_file(model)) if model is not None else None
    cluster = Cluster(Opened(bus))
    if arch is None:
        return cluster
    try:
        return cluster._load(arch, said, bus, owns=True)
    except BaseException:
        cluster.close()
        raise


def _file(model: PathLike | None) -> GGUF:
    """Errors: InvalidValue for no file, FormatError for no GGUF."""
    path = BUNDLED if model is None else Path(model)
    if not path.is_file():
        raise wrong("model", f"{path}: no such file")
    return GGUF(path)


def _elsewhere(broker: str, keys: PathLike | None, insecure: bool) -> BusConfig:
    """Errors: InvalidValue for what is neither an endpoint nor a file; ConfigError for a cluster that is not up."""
    if broker.endswith((".yaml", ".yml")):
        args = argparse.Namespace(keys=keys and Path(keys), insecure=insecure, model=BUNDLED, ctx_size=0, tensor_split=None)
        apply_cluster(args, require_file(Path(broker)))
        return BusConfig(args.broker, args.cluster_id, args.worker_order, keys=_keys(args.keys, args.insecure))
    try:
        return BusConfig(endpoint(broker), keys=_keys(keys, insecure))
    except argparse.ArgumentTypeError as e:
        raise wrong("broker", f"{e}, or a cluster's YAML file") from None


def _keys(path: PathLike | None, insecure: bool) -> Any:
    return find_keys(Path(path).expanduser() if path is not None else None, insecure)


def _bus_config(said: Mapping[str, Any]) -> BusConfig:
    rpc = said.get("rpc", ())
    try:
        addresses = endpoints(rpc if isinstance(rpc, str) else ",".join(rpc)) if rpc else ()
    except argparse.ArgumentTypeError as e:
        raise wrong("rpc", str(e)) from None
    keys = _keys(said.get("keys"), said.get("insecure", False))
    return BusConfig(rpc=addresses, keys=keys, **{name: said[name] for name in _BUS if name in said})


def _model_config(arch: Arch, said: Mapping[str, Any], bus: BusConfig) -> ModelConfig:
    split = said.get("tensor_split")
    if split is not None and not sum(split) > 0:
        raise wrong("tensor_split", "expected shares that are not all 0")
    more: dict[str, Any] = {name: GGMLType[said[name].upper()] for name in _TYPES if name in said}
    if "prompt_cache" in said:
        more["prompt_cache"] = Path(said["prompt_cache"]).expanduser()
    if "prompt_cache_mib" in said:
        more["prompt_cache_bytes"] = said["prompt_cache_mib"] * MIB
    return ModelConfig(
        arch.gguf.path, ctx_size=said.get("ctx_size", 0), n_seq=said.get("parallel", PARALLEL),
        n_batch=said.get("batch_size", 512), tensor_split=split, ngl=said.get("ngl"), bus=bus, **more,
    )  # fmt: skip


def _engine(said: Mapping[str, Any], n_batch: int) -> Callable[[Loaded, Vocabulary], Engine]:
    """Errors: ConfigError for a model that drafts and is not named, or not there."""
    mode, drafts = said.get("spec", "auto"), said.get("spec_draft_model")
    if mode == "draft" and drafts is None:
        raise ConfigError("spec: expected a model that guesses; name its file with spec_draft_model")
    path = Path(drafts) if drafts is not None and mode in ("auto", "draft") else None
    if path is not None and not path.is_file():
        raise ConfigError(f"spec_draft_model: {path}: no such file")

    def engine(model: Loaded, vocabulary: Vocabulary) -> Engine:
        draft = load_draft(path, model, vocabulary) if path is not None else None
        return Engine(model, vocabulary.end_ids, n_batch, mode, draft)

    return engine
