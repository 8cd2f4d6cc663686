"""`python -m bench speculation`: tokens a second with guesses and without, in pairs, on texts of several kinds.

Random weights edit no JSON, so what is made of each prompt is given: a sampler takes, behind each token, the next of the
text, whatever the logits are. Passes, candidates and guesses are as they would be with a model that says so.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence as Tokens
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt

from bench.models import LARGE, write_model
from ggmq.archs import open_arch
from ggmq.cluster import Client, LocalBus
from ggmq.engine import Engine
from ggmq.gguf import GGUF
from ggmq.model import Model, ModelConfig, place_model
from ggmq.sampling import Sampler, SamplingParams
from ggmq.scheduler import Sequence
from ggmq.speculation import SIZES, Mode

FIRST_ID = 300
N_CTX = 2048
MODES: tuple[Mode, Mode] = ("off", "auto")


class Text(NamedTuple):
    """A prompt and the answer that comes. aim: so many times the rate without guesses, at least."""

    name: str
    prompt: list[int]
    answer: list[int]
    aim: float


class Given(Sampler):
    """Takes the next token of a text that is known (a stand-in for a model's choice)."""

    def __init__(self, n_prompt: int, answer: Tokens[int]) -> None:
        super().__init__(SamplingParams())
        self._n_prompt, self._answer = n_prompt, answer

    def pick(self, logits: npt.NDArray[Any], previous: Tokens[int], ids: npt.NDArray[Any] | None = None,
             allowed: npt.NDArray[Any] | None = None) -> int:  # fmt: skip
        super().pick(logits, previous, ids, allowed)
        return self._answer[len(previous) - self._n_prompt]


class Words:
    """Numbers for words as a tokenizer would have them: letters, digits by three, blanks, signs."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def tokens(self, text: str) -> list[int]:
        words = re.findall(r" ?[A-Za-z]+|\d{1,3}|\s+|[^\w\s]+|.", text)
        return [self._ids.setdefault(w, FIRST_ID + len(self._ids)) for w in words]


def texts(seed: int) -> list[Text]:
    rng, words = random.Random(seed), Words()
    names = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ira", "Jo"]
    records = [{"id": rng.randrange(1000, 9999), "name": rng.choice(names), "city": rng.choice(names) + "ville",
                "active": True, "score": _score(rng), "tags": rng.sample(names, 2)} for _ in range(12)]  # fmt: skip
    before = json.dumps(records, indent=2)
    for r in rng.sample(records, 4):
        r["active"] = False
        r["score"] = _score(rng)
    edited = json.dumps(records, indent=2)
    code = "\n".join(f"def {n.lower()}_{i}(value):\n    return value * {i} + {rng.randrange(99)}\n"
                     for i, n in enumerate(rng.sample(names, 8)))  # fmt: skip
    prose = _prose(rng, words, 260)
    renamed = words.tokens(code.replace("value", "x"))
    return [
        Text("a JSON edit", words.tokens(f"Set four records to inactive:\n{before}\n"), words.tokens(edited), 1.7),
        Text("code with a name changed", words.tokens(f"Rename value:\n{code}\n"), renamed, 0.97),
        Text("prose", prose[:60], prose[60:], 0.97),
        Text("words by chance", _chance(rng, 60), _chance(rng, 200), 0.97),
        Text("bytes by chance of 40", _few(rng, 60), _few(rng, 200), 0.97),
    ]  # fmt: skip


def _score(rng: random.Random) -> float:
    return round(rng.random() * 100, 2)


def _prose(rng: random.Random, words: Words, n: int) -> list[int]:
    """Words as often as in a language, a few of them always together."""
    pairs = [f" of the word{chr(97 + i)}" for i in range(8)]
    out: list[int] = []
    while len(out) < n:
        rank = min(int(rng.paretovariate(0.9)), 3000)
        out += words.tokens(rng.choice(pairs)) if rng.random() < 0.08 else [5000 + rank]
    return out[:n]


def _chance(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(FIRST_ID, LARGE.n_vocab) for _ in range(n)]


def _few(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(FIRST_ID, FIRST_ID + 40) for _ in range(n)]


class Passes:
    """What the passes of a side were: their sizes, how long each took, and the time that guessing took on the main host."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.seconds: list[tuple[int, float]] = []
        self.guessing_s = 0.0
        guess = engine.scheduler.draft

        def timed(sequences: list[Sequence]) -> Tokens[Tokens[int]]:
            start = time.perf_counter()
            try:
                return guess(sequences)
            finally:
                self.guessing_s += time.perf_counter() - start

        engine.scheduler.draft = timed

    def make(self, text: Text) -> float:
        """Returns: tokens a second behind the first."""
        engine = self.engine
        engine.model.store.drop_kept()
        s = engine.add(text.prompt, SamplingParams(), len(text.answer))
        s.sampler = Given(len(text.prompt), text.answer)
        while not s.n_made:
            engine.step()
        begun = last = time.perf_counter()
        while not s.finished:
            n_drafted = engine.timings.n_drafted
            if engine.step():
                now = time.perf_counter()
                self.seconds.append((1 + engine.timings.n_drafted - n_drafted, now - last))
                last = now
        assert s.tokens[s.n_prompt :] == text.answer
        return (s.n_made - 1) / (last - begun)


class Row(NamedTuple):
    """Of one kind of text: all its passes, and a number each round: the ratio by the clock, the sizes of the passes with
    guesses, the time that guessing took, and tokens made."""

    aim: float
    seconds: list[tuple[int, float]]
    clock: list[float]
    sizes: list[Counter[int]]
    guessing_s: list[float]
    n_made: list[int]


def measure(folder: Path, rounds: int) -> None:
    path = folder / "llama-0.85b-q4_0.gguf"
    write_model(path)
    rows: dict[str, Row] = {}
    bus = LocalBus()
    try:
        bus.spawn("CPU", 2)
        model = _loaded(bus.start(), GGUF(path))
        without, guessed = (Passes(Engine(model, speculate=mode)) for mode in MODES)
        for text in texts(0):  # graphs are put, passes timed
            without.make(text)
            guessed.make(text)
        for i in range(rounds):
            for text in texts(1 + i):
                before_s = guessed.guessing_s
                guessed.seconds, without.seconds = [], []
                order = (without, guessed) if i % 2 else (guessed, without)
                found = {side: side.make(text) for side in order}
                row = rows.setdefault(text.name, Row(text.aim, [], [], [], [], []))
                row.seconds.extend(guessed.seconds + without.seconds)
                row.clock.append(found[guessed] / found[without])
                row.sizes.append(Counter(size for size, _ in guessed.seconds))
                row.guessing_s.append(guessed.guessing_s - before_s)
                row.n_made.append(len(text.answer) - 1)
    finally:
        bus.close()
    show(rows)


def show(rows: dict[str, Row]) -> None:
    """By the clock a pair differs by some parts in a hundred though both sides do the same. So the passes are counted too:
    what those of a text take by the median of their size, and guessing, against a pass for each token."""
    print("| decode with guesses by lookup ÷ without | by passes: median | least | by clock: median | least | most | aim | "
          f"ms of a pass of 1, {', '.join(map(str, SIZES))} |")  # fmt: skip
    print("|---" * 8 + "|")
    for name, r in rows.items():
        pass_s = {size: statistics.median(s for n, s in r.seconds if n == size) for size in {n for n, _ in r.seconds}}
        passes = [n * pass_s[1] / (sum(pass_s[size] * k for size, k in sizes.items()) + s)
                  for n, sizes, s in zip(r.n_made, r.sizes, r.guessing_s, strict=True)]  # fmt: skip
        figures = [statistics.median(passes), min(passes), statistics.median(r.clock), min(r.clock), max(r.clock), r.aim]
        each = ", ".join(f"{1e3 * pass_s[size]:.0f}" if size in pass_s else "-" for size in (1, *SIZES))
        print(f"| {name} | {' | '.join(f'{x:.2f}' for x in figures)} | {each} |")


def _loaded(client: Client, file: GGUF) -> Model:
    model = place_model(ModelConfig(file.path, N_CTX), open_arch(file), client)
    model.load()
    return model
