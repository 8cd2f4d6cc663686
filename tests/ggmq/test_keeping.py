"""Which devices of a broker that was started again are those that a model had."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ggmq.keeping import found_again
from protocol import messages as m


def listed(worker: str, process: int, name: str = "CPU", state: str = "ready") -> m.ListedDevice:
    return m.ListedDevice(name, "cpu", worker=worker, process=process, state=state)


def test_the_same_process_is_taken_before_one_of_its_name() -> None:
    wanted = {0: listed("a", 11), 3: listed("a", 12)}
    assert found_again(wanted, [listed("a", 12), listed("a", 13), listed("a", 11)], others=True) == {0: 2, 3: 0}
    assert found_again(wanted, [listed("a", 13), listed("a", 12)], others=False) == {3: 1}
    assert found_again(wanted, [listed("a", 13), listed("a", 12)], others=True) == {0: 0, 3: 1}


def test_one_that_is_silent_or_another_device_of_the_process_is_not_taken() -> None:
    wanted = {0: listed("a", 11)}
    assert found_again(wanted, [listed("a", 11, state="silent"), listed("a", 11, "CUDA0")], others=True) == {}


def test_processes_that_are_not_known_are_told_by_name_alone() -> None:
    wanted = {0: listed("a", 0), 1: listed("b", 0)}
    assert found_again(wanted, [listed("b", 0), listed("a", 0)], others=False) == {}
    assert found_again(wanted, [listed("b", 0), listed("a", 0)], others=True) == {0: 1, 1: 0}


devices = st.builds(listed, st.sampled_from("ab"), st.integers(0, 3), st.sampled_from(["CPU", "CUDA0"]))


@given(st.lists(devices, max_size=4), st.lists(devices, max_size=6), st.booleans())
def test_no_device_is_taken_twice(wanted: list[m.ListedDevice], infos: list[m.ListedDevice], others: bool) -> None:
    numbers = found_again(dict(enumerate(wanted)), infos, others)
    assert len(set(numbers.values())) == len(numbers)
    for old, new in numbers.items():
        assert infos[new].name == wanted[old].name
        assert infos[new].process == wanted[old].process or (others and infos[new].worker == wanted[old].worker)
