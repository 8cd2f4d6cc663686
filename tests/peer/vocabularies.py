"""Vocabularies to compare with: those at hand, and written ones of every kind, odd ones among them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from ggmq.gguf import GGUF
from ggmq.pretokenizers import PRE_TOKENIZERS, byte_alphabet
from ggmq.special import BYTE, CONTROL, END_TEXTS, NORMAL, ROLES, UNDEFINED, UNKNOWN, UNUSED, USER_DEFINED
from tests.peer.strings import ordinary
from tests.support.fixtures import BUNDLED, SHARED
from tests.support.vocabularies import write

N_MERGES = 2500
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>")
SLOW = ("tekken", "gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2", "deepseek-v3", "hunyuan-dense", "joyai-llm",
        "minicpm5", "seed-coder", "ufakzeka")
"""Pre-tokenizers that cost libllama a hundred times what others do."""
OVERLAPPING = ["<|a|>", "<|a|><|b|>", "|b|><|", "<|b|>c", " <|s|> ", "\n\n", "aa", "ab", "ba"]
"""Special tokens that begin within one another."""


def at_hand(more: Path | None) -> Iterator[tuple[str, Path]]:
    """Files with a vocabulary that ggmq reads: the bundled one, the fixtures, those of a directory."""
    paths = [BUNDLED, *sorted((SHARED / "vocab").glob("*.gguf")), *(sorted(more.glob("*.gguf")) if more else ())]
    seen: set[str] = set()
    for path in paths:
        keys = GGUF(path).metadata
        model, pre = (str(keys[k].value) if k in keys else "" for k in ("tokenizer.ggml.model", "tokenizer.ggml.pre"))
        read = model == "llama" or (model == "gpt2" and (pre or "default") in PRE_TOKENIZERS)
        if read and path.stem not in seen:
            seen.add(path.stem)
            yield path.stem, path


def _merges(seed: int) -> list[str]:
    """Merges that cross whatever words a text is cut into, so that each cut shows."""
    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=256 + N_MERGES, show_progress=False, special_tokens=[],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator((ordinary(rng) for _ in range(20_000)), trainer)
    return [" ".join(m) if isinstance(m, list) else m for m in json.loads(tokenizer.to_str())["model"]["merges"]]


def _bpe(merges: list[str], special: Sequence[str] = (), types: int = CONTROL) -> tuple[list[str], list[int]]:
    kinds = dict.fromkeys((*byte_alphabet(), *(m.replace(" ", "") for m in merges)), NORMAL)
    for text in special:
        kinds.setdefault(text, types)
    return list(kinds), list(kinds.values())


def _sentencepiece(rng: random.Random, special: list[tuple[str, int]]) -> tuple[list[str], list[int], list[float]]:
    """Pieces of texts, their scores, and all bytes; the special tokens come first."""
    kinds = dict(special)
    for b in range(256):
        kinds.setdefault(f"<0x{b:02X}>", BYTE)
    for _ in range(6000):
        text = "\u2581" + ordinary(rng).replace(" ", "\u2581")
        at = rng.randrange(len(text))
        for size in range(1, rng.randrange(2, 7)):
            kinds.setdefault(text[at : at + size], NORMAL)
    kinds.pop("", None)
    scores = [0.0 if kind != NORMAL else -rng.randrange(2000) / rng.choice((1, 7)) for kind in kinds.values()]
    return list(kinds), list(kinds.values()), scores


def written(folder: Path, seed: int) -> Iterator[tuple[str, Callable[[], Path]]]:
    """Name and maker of each written vocabulary."""
    merges: list[str] = []

    def trained() -> list[str]:
        if not merges:
            merges.extend(_merges(seed))
        return merges

    def spm(name: str, special: list[tuple[str, int]], bare: bool = False, longer: int = 0, whole: bool = False,
            model: str | None = None, **keys: Any) -> Path:  # fmt: skip
        rng = random.Random(f"{seed} {name}")
        tokens, types, scores = _sentencepiece(rng, special)
        if bare:
            return write(folder / f"{name}.gguf", "llama", tokens, name=model, **keys)
        numbers: list[float] = [int(s) for s in scores] if whole else scores
        return write(folder / f"{name}.gguf", "llama", tokens, types=types + [NORMAL] * longer,
                     scores=numbers + numbers[:longer], name=model, **keys)  # fmt: skip

    usual = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    phi3 = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|placeholder1|>"]
    odd = [("<pad>", UNUSED), ("<x>", UNDEFINED), ("", CONTROL), ("[PAD]", NORMAL), ("<eos>", NORMAL), ("y", UNUSED),
           ("\u269b\0x", NORMAL), ("\n", USER_DEFINED),
           *((t, USER_DEFINED) for t in OVERLAPPING if len(t) != 2)]  # fmt: skip
    yield "spm", lambda: spm("spm", usual)
    yield "spm-bare", lambda: spm("spm-bare", usual, bare=True)
    yield "spm-longer", lambda: spm("spm-longer", usual, longer=3, whole=True)
    yield "spm-phi-3", lambda: spm("spm-phi-3", usual + [(t, CONTROL) for t in phi3], model="Phi-3 mini")
    yield "spm-odd", lambda: spm("spm-odd", usual + odd, add_space_prefix=False, add_eos_token=True,
                                 suppress_tokens=[-1, 5, 1 << 30])  # fmt: skip
    yield "spm-ids", lambda: spm("spm-ids", [("</s>", NORMAL), *((t, CONTROL) for t in OVERLAPPING)], bos_token_id=3,
                                 eos_token_id=2, add_bos_token=False)  # fmt: skip

    def bpe(name: str, special: Sequence[str], kind: int = CONTROL, **keys: Any) -> Path:
        tokens, types = _bpe(trained(), special, kind)
        return write(folder / f"{name}.gguf", "gpt2", tokens, types=types, merges=trained(), **keys)

    for pre in sorted(PRE_TOKENIZERS):
        yield f"bpe-{pre}", lambda pre=pre: bpe(f"bpe-{pre}", ["<|endoftext|>", "<|im_end|>"], pre=pre)  # type: ignore[misc]

    found = [*dict.fromkeys([*END_TEXTS, *(texts[0] for _, texts in ROLES.values())])]
    yield "bpe-harmony", lambda: bpe("bpe-harmony", HARMONY, pre="gpt-4o", eos_token_id=256 + N_MERGES + 5)
    yield "bpe-found", lambda: bpe("bpe-found", found, NORMAL, pre="qwen2")
    yield "bpe-overlapping", lambda: bpe("bpe-overlapping", OVERLAPPING, USER_DEFINED, pre="llama-bpe")

    def edges(pre: str) -> Path:
        # the first and the last byte of a character merge with what stands beside it, unless a cut lies between
        beside = [t for t, b in byte_alphabet().items() if chr(b) in "ab12. \n"]
        first = [t for t, b in byte_alphabet().items() if 0xC2 <= b <= 0xF4]
        last = [t for t, b in byte_alphabet().items() if 0x80 <= b <= 0xBF]
        lines = [f"{a} {b}" for left, right in ((beside, first), (last, beside), (last, first)) for a in left for b in right]
        tokens, types = _bpe(lines)
        return write(folder / f"edges-{pre}.gguf", "gpt2", tokens, types=types, merges=lines, pre=pre)

    for pre in ("default", "gpt-2", "smollm", "llama-bpe", "qwen35", "deepseek-v3"):
        yield f"edges-{pre}", lambda pre=pre: edges(pre)  # type: ignore[misc]

    def bare() -> Path:
        tokens, _ = _bpe(trained())
        return write(folder / "bpe-bare.gguf", "gpt2", tokens, merges=trained())

    def incomplete() -> Path:
        rng = random.Random(seed)
        tokens, _ = _bpe(trained())
        kept = [t for t in tokens if rng.random() < 0.8]
        lines = [m for m in trained() if rng.random() < 0.8]
        rng.shuffle(lines)
        return write(folder / "bpe-incomplete.gguf", "gpt2", kept, merges=lines + rng.sample(lines, 300), pre="gpt-2")

    yield "bpe-bare", bare
    yield "bpe-incomplete", incomplete


_FIM = [texts for role, (_, texts) in ROLES.items() if role.startswith("fim")]
_PIECES = ("a", "b", "\u2581", "\u00e9", "\n", "<", "|", "1", " ")


def random_file(path: Path, rng: random.Random) -> Path:
    """A small vocabulary of which everything is by chance: tokens, types, merges or scores, keys there and not there."""

    def chance(of: float = 0.3) -> bool:
        return rng.random() < of

    special = [*rng.sample(END_TEXTS, rng.randint(0, 6)), *rng.sample(HARMONY, rng.randint(0, 7))]
    special += [rng.choice(texts) for texts in _FIM if chance()]  # of several that fit, libllama takes any
    special += ["".join(rng.choices("<|ab>", k=k)) for k in range(2, 9) if chance(0.5)]
    special += [t for t in ("<unk>", "<s>", "</s>", "", "\n", "a<") if chance(0.5)]
    odd = (NORMAL, UNKNOWN, CONTROL, CONTROL, USER_DEFINED, UNUSED, UNDEFINED)
    keys: dict[str, Any] = {f"add_{k}": chance(0.5) for k in ("bos_token", "eos_token", "space_prefix") if chance()}
    model = rng.choice(("gpt2", "llama"))
    kinds: dict[str, int] = {}
    if model == "llama":
        kinds |= dict.fromkeys((f"<0x{b:02X}>" for b in range(256)), BYTE)
        for _ in range(rng.randint(0, 300)):
            kinds.setdefault("".join(rng.choices(_PIECES, k=rng.randint(1, 5))), NORMAL)
    else:
        pres = [None, "", *(p for p in PRE_TOKENIZERS if p not in SLOW)]
        keys["pre"] = rng.choice(pres)
        alphabet = list(byte_alphabet())
        known, merges = [c for c in alphabet if not chance(0.02)], []
        for _ in range(rng.randint(1, 400)):
            left, right = rng.choice((known, list("ab1\u0120"))), rng.choice((known, list("ab1\u0120")))
            pair = rng.choice(left), rng.choice(right)
            merges.append(" ".join(pair))
            known.append("".join(pair))
        kinds |= dict.fromkeys((t for t in known if not chance(0.05)), NORMAL)
        keys["merges"] = merges
    for text in special:
        kinds.setdefault(text, rng.choice(odd))
    for text in rng.sample(list(kinds), 5):
        if kinds[text] == NORMAL:
            kinds[text] = rng.choice(odd)
    tokens = list(kinds)
    rng.shuffle(tokens)
    named = ("bos", "eos", "unknown", *(k.removesuffix("_token_id") for names, _ in ROLES.values() for k in names))
    keys |= {f"{k}_token_id": rng.randrange(len(tokens)) for k in named if chance(0.15)}
    if chance():
        keys["suppress_tokens"] = [rng.randrange(-5, 400) for _ in range(9)]
    if chance(0.8):
        keys["types"] = [kinds[t] for t in tokens]
    if chance(0.8):
        keys["scores"] = [-float(rng.randrange(99)) for _ in tokens]
    return write(path, model, tokens, name=rng.choice((None, "Phi-3", "x")), **keys)
