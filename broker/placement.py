"""Which layers go to which device: a pure function, printed by `ggmq plan` before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.errors import ConfigError, OutOfMemory

SCRATCH_BYTES = 32 << 20
"""Room kept on each device for a graph's intermediate results."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A device as placement sees it. `host`: devices of one host with `shared` have one memory between them."""

    index: int
    name: str
    free_bytes: int
    host: str = ""
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Assignment:
    """Consecutive layers on a device. Units: bytes of weights and of KV cache, ends included."""

    device: int
    layers: range
    first: bool
    last: bool
    weight_bytes: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Units: bytes. `layers` and `kv` have one entry a layer; `head` is the embedding, `tail` the output, and `tied` what
    is in both and is held once by a device that has both ends."""

    layers: Sequence[int]
    kv: Sequence[int]
    head: int
    tail: int
    tied: int = 0

    def ends(self, first: bool, last: bool) -> int:
        """Bytes of what a stage holds besides its layers."""
        return first * self.head + last * self.tail - (first and last) * self.tied


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
