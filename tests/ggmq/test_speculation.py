"""Drafts: whatever is drafted, by whomever, each text is the one that comes without."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggmq import engine as engine_module
from ggmq.cluster import Client
from ggmq.draftmodel import DraftModel, check_same
from ggmq.engine import Engine
from ggmq.gguf import GGUF
from ggmq.grammar import Grammars
from ggmq.hub import BUNDLED
from ggmq.model import Model
from ggmq.sampling import SamplingParams
from ggmq.speculation import SIZES, Ask, Drafter, Mode, NGram, Odds, Speculation
from ggmq.tokenizer import Vocabulary
from protocol.errors import ConfigError
from tests.support.gguf_factory import tiny_model
from tests.support.loaded import cpu_workers, loaded
from tests.support.processes import children_of
from tests.support.random_models import base, write
from tests.support.wishes import Wish

GREEDY = SamplingParams(temperature=0)
KINDS = (
    GREEDY, SamplingParams(0, repeat_penalty=1.3), SamplingParams(0.7, 40, 0.95, 0.05), SamplingParams(1.2, 0, 0.9, 0.0),
    SamplingParams(0.7, 100, 1.0, 0.02, 1.1, 32), SamplingParams(0.4, 5, presence_penalty=0.6, frequency_penalty=0.2),
    SamplingParams(0.3, 20, logit_bias=((11, 2.0), (12, -3.0))),
)  # fmt: skip
SPLITS = {"1 worker": [1], "2 workers": [1, 1]}
LONG = bool(os.environ.get("GGMQ_LONG"))


@pytest.fixture(scope="module")
def two() -> Iterator[Client]:
    with cpu_workers(2) as client:
        yield client


def wishes(n: int, n_vocab: int, rng: random.Random) -> list[Wish]:
    """Prompts that repeat themselves and others, with every kind of sampling."""
    out = []
    for i in range(n):
        piece = [rng.randrange(n_vocab) for _ in range(rng.randrange(1, 12))]
        tokens = (piece * 12)[: rng.randrange(1, 90)] if i % 2 else piece
        params = KINDS[i % len(KINDS)]
        out.append(Wish(tuple(tokens), params if params.temperature <= 0 else seeded(params, i), rng.randrange(1, 70)))
    return out


def seeded(params: SamplingParams, seed: int) -> SamplingParams:
    return SamplingParams(**{**{name: getattr(params, name) for name in params.__slots__}, "seed": seed})


def texts(engine: Engine, wanted: Sequence[Wish], rng: random.Random | None = None) -> list[list[int]]:
    """What becomes of each; they join at random times."""
    to_come, sequences = list(wanted), []
    while to_come or engine.busy:
        for _ in range(rng.choice([0, 0, 1, 3]) if rng is not None else len(to_come)):
            if to_come:
                w = to_come.pop(0)
                sequences.append(engine.add(w.tokens, w.params, w.n))
        engine.step()
    return [s.tokens[s.n_prompt :] for s in sequences]


def alone(model: Model, wanted: Sequence[Wish], end_ids: frozenset[int] = frozenset()) -> list[list[int]]:
    return [texts(Engine(model, end_ids), [w])[0] for w in wanted]


class Liar(Drafter):
    """Drafts that are right, wrong, too many, or none."""

    def __init__(self, truth: dict[tuple[int, ...], list[int]], rng: random.Random, n_vocab: int) -> None:
        super().__init__()
        self.truth, self.rng, self.n_vocab = truth, rng, n_vocab

    def follow(self, tokens: Sequence[int]) -> Odds | None:
        return Odds(0.9) if self.rng.random() < 0.9 else None

    def draft(self, tokens: Sequence[int], n: int) -> list[int]:
        whole = next(([*p, *t] for p, t in self.truth.items() if [*p, *t][: len(tokens)] == list(tokens)), [])
        out = whole[len(tokens) : len(tokens) + n]
        out += [self.rng.randrange(self.n_vocab) for _ in range(n - len(out))]
        if self.rng.random() < 0.5:
            out[self.rng.randrange(n)] = self.rng.randrange(self.n_vocab)
        return out[: self.rng.choice([n, n, 1, 0])]


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("n_seq", [1, 4])
def test_whatever_is_drafted_the_texts_are_those_without(
    two: Client, tmp_path: Path, split: list[float], n_seq: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(two, tiny_model(tmp_path / "m.gguf", "llama"), 192, split, n_seq=n_seq)
    n_vocab, rng = model.arch.hp.n_vocab, random.Random(n_seq)
    ends = frozenset({7, 8})
    wanted = wishes(14, n_vocab, rng)
    try:
        plain = alone(model, wanted, ends)
        assert any(t[-1] in ends for t in plain)
        free = dict(model.store.n_free)
        truth = {w.tokens: t for w, t in zip(wanted, plain, strict=True)}
        for mode in ("ngram", "auto"):
            engine = Engine(model, ends, speculate=mode)
            assert texts(engine, wanted, rng) == plain
        monkeypatch.setattr(engine_module, "NGram", lambda: Liar(truth, rng, n_vocab))
        engine = Engine(model, ends, speculate="ngram")
        assert texts(engine, wanted, rng) == plain
        t = engine.timings
        assert 0 < t.n_accepted < t.n_drafted and t.decode_tokens + len(wanted) >= sum(map(len, plain))
        assert model.store.n_free == free
    finally:
        two.drain()


def test_layers_with_a_window_lose_no_page_to_drafts(two: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    m = base("gemma3", random.Random("gemma3 5"), False).having(attention__sliding_window=40)
    model = loaded(two, write(tmp_path / "m.gguf", m), 448, [1, 1], n_seq=4, n_batch=64)
    rng = random.Random(2)
    wanted = [Wish(tuple(rng.randrange(m.n_vocab) for _ in range(rng.choice([1, 30, 90, 250]))), GREEDY, 120)
              for _ in range(8)]  # fmt: skip
    try:
        plain = alone(model, wanted)
        free = dict(model.store.n_free)
        truth = {w.tokens: t for w, t in zip(wanted, plain, strict=True)}
        monkeypatch.setattr(engine_module, "NGram", lambda: Liar(truth, rng, m.n_vocab))
        engine = Engine(model, speculate="ngram")
        assert texts(engine, wanted, rng) == plain and engine.timings.n_accepted
        assert model.store.n_free == free
    finally:
        two.drain()


def test_a_full_context_a_bound_and_a_conversation_end_where_they_would(two: Client, tmp_path: Path) -> None:
    model = loaded(two, tiny_model(tmp_path / "m.gguf", "llama"), 96)
    said: dict[Mode, list[list[int]]] = {"off": [], "ngram": []}
    try:
        for mode, out in said.items():
            model.store.drop_kept()
            engine, tokens = Engine(model, speculate=mode), [1, 2, 3] * 6
            for n in (5, 1, 20, -1):
                engine.start(tokens, GREEDY)
                out.append([*engine.generate(n)])
                tokens = [*tokens, *out[-1], 4]
            out.append([engine.cut != "", engine.timings.decode_tokens])
            assert engine.cut == "context" and (engine.timings.n_accepted > 0) == (mode == "ngram")
            engine.scheduler.leave(engine._conversation)  # type: ignore[arg-type]
        assert said["off"] == said["ngram"]
    finally:
        two.drain()


def test_a_grammar_and_probabilities_are_those_without_drafts(two: Client) -> None:
    vocabulary = Vocabulary(GGUF(BUNDLED))
    model = loaded(two, BUNDLED, 256)
    grammar = Grammars(vocabulary).regex("(Tom has a (red|blue) ball\\. ){8}")
    prompt = vocabulary.encode("Once upon a time")
    made = {}
    try:
        for mode in ("off", "ngram"):
            engine = Engine(model, vocabulary.end_ids, speculate=mode)
            s = engine.add(prompt, SamplingParams(seed=4), 100, n_probs=2, constraint=grammar.start())
            out = []
            while engine.busy:
                out += [(m.token, m.logprob, m.top) for m in engine.step()]
            made[mode] = out, s.finished
            assert mode == "off" or s.n_accepted > 20
        assert made["off"] == made["ngram"]
        assert "Tom has a" in vocabulary.decode([t for t, _, _ in made["off"][0]])
    finally:
        two.drain()


# -- how much is drafted ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.integers(1, 20))
def test_a_lookup_finds_the_last_place_and_goes_round(tokens: list[int], n: int) -> None:
    """Of the prompt the last place of the longest words; while a text grows, whatever it follows."""
    step, whole = NGram(), NGram()
    for i in range(1, len(tokens) + 1):
        step.follow(tokens[:i])
        drafted = step.draft(tokens[:i], n)
        assert not drafted or (len(drafted) == n and set(drafted) <= set(tokens[:i]))
    whole.follow(tokens)
    for length in NGram.LENGTHS:
        places = [i for i in range(length, len(tokens)) if tokens[i - length : i] == tokens[-length:]]
        if places and length <= len(tokens):
            rest = tokens[places[-1] :]
            assert whole.draft(tokens, n) == (rest * n)[:n]
            break
    else:
        assert whole.draft(tokens, n) == []


def test_a_lookup_comes_back_to_its_source_behind_a_changed_word() -> None:
    source = list(range(100, 140))
    text = [*source, 1, 2, *source[:20], 999]
    drafter = NGram()
    for i in range(1, len(text) + 1):
        drafter.follow(text[:i])
    assert drafter.draft(text, 4) == source[21:25]


class Told(Drafter):
    """Right with a fixed chance at each token."""

    def __init__(self, chance: float, step_s: float = 0.0) -> None:
        super().__init__()
        self.odds, self.step_s = Odds(chance), step_s

    def follow(self, tokens: Sequence[int]) -> Odds | None:
        self.begin()  # its text does not grow, so no draft brings anything
        return self.odds

    def draft(self, tokens: Sequence[int], n: int) -> list[int]:
        return [1] * n


def sizes(chance: float, times: dict[int, float], n_seqs: int = 1, step_s: float = 0.0) -> list[int]:
    """How much is drafted in the end, when passes take these times."""
    speculation = Speculation("auto")
    asks = [Ask([Told(chance, step_s)], [1] * 100, 1000, 1000) for _ in range(n_seqs)]
    drafted: list[list[int]] = []
    for i in range(60):
        drafted = speculation.drafts(asks)
        n = n_seqs + sum(map(len, drafted))
        speculation.took(n, times[n], i == 0)
    return [len(d) for d in drafted]


def test_as_much_is_drafted_as_measurements_say() -> None:
    flat = dict.fromkeys(range(1, 40), 1.0)
    steep = {n: float(n) for n in range(1, 40)}
    cpu = {1: 1.0, 4: 1.2, 8: 1.45, 14: 1.9}
    assert sizes(0.95, flat) == [SIZES[-1] - 1]
    assert sizes(0.9, steep) == [0] and sizes(0.05, cpu) == [0] and sizes(0.02, flat) == [0]
    assert sizes(0.5, cpu) == [3] and sizes(0.97, cpu) == [13]
    assert sizes(0.9, flat, step_s=2.0) == [0] and sizes(0.9, flat, step_s=0.01)[0] > 3
    assert sizes(0.9, flat, n_seqs=2) == [7, 7] and sizes(0.9, flat, n_seqs=4) == [3] * 4
    assert sizes(0.99, flat, n_seqs=5) == [0] * 5, "slots are full"


def test_a_graph_is_not_put_for_a_draft_that_cannot_pay_for_it() -> None:
    speculation, n_sent = Speculation("auto"), 0
    ask = Ask([Told(0.6)], [1] * 100, 1000, 1000)
    for i in range(40):
        n_sent += bool(speculation.drafts([ask])[0])
        speculation.took(1, 100.0 if not i else 1.0, not i)  # putting one takes as long as a hundred passes
    assert not n_sent


MS = {1: 22, 2: 29, 3: 36, 4: 44, 5: 55, 6: 65, 7: 76, 8: 90, 9: 97, 10: 104, 11: 111, 12: 118, 13: 125, 14: 135}
"""What passes of a model of 0.85 G parameters took on two cores: a token more costs nearly half of one alone."""


def gain(speculation: Speculation, prompt: list[int], answer: list[int]) -> float:
    """How many times as fast an answer comes with drafts by lookup, by what its passes take."""
    tokens, drafter, spent = [*prompt, answer[0]], NGram(), 0
    while (n := len(tokens) - len(prompt)) < len(answer):
        (drafted,) = speculation.drafts([Ask([drafter], tokens, 500, len(answer) - n - 1)])
        for guess in (*drafted, None):
            tokens.append(answer[len(tokens) - len(prompt)])
            if guess != tokens[-1] or len(tokens) == len(prompt) + len(answer):
                break
        spent += MS[1 + len(drafted)]
        speculation.took(1 + len(drafted), MS[1 + len(drafted)], False)
    return (len(answer) - 1) * MS[1] / spent


@given(st.integers(0, 1 << 32), st.sampled_from([2, 5, 40, 1000]), st.floats(0, 1))
def test_no_text_loses_by_drafts_and_one_that_repeats_its_prompt_gains(seed: int, n_vocab: int, odd: float) -> None:
    speculation, rng = Speculation("auto"), random.Random(seed)

    def text(n: int) -> list[int]:
        out = [rng.randrange(n_vocab)]
        while len(out) < n:
            at, size = rng.randrange(len(out)), rng.randrange(1, 30)
            out += [rng.randrange(n_vocab)] if rng.random() < odd else out[at : at + size]
        return out[:n]

    for _ in range(5):
        assert gain(speculation, text(100), text(400)) >= 0.95
    prompt = [rng.randrange(1000) for _ in range(500)]
    answer = [rng.randrange(1000) if rng.random() < 0.02 else token for token in prompt]
    assert gain(speculation, prompt, answer) >= 1.5


# -- a model that drafts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["draft", "auto"])
@pytest.mark.parametrize("n_seq", [1, 3])
def test_a_draft_model_changes_no_text_whatever_it_says(two: Client, tmp_path: Path, mode: Mode, n_seq: int) -> None:
    path = tiny_model(tmp_path / "m.gguf", "llama")
    model = loaded(two, path, 192, [1, 0], n_seq=n_seq)
    rng = random.Random(n_seq)
    wanted = wishes(7, model.arch.hp.n_vocab, rng)
    try:
        plain = alone(model, wanted)
        for seed in (1, 2):
            small = tiny_model(tmp_path / f"{seed}.gguf", "llama", seed=seed)
            draft = DraftModel(loaded(two, small, 192, [0, 1], n_seq=n_seq))
            free = dict(draft.model.store.n_free)
            engine = Engine(model, speculate=mode, draft=draft)
            assert texts(engine, wanted, rng) == plain
            t = engine.timings
            assert mode == "auto" or t.n_drafted > 0
            if mode == "draft" and seed == 1:
                greedy = [w for w in wanted if w.params == GREEDY]
                t.n_drafted = t.n_accepted = 0
                assert texts(engine, greedy) == [x for x, w in zip(plain, wanted, strict=True) if w.params == GREEDY]
                assert t.n_accepted > 0.7 * t.n_drafted, "it is the same model: what is wrong is behind an end"
            assert draft.model.store.n_free == free
    finally:
        two.drain()


def test_a_draft_model_whose_worker_sleeps_is_done_without(tmp_path: Path) -> None:
    others = set(children_of(os.getpid()))
    path = tiny_model(tmp_path / "m.gguf", "llama")
    prompt = [1, 2, 3] * 5
    with cpu_workers(2) as client:
        pids = sorted(set(children_of(os.getpid())) - others)
        model = loaded(client, path, 256, [1, 0])
        draft = DraftModel(loaded(client, path, 256, [0, 1]))
        name = client.devices()[draft.model.stages[0].assignment.device].worker
        pid = pids[int(name.removeprefix("local"))]
        plain = Engine(model)
        plain.start(prompt, GREEDY)
        text = list(plain.generate(-1))
        plain.scheduler.leave(plain._conversation)  # type: ignore[arg-type]
        plain._forget_conversation()
        notes: list[str] = []
        draft.model.note = notes.append
        engine = Engine(model, speculate="draft", draft=draft)
        engine.start(prompt, GREEDY)
        made = []
        for token in engine.generate(-1):
            made.append(token)
            if len(made) == 20:
                os.kill(pid, signal.SIGSTOP)
            if notes and len(made) > 60:
                os.kill(pid, signal.SIGCONT)
        assert made == text and notes
        client.drain()


def test_a_draft_model_must_have_the_same_vocabulary(tmp_path: Path) -> None:
    a = Vocabulary(GGUF(BUNDLED))
    b = Vocabulary(GGUF(BUNDLED))
    check_same(a, b)
    b.tokens[300] = "other"
    with pytest.raises(ConfigError, match=r"token 300 is .* there and 'other' here"):
        check_same(a, b)
    b.tokens = a.tokens[:-5]
    with pytest.raises(ConfigError, match=f"with {len(a.tokens)} tokens, got {len(a.tokens) - 5}"):
        check_same(a, b)
