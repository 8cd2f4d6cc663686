"""Which layers go to which device: a pure function, printed by `ggmq plan` before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec import Struct, structs

from ggmq.archs.base import Arch
from ggmq.archs.memory import LayerMemory, Room, aligned
from ggmq.archs.stage import Stage
from ggmq.gguf import TensorInfo
from protocol import limits
from protocol import messages as m
from protocol.errors import ConfigError, GgmqError, OutOfMemory

SCRATCH_BYTES = limits.SCRATCH_BYTES


class DeviceMemory(Struct, frozen=True):
    """A device as placement sees it. `host`: devices of one host with `shared` have one memory between them."""

    index: int
    name: str
    free_bytes: int
    host: str = ""
    shared: bool = False


class Assignment(Struct, frozen=True):
    """Consecutive layers on a device. Units: bytes of weights and of KV cache, ends included."""

    device: int
    layers: range
    first: bool
    last: bool
    weight_bytes: int
    kv_bytes: int


class ModelSizes(Struct, frozen=True):
    """Units: bytes. `layers` and `kv` have one entry a layer; `tied` is what is in both embedding and output, and is held
    once by a device that has both ends."""

    layers: Sequence[int]
    kv: Sequence[int]
    embedding: int
    output: int
    tied: int = 0

    def ends(self, first: bool, last: bool) -> int:
        """Bytes of what a stage holds besides its layers."""
        return first * self.embedding + last * self.output - (first and last) * self.tied


def share_layers(n_layers: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers of layers in proportion to `weights`, by largest remainder; they add up to `n_layers`."""
    total = sum(weights)
    quota = [n_layers * w / total for w in weights]
    counts = [int(q) for q in quota]
    by_rest = sorted(range(len(quota)), key=lambda i: (counts[i] - quota[i], i))
    for i in by_rest[: n_layers - sum(counts)]:
        counts[i] += 1
    return counts


def usable_bytes(devices: Sequence[DeviceMemory]) -> list[int]:
    """What each device can take when those that share a host's memory share it evenly."""
    out = []
    for d in devices:
        n = sum(1 for e in devices if e.shared and e.host == d.host) if d.shared else 1
        out.append(max(0, d.free_bytes // n - SCRATCH_BYTES))
    return out


def place(sizes: ModelSizes, devices: Sequence[DeviceMemory], split: Sequence[float] | None = None) -> list[Assignment]:
    """Assign layers to `devices`, in their order.

    Without `split` the shares follow the free memory, and a device that would be overfull gives layers to those that
    have room. With `split` the shares are as said. Devices without a layer are left out.
    Errors: OutOfMemory with what is needed and free, ConfigError for a split that does not fit the devices.
    """
    if not devices:
        raise ConfigError("no device to place layers on; start a worker, or name one with --rpc")
    room = usable_bytes(devices)
    n = len(sizes.layers)
    if split is not None:
        if len(split) > len(devices) or any(not w >= 0 for w in split) or sum(split) <= 0:
            raise ConfigError(f"--tensor-split {','.join(f'{w:g}' for w in split)}: expected up to {len(devices)} "
                              "shares of at least 0, one a device, not all 0")  # fmt: skip
        counts = share_layers(n, [*split, *(0.0,) * (len(devices) - len(split))])
    else:
        total = sum(sizes.layers) + sum(sizes.kv) + sizes.ends(True, True)
        if total > sum(room):
            raise OutOfMemory(_refusal(total, sum(room), devices, room), total, sum(room))
        counts = _fit(sizes, share_layers(n, [float(r) for r in room] if any(room) else [1.0] * len(room)), room)
    stages = _assign(sizes, devices, counts)
    for a in stages:
        at = next(i for i, d in enumerate(devices) if d.index == a.device)
        need = a.weight_bytes + a.kv_bytes
        if need > room[at]:
            raise OutOfMemory(
                f"{devices[at].name}: its {len(a.layers)} layers need {_mib(need)} MiB "
                f"({_mib(a.weight_bytes)} weights, {_mib(a.kv_bytes)} KV cache), {_mib(room[at])} MiB are free; "
                "use a smaller context (-c), another --tensor-split, or more workers", need, room[at])  # fmt: skip
    return stages


def _mib(n: int) -> str:
    return f"{n / (1 << 20):.1f}"


def _refusal(need: int, free: int, devices: Sequence[DeviceMemory], room: Sequence[int]) -> str:
    each = ", ".join(f"{d.name} {_mib(r)}" for d, r in zip(devices, room, strict=True))
    return (f"the model needs {_mib(need)} MiB, the devices have {_mib(free)} MiB free ({each}, after "
            f"{SCRATCH_BYTES >> 20} MiB each for scratch); add workers or use a smaller context (-c)")  # fmt: skip


def _assign(sizes: ModelSizes, devices: Sequence[DeviceMemory], counts: Sequence[int]) -> list[Assignment]:
    used = [(d.index, c) for d, c in zip(devices, counts, strict=True) if c]
    out, start = [], 0
    for i, (device, count) in enumerate(used):
        first, last = i == 0, i == len(used) - 1
        layers = range(start, start + count)
        weights = sum(sizes.layers[il] for il in layers) + sizes.ends(first, last)
        out.append(Assignment(device, layers, first, last, weights, sum(sizes.kv[il] for il in layers)))
        start += count
    return out


def _fit(sizes: ModelSizes, counts: list[int], room: Sequence[int]) -> list[int]:
    """Move layers from overfull devices to neighbours with room, a layer at a time."""

    def spare(counts: Sequence[int]) -> list[int]:
        out, start = [], 0
        used = [i for i, c in enumerate(counts) if c]
        for i, c in enumerate(counts):
            need = sum(sizes.layers[il] + sizes.kv[il] for il in range(start, start + c))
            need += sizes.ends(bool(used) and i == used[0], bool(used) and i == used[-1])
            out.append(room[i] - need)
            start += c
        return out

    for _ in range(len(sizes.layers) * len(counts)):
        free = spare(counts)
        worst = min(range(len(counts)), key=lambda i: free[i])
        best = max(range(len(counts)), key=lambda i: free[i])
        if free[worst] >= 0 or counts[worst] == 0 or best == worst:
            break
        trial = list(counts)
        trial[worst] -= 1
        trial[best] += 1
        if min(spare(trial)) <= free[worst]:
            break
        counts = trial
    return counts


# -- when a device is gone ------------------------------------------------------------------------------------------------


def refill(
    sizes: ModelSizes, kept: Sequence[Assignment], devices: Sequence[DeviceMemory], same_cuts: Sequence[range] = (),
) -> list[Assignment]:  # fmt: skip
    """Assign the layers that nobody holds any more, and leave those that `kept` has where they are.

    A device that holds nothing of the model takes a gap whole, the one with the most room first. Else it is shared by those
    that hold the layers before and behind it, whose stages grow, so that activations cross no network more often; else by
    all that have room.
    kept: in the order of the layers. devices: those that may take some, with what they have free now.
    same_cuts: the layers of each stage as it was, where activations are rounded between stages and so the model must be cut
        where it was; a stage goes to one device then.
    Errors: OutOfMemory with what is needed and free, ConfigError without a device.
    """
    free = {d.index: d for d in devices}
    out = list(kept)
    for gap in [part for missing in _gaps(len(sizes.layers), kept) for part in _cut(missing, same_cuts)]:
        around = [a.device for a in out if gap.start == a.layers.stop or gap.stop == a.layers.start]
        unused = [d for d in free.values() if all(a.device != d.index for a in out)]
        ways = [[d] for d in sorted(unused, key=lambda d: -d.free_bytes)[:1]]
        near = [free[i] for i in dict.fromkeys(around) if i in free]
        others = [d for d in free.values() if d not in near]
        ways += [[d] for d in (*near, *others)] if same_cuts else [near, list(free.values())]
        placed = _first_that_fits(_of(sizes, gap), ways)
        for a in placed:
            d = free[a.device]
            free[a.device] = structs.replace(d, free_bytes=max(0, d.free_bytes - a.weight_bytes - a.kv_bytes))
        last = len(sizes.layers)
        out += [_shift(a, gap.start, a.first and not gap.start, a.last and gap.stop == last) for a in placed]
        out.sort(key=lambda a: a.layers.start)
        out = out if same_cuts else joined(out)
    return out


def _first_that_fits(sizes: ModelSizes, ways: Sequence[Sequence[DeviceMemory]]) -> list[Assignment]:
    """Errors: those of the last way."""
    error: GgmqError = ConfigError("no device to place layers on; start a worker")
    for way in ways:
        try:
            return place(sizes, way)
        except (OutOfMemory, ConfigError) as e:
            error = e
    raise error


def _gaps(n_layers: int, kept: Sequence[Assignment]) -> list[range]:
    """Layers that nobody holds, those in a row together."""
    ends = [0, *(end for a in kept for end in (a.layers.start, a.layers.stop)), n_layers]
    return [range(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True) if a < b]


def _cut(gap: range, cuts: Sequence[range]) -> list[range]:
    parts = [range(max(gap.start, c.start), min(gap.stop, c.stop)) for c in cuts]
    return [part for part in parts if part] or [gap]


def _of(sizes: ModelSizes, layers: range) -> ModelSizes:
    """The sizes of some of the layers, with the end that is theirs."""
    first, last = layers.start == 0, layers.stop == len(sizes.layers)
    return ModelSizes([sizes.layers[il] for il in layers], [sizes.kv[il] for il in layers], first * sizes.embedding,
                      last * sizes.output, (first and last) * sizes.tied)  # fmt: skip


def joined(stages: Sequence[Assignment]) -> list[Assignment]:
    """Neighbours on one device are one stage."""
    out: list[Assignment] = []
    for a in stages:
        if out and out[-1].device == a.device:
            b = out.pop()
            a = Assignment(a.device, range(b.layers.start, a.layers.stop), b.first, a.last, b.weight_bytes + a.weight_bytes,
                           b.kv_bytes + a.kv_bytes)  # fmt: skip
        out.append(a)
    return out


def regrown(sizes: ModelSizes, stages: Sequence[Assignment], layers: range, device: DeviceMemory) -> list[Assignment]:
    """Give layers that others had taken over to a device that holds nothing of the model.

    Errors: OutOfMemory when they do not fit there.
    """
    out: list[Assignment] = []
    for a in stages:
        for part in (range(a.layers.start, min(a.layers.stop, layers.start)), range(max(a.layers.start, layers.stop),
                                                                                     a.layers.stop)):  # fmt: skip
            if part:
                out.append(_assignment(sizes, a.device, part))
    (moved,) = place(_of(sizes, layers), [device])
    out.append(_shift(moved, layers.start, not layers.start, layers.stop == len(sizes.layers)))
    return sorted(out, key=lambda a: a.layers.start)


def _assignment(sizes: ModelSizes, device: int, layers: range) -> Assignment:
    own = _of(sizes, layers)
    first, last = not layers.start, layers.stop == len(sizes.layers)
    return Assignment(device, layers, first, last, sum(own.layers) + own.ends(first, last), sum(own.kv))


# -- a model on the devices of a bus -------------------------------------------------------------------------------------


def model_sizes(arch: Arch, room: Room) -> ModelSizes:
    """Bytes of each layer's weights and memory, of the embedding and of the output."""
    n = arch.hp.n_layer
    layers = [0] * n
    for il in range(n):
        layers[il] = _aligned(arch.stage_weights(Stage(0, range(il, il + 1), False, False)))
    shared = {t.name for t in arch.stage_weights(Stage(0, range(1), False, False)) if not t.name.startswith("blk.")}
    embedding = [t for t in arch.stage_weights(Stage(0, range(0), True, False)) if t.name not in shared]
    output = [t for t in arch.stage_weights(Stage(0, range(0), False, True)) if t.name not in shared]
    tied = _aligned([t for t in output if t in embedding])
    kept = [LayerMemory(arch.memory(il), room, 0).n_bytes for il in range(n)]
    return ModelSizes(layers, kept, _aligned(embedding), _aligned(output), tied)


def _aligned(tensors: Sequence[TensorInfo]) -> int:
    return sum(aligned(t.n_bytes) for t in tensors)


def device_memory(infos: Sequence[m.ListedDevice]) -> list[DeviceMemory]:
    """Devices as placement sees them; those that are lost, silent or retired are left out."""
    return [DeviceMemory(i, f"{d.worker} {d.name}".strip(), d.free_bytes, d.host, d.shares_memory)
            for i, d in enumerate(infos) if d.total_bytes and d.state == "ready" and not d.retired]  # fmt: skip


def plan(
    arch: Arch, infos: Sequence[m.ListedDevice], room: Room, split: Sequence[float] | None = None,
    ngl: int | None = None, host: str = "", order: Sequence[str] = (),
) -> list[Assignment]:  # fmt: skip
    """Where the layers go. With `ngl` below the layer count the first layers stay on the worker named `host`.

    `order`: names of workers; devices are taken in this order, and others after them, whenever they connected.

    Errors: OutOfMemory, ConfigError.
    """
    sizes = model_sizes(arch, room)
    rank = {name: i for i, name in enumerate(order)}
    memory = sorted(device_memory(infos), key=lambda d: (_rank(infos[d.index], rank), d.index))
    n = arch.hp.n_layer
    mine = [d for d in memory if host and infos[d.index].worker == host]
    others = [d for d in memory if d not in mine]
    keep = 0 if ngl is None or not mine else max(0, n - ngl)
    if not keep:
        return place(sizes, others or memory, split)
    whole = keep == n or not others
    output, tied = (sizes.output, sizes.tied) if whole else (0, 0)
    here = ModelSizes(sizes.layers[:keep], sizes.kv[:keep], sizes.embedding, output, tied)
    out = [_shift(a, 0, True, whole) for a in place(here, mine)]
    if whole:
        return out
    rest = place(ModelSizes(sizes.layers[keep:], sizes.kv[keep:], 0, sizes.output), others, split)
    return out + [_shift(a, keep, False, a.last) for a in rest]


def _rank(info: m.ListedDevice, rank: dict[str, int]) -> int:
    """Where a worker stands in the order: by its name, or by the address where it listens."""
    return min(rank.get(info.worker, len(rank)), rank.get(info.address, len(rank)))


def _shift(a: Assignment, by: int, first: bool, last: bool) -> Assignment:
    layers = range(a.layers.start + by, a.layers.stop + by)
    return Assignment(a.device, layers, first, last, a.weight_bytes, a.kv_bytes)


def default_n_ctx(arch: Arch, wanted: int) -> int:
    """Cells for a context: `wanted`, or the training length up to 4096. 0 means not said."""
    n = wanted or min(arch.hp.n_ctx_train, 4096)
    return math.ceil(n / 32) * 32
