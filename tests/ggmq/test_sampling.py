"""Sampling: each filter against its definition, and the same seed giving the same tokens."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ggmq.sampling import Sampler, SamplingParams, log_probs

LOGITS = st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=60).map(lambda v: np.array(v, np.float32))


@given(LOGITS, st.integers(0, 1 << 30))
def test_the_same_seed_gives_the_same_tokens(x: np.ndarray, seed: int) -> None:
    a, b = (Sampler(SamplingParams(seed=seed)) for _ in range(2))
    assert [a.pick(x, []) for _ in range(20)] == [b.pick(x, []) for _ in range(20)]


@given(LOGITS)
def test_temperature_0_and_top_k_1_are_greedy(x: np.ndarray) -> None:
    assert Sampler(SamplingParams(temperature=0)).pick(x, []) == int(x.argmax())
    assert Sampler(SamplingParams(top_k=1)).pick(x, []) == int(x.argmax())


@given(LOGITS, st.integers(1, 5), st.floats(0.05, 1), st.floats(0, 1), st.integers(0, 99))
def test_picked_tokens_pass_every_filter(x: np.ndarray, k: int, top_p: float, min_p: float, seed: int) -> None:
    s = Sampler(SamplingParams(1.0, k, top_p, min_p, seed=seed))
    picked = {s.pick(x, []) for _ in range(20)}
    order = list(np.argsort(-x.astype(np.float64), kind="stable"))
    assert all(order.index(t) < k for t in picked)
    p = np.exp(x.astype(np.float64) - x.max())
    assert all(p[t] >= min_p * p.max() * (1 - 1e-9) for t in picked)
    top = p[order[:k]] / p[order[:k]].sum()
    allowed = int(np.searchsorted(np.cumsum(top), top_p)) + 1
    assert all(order.index(t) < allowed for t in picked)


@given(LOGITS)
def test_repeat_penalty_and_banned_tokens(x: np.ndarray) -> None:
    best = int(x.argmax())
    penal = Sampler(SamplingParams(temperature=0, repeat_penalty=100.0))
    y = x.astype(np.float64)
    y[best] = y[best] / 100 if y[best] > 0 else y[best] * 100
    assert penal.pick(x, [best]) == int(y.argmax())
    assert Sampler(SamplingParams(temperature=0, banned=frozenset({best}))).pick(x, []) != best


def test_frequencies_follow_the_probabilities() -> None:
    s = Sampler(SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1))
    x = np.log(np.array([0.5, 0.3, 0.2]))
    counts = np.bincount([s.pick(x, []) for _ in range(20_000)], minlength=3) / 20_000
    assert np.abs(counts - [0.5, 0.3, 0.2]).max() < 0.02


@given(
    LOGITS, st.builds(
        SamplingParams, st.sampled_from([0.0, 0.8, 2.0]), st.integers(0, 12), st.floats(0.1, 1), st.floats(0, 0.2),
        st.sampled_from([1.0, 1.3, 0.7]), st.integers(-1, 4), st.integers(0, 99),
        st.frozensets(st.integers(0, 1), max_size=2),
    ), st.lists(st.integers(0, 1), max_size=6),
)  # fmt: skip
def test_the_candidates_are_enough(x: np.ndarray, params: SamplingParams, previous: list[int]) -> None:
    """What is picked from the largest logits, in any order, is what is picked from all."""
    k = params.n_candidates(len(x))
    if not k:
        return
    ids = np.argsort(-x.astype(np.float64), kind="stable")[:k]
    ids = np.random.default_rng(0).permutation(ids)
    some, every = Sampler(params), Sampler(params)
    assert [some.pick(x[ids], previous, ids) for _ in range(5)] == [every.pick(x, previous) for _ in range(5)]

@given(st.data())
def test_candidates_are_enough_whatever_the_options(data: st.DataObject) -> None:
    """Picking from the largest that are asked for is picking from all."""
    n = 64
    logits = np.array(data.draw(st.lists(st.integers(-20, 20), min_size=n, max_size=n)), np.float32)
    params = SamplingParams(
        temperature=data.draw(st.sampled_from([0.0, 0.7])), top_k=data.draw(st.integers(0, 8)),
        repeat_penalty=data.draw(st.sampled_from([0.5, 1.0, 1.5])), repeat_last_n=data.draw(st.integers(-1, 8)),
        presence_penalty=data.draw(st.sampled_from([-1.0, 0.0, 2.0])), seed=1,
        frequency_penalty=data.draw(st.sampled_from([-0.5, 0.0, 1.0])),
        logit_bias=tuple(data.draw(st.lists(st.tuples(st.integers(0, n - 1), st.sampled_from([-50.0, 3.0])), max_size=3))),
        banned=data.draw(st.frozensets(st.integers(0, n - 1), max_size=3)),
    )  # fmt: skip
    previous = data.draw(st.lists(st.integers(0, n - 1), max_size=12))
    wanted = params.n_candidates(n)
    if not wanted:
        return
    ids = np.sort(np.lexsort((np.arange(n), -logits))[:wanted])[::-1]  # in another order than that of all
    assert Sampler(params).pick(logits[ids], previous, ids) == Sampler(params).pick(logits, previous)


def test_log_probabilities_are_the_models() -> None:
    logits = np.array([1.0, 3.0, 2.0, 3.0], np.float32)
    logprob, top = log_probs(logits, 2, 3)
    p = np.exp(logits) / np.exp(logits).sum()
    assert np.isclose(logprob, np.log(p[2])) and [i for i, _ in top] == [1, 3, 2]
    assert np.allclose([x for _, x in top], np.log(p[[1, 3, 2]])) and log_probs(logits, 0, 0)[1] == ()


def test_penalties_count_what_came() -> None:
    logits = np.array([5.0, 4.0, 3.0], np.float32)
    greedy = {"temperature": 0.0, "repeat_last_n": -1}
    assert Sampler(SamplingParams(**greedy, frequency_penalty=0.6)).pick(logits, [0]) == 0
    assert Sampler(SamplingParams(**greedy, frequency_penalty=0.6)).pick(logits, [0, 0]) == 1
    assert Sampler(SamplingParams(**greedy, presence_penalty=1.5)).pick(logits, [0, 1]) == 0
    assert Sampler(SamplingParams(**greedy, presence_penalty=1.5)).pick(logits, [0]) == 1
    assert Sampler(SamplingParams(**greedy, logit_bias=((2, 3.0),))).pick(logits, []) == 2


def test_only_what_is_allowed_is_taken() -> None:
    logits, allowed = np.arange(8, dtype=np.float32), np.zeros(8, np.bool_)
    allowed[[1, 4]] = True
    assert Sampler(SamplingParams(temperature=0)).pick(logits, [], allowed=allowed) == 4
    free = [SamplingParams(2.0, top_p=1.0, min_p=0, seed=i) for i in range(40)]
    assert {Sampler(p).pick(logits, [], allowed=allowed) for p in free} == {1, 4}
