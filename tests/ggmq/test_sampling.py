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


NEAR = st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0, -3.0])
"""Logits of which many are equal."""
MANY = st.lists(st.one_of(NEAR, st.floats(-10, 10, width=32)), min_size=2, max_size=60).map(
    lambda v: np.array(v, np.float32)
)
PARAMS = st.builds(
    SamplingParams, st.sampled_from([0.0, 0.8, 2.0]), st.integers(0, 12), st.floats(0.1, 1), st.floats(0, 0.2),
    st.sampled_from([1.0, 1.3, 0.7]), st.integers(-1, 4), st.integers(0, 99), st.frozensets(st.integers(0, 70), max_size=2),
    st.sampled_from([0.0, 0.0, 1.5, -0.5]), st.sampled_from([0.0, 0.0, 0.7, -0.3]),
    st.lists(st.tuples(st.integers(0, 70), st.sampled_from([-np.inf, -2.0, -0.5, 0.0, 3.0])), max_size=3).map(tuple),
)  # fmt: skip


@given(MANY, PARAMS, st.lists(st.integers(0, 70), max_size=6))
def test_the_candidates_are_enough(x: np.ndarray, params: SamplingParams, previous: list[int]) -> None:
    """What is picked from the largest logits, in any order, is what is picked from all."""
    k = params.n_candidates(len(x))
    if params.greedy:
        assert k == 1 and Sampler(params).pick(x, previous) == int(x.argmax())
    if not k:
        return
    ids = np.argsort(-x.astype(np.float64), kind="stable")[:k]
    ids = np.random.default_rng(0).permutation(ids)
    some, every = Sampler(params), Sampler(params)
    assert [some.pick(x[ids], previous, ids) for _ in range(5)] == [every.pick(x, previous) for _ in range(5)]


@given(MANY, PARAMS, st.lists(st.integers(0, 70), max_size=6), st.integers(1, 70), st.integers(0, 2**60 - 1))
def test_where_candidates_are_said_to_be_enough_among_allowed_tokens_they_are(
    x: np.ndarray, params: SamplingParams, previous: list[int], m: int, bits: int
) -> None:
    allowed = np.array([bits >> i & 1 for i in range(len(x))], bool)
    allowed[bits % len(x)] = True
    least = np.sort(x)[::-1][min(m, len(x)) - 1]  # of those that are equal any may be candidates
    ids = np.random.default_rng(m).permutation(np.flatnonzero(x >= least))
    ids = ids[np.argsort(-x[ids], kind="stable")][:m]
    some, every = Sampler(params), Sampler(params)
    for _ in range(4):
        token = every.pick(x, previous, allowed=allowed)
        assert allowed[token]
        if some.enough(x[ids], ids, allowed):
            assert some.pick(x[ids], previous, ids, allowed) == token
        else:
            assert some.pick(x, previous, allowed=allowed) == token


def test_candidates_are_enough_in_most_cases_where_much_is_allowed() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=1000).astype(np.float32)
    ids, allowed = np.argsort(-x)[:128], rng.random(1000) < 0.7
    assert Sampler(SamplingParams()).enough(x[ids], ids, allowed)
    assert not Sampler(SamplingParams(top_k=0)).enough(x[ids], ids, allowed)
    allowed[ids] = False
    assert not Sampler(SamplingParams()).enough(x[ids], ids, allowed)


@given(MANY, st.floats(-2, 2), st.floats(-2, 2), st.lists(st.integers(0, 70), max_size=12), st.integers(-1, 12))
def test_penalties_and_biases_are_those_of_llama_cpp(
    x: np.ndarray, presence: float, frequency: float, previous: list[int], n: int
) -> None:
    bias = ((0, 1.25), (1, -0.5))
    y = x.astype(np.float64)
    y[0] += 1.25
    y[1] -= 0.5
    window = previous if n < 0 else previous[len(previous) - n :] if n < len(previous) else previous
    for token in {t for t in window if t < len(x)}:
        y[token] = (y[token] / 1.5 if y[token] > 0 else y[token] * 1.5) - window.count(token) * frequency - presence
    params = SamplingParams(0, 40, 1, 0, 1.5, n, presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias)
    assert Sampler(params).pick(x, previous) == int(y.argmax())
    assert hash(params) == hash(SamplingParams(0, 40, 1, 0, 1.5, n, None, frozenset(), presence, frequency, bias))


@given(MANY, st.integers(0, 70), st.integers(0, 80))
def test_log_probabilities_are_those_of_all_logits(x: np.ndarray, token: int, n: int) -> None:
    token %= len(x)
    own, top = log_probs(x, token, n)
    expected = np.log(np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum())
    assert np.isclose(own, expected[token], rtol=1e-9, atol=1e-12)
    assert [i for i, _ in top] == np.argsort(-x.astype(np.float64), kind="stable")[:n].tolist()
    assert np.allclose([value for _, value in top], expected[[i for i, _ in top]], rtol=1e-9, atol=1e-12)


def test_where_all_is_banned_what_is_allowed_is_taken() -> None:
    x, allowed = np.zeros(4, np.float32), np.array([False, True, True, False])
    for temperature in (0.0, 1.0):
        s = Sampler(SamplingParams(temperature, seed=1, logit_bias=tuple((i, -np.inf) for i in range(4))))
        assert s.pick(x, [], allowed=allowed) == 1


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


def test_logits_that_are_no_numbers_end_nothing() -> None:
    x = np.array([1.0, np.nan, 2.0, np.nan] * 20, np.float32)
    for params in (SamplingParams(seed=1), SamplingParams(top_k=0, seed=1), SamplingParams(1.0, 0, 1.0, 0.0, seed=1)):
        with np.errstate(all="ignore"):
            assert 0 <= Sampler(params).pick(x, []) < len(x)
