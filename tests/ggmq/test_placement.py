"""Placement: a pure function with properties that always hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggmq.placement import SCRATCH_BYTES, DeviceMemory, ModelSizes, place, share_layers
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
