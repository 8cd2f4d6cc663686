"""Placement: a pure function with properties that always hold."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggmq.placement import SCRATCH_BYTES, DeviceMemory, ModelSizes, place, refill, regrown, share_layers
from protocol.errors import ConfigError, OutOfMemory

MIB = 1 << 20


def devices(*free_mib: int) -> list[DeviceMemory]:
    return [DeviceMemory(i, f"d{i}", SCRATCH_BYTES + f * MIB) for i, f in enumerate(free_mib)]


def model(n: int, layer: int = 10, kv: int = 1, embedding: int = 5, output: int = 5) -> ModelSizes:
    return ModelSizes([layer * MIB] * n, [kv * MIB] * n, embedding * MIB, output * MIB)


@given(st.integers(1, 200), st.lists(st.floats(0, 100), min_size=1, max_size=8).filter(lambda w: sum(w) > 1e-6))
def test_shares_add_up_and_are_within_one_of_the_quota(n: int, weights: list[float]) -> None:
    counts = share_layers(n, weights)
    assert sum(counts) == n
    for c, w in zip(counts, weights, strict=True):
        assert abs(c - n * w / sum(weights)) < 1 + 1e-6


@given(st.integers(1, 40), st.lists(st.integers(0, 500), min_size=1, max_size=6))
def test_layers_are_consecutive_complete_and_fit(n: int, free: list[int]) -> None:
    d = devices(*free)
    try:
        stages = place(model(n), d)
    except OutOfMemory as e:
        assert e.need_bytes > e.free_bytes
        return
    assert [il for a in stages for il in a.layers] == list(range(n))
    assert stages[0].first and stages[-1].last
    assert sum(a.first for a in stages) == sum(a.last for a in stages) == 1
    for a in stages:
        assert a.weight_bytes + a.kv_bytes <= d[a.device].free_bytes - SCRATCH_BYTES


def test_tensor_split_3_to_1() -> None:
    stages = place(model(16), devices(10_000, 10_000), [3, 1])
    assert [len(a.layers) for a in stages] == [12, 4]
    assert [a.device for a in place(model(4), devices(1000, 1000), [0, 1])] == [1]


def test_unequal_memories_share_in_proportion() -> None:
    assert [len(a.layers) for a in place(model(20, 1, 0, 0, 0), devices(300, 100))] == [15, 5]


def test_a_tied_embedding_counts_once_on_a_device_that_has_both_ends() -> None:
    sizes = ModelSizes([10 * MIB] * 2, [MIB] * 2, 105 * MIB, 105 * MIB, tied=100 * MIB)
    assert [a.weight_bytes // MIB for a in place(sizes, devices(132))] == [130]
    assert [a.weight_bytes // MIB for a in place(sizes, devices(200, 200), [1, 1])] == [115, 115]
    with pytest.raises(OutOfMemory, match=r"the model needs 132\.0 MiB"):
        place(sizes, devices(131))


def test_devices_of_one_host_share_its_memory() -> None:
    both = [DeviceMemory(i, f"d{i}", 200 * MIB, "h", True) for i in range(2)]
    with pytest.raises(OutOfMemory):
        place(model(18), both)


def test_too_little_memory_is_refused_with_the_numbers() -> None:
    with pytest.raises(OutOfMemory, match=r"needs 120\.0 MiB, the devices have 100\.0 MiB"):
        place(model(10), devices(50, 50))
    with pytest.raises(OutOfMemory, match=r"d1: its 5 layers need"):
        place(model(10), devices(500, 20), [1, 1])


@pytest.mark.parametrize("split", [[1, 1, 1], [0, 0], [-1, 2], [float("nan"), 1]])
def test_splits_that_fit_nothing_are_refused(split: list[float]) -> None:
    with pytest.raises(ConfigError, match="tensor-split"):
        place(model(4), devices(100, 100), split)


def test_no_device_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="start a worker"):
        place(model(1), [])


# -- when a device is gone ------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(2, 24), st.lists(st.integers(0, 400), min_size=2, max_size=6), st.booleans())
def test_layers_of_lost_devices_go_to_others_and_the_rest_stays(
    data: st.DataObject, n: int, free: list[int], rounded: bool
) -> None:  # fmt: skip
    d, sizes = devices(*free), model(n)
    try:
        stages = place(sizes, d, data.draw(st.none() | st.lists(st.integers(1, 5), min_size=1, max_size=len(free))))
    except OutOfMemory:
        return
    gone = data.draw(st.sets(st.sampled_from([a.device for a in stages]), min_size=1))
    kept = [a for a in stages if a.device not in gone]
    taken = {a.device: a.weight_bytes + a.kv_bytes for a in kept}
    left = [DeviceMemory(x.index, x.name, x.free_bytes - taken.get(x.index, 0)) for x in d if x.index not in gone]
    cuts = [a.layers for a in stages] if rounded else ()
    try:
        again = refill(sizes, kept, left, cuts)
    except (OutOfMemory, ConfigError):
        lost = sum(len(a.layers) for a in stages if a.device in gone)
        assert not any(x.free_bytes - SCRATCH_BYTES > (n + lost) * 22 * MIB for x in left), "there was room for all of it"
        return
    assert [il for a in again for il in a.layers] == list(range(n))
    assert again[0].first and again[-1].last and sum(a.first for a in again) == sum(a.last for a in again) == 1
    for a in again:
        assert a.device not in gone
        own = [il for il in a.layers if all(il not in k.layers or k.device == a.device for k in kept)]
        assert own == list(a.layers), "what is kept stays where it is"
        assert (a.weight_bytes, a.kv_bytes) == (10 * MIB * len(a.layers) + 5 * MIB * (a.first + a.last), MIB * len(a.layers))
    for x in left:
        new = sum(a.weight_bytes + a.kv_bytes for a in again if a.device == x.index) - taken.get(x.index, 0)
        assert new <= max(0, x.free_bytes - SCRATCH_BYTES)
    if rounded:
        assert [a.layers for a in again] == [a.layers for a in stages]
    else:
        assert all(a.device != b.device for a, b in pairwise(again))


@given(st.data(), st.integers(3, 20))
def test_layers_that_others_had_taken_go_back_to_a_new_device(data: st.DataObject, n: int) -> None:
    sizes, d = model(n), devices(1000, 1000, 1000)
    stages = place(sizes, d[:2], [1, 1] if n % 2 else [2, 1])
    a = data.draw(st.integers(0, n - 1))
    layers = range(a, data.draw(st.integers(a + 1, n)))
    again = regrown(sizes, stages, layers, d[2])
    assert [il for x in again for il in x.layers] == list(range(n))
    assert [x.layers for x in again if x.device == 2] == [layers]
    assert again[0].first and again[-1].last and sum(x.first for x in again) == sum(x.last for x in again) == 1
    with pytest.raises(OutOfMemory):
        regrown(sizes, stages, layers, devices(5)[0])
