"""Random texts through ggmq's tokenizers and libllama's, over vocabularies of every kind.

A text that differs is made as small as it can be and printed with both lists of ids. What differs by choice
(docs/differences.md) is held to differ for the reason given, and counted.
"""

from __future__ import annotations

import argparse
import random
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ggmq.gguf import GGUF
from ggmq.pretokenizers import PRE_TOKENIZERS, BytePairEncoder, byte_alphabet
from ggmq.special import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from ggmq.tokenizer import Vocabulary, well_formed
from tests.peer import libllama, strings, vocabularies

BATCH = 4000
MAX_SHOWN = 3
_SUFFIX = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_CASES = (r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+", r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+"
          r"((?=[\p{L}])([^A-Z]))*")  # fmt: skip
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = f"{_CASES[0]}|{_CASES[1]}|\\p{{N}}{_REST}"
_O200K = f"{_CASES[0]}{_SUFFIX}?|{_CASES[1]}{_SUFFIX}?|\\p{{N}}{{1,3}}{_REST}"
THEIR_EXPRESSIONS = {PRE_TOKENIZERS["tekken"].expressions: _TEKKEN, PRE_TOKENIZERS["gpt-4o"].expressions: _O200K}
"""What libllama cuts by where the model's own expression is kept here: letters beyond A to Z have no case there."""

_UNICODE_16 = (
    "897 1b4e-1b4f 1b7f 1c89-1c8a 2427-2429 31e4-31e5 a7cb-a7cd a7da-a7dc 105c0-105f3 10d40-10d65 10d69-10d85 "
    "10d8e-10d8f 10ec2-10ec4 10efc 11380-11389 1138b 1138e 11390-113b5 113b7-113c0 113c2 113c5 113c7-113ca "
    "113cc-113d5 113d7-113d8 113e1-113e2 116d0-116e3 11bc0-11be1 11bf0-11bf9 11f5a 13460-143fa 16100-16139 "
    "16d40-16d79 18cff 1cc00-1ccf9 1cd00-1ceb3 1e5d0-1e5fa 1e5ff 1f8b2-1f8bb 1f8c0-1f8c1 1fa89 1fa8f 1fabe 1fac6 "
    "1fadc 1fadf 1fae9 1fbcb-1fbef"
)
"""Code points that Unicode 16.0 added, which are unassigned in libllama's table of 15.1."""
_NEW = re.compile("[" + "".join("-".join(chr(int(c, 16)) for c in r.split("-")) for r in _UNICODE_16.split()) + "]")
_LAX = re.compile(rb"[\xc0\xc1\xf5-\xff]|\xe0[\x80-\x9f]|\xed[\xa0-\xbf]|\xf0[\x80-\x8f]|\xf4[\x90-\xbf]")
"""Bytes that libllama reads as characters though they are none in UTF-8 (surrogates, long forms), or ends its process on."""

_ATTRIBUTES = ((libllama.CONTROL, CONTROL), (libllama.UNKNOWN, UNKNOWN), (libllama.USER_DEFINED, USER_DEFINED),
               (libllama.NORMAL, NORMAL), (libllama.BYTE, BYTE), (libllama.UNUSED, UNUSED))  # fmt: skip
_STAND_INS = frozenset(byte_alphabet())


@dataclass
class _Count:
    texts: int = 0
    differences: int = 0
    chosen: dict[str, int] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", help="vocabularies whose name matches this expression")
    parser.add_argument("--kinds", default=",".join(strings.KINDS), help="kinds of texts (default %(default)s)")
    parser.add_argument("--files", type=int, default=20, help="how many random vocabularies (default %(default)s)")
    parser.add_argument("--every", action="store_true", help="first a text for every code point of planes with characters")
    parser.add_argument("--vocabularies", type=Path, help="a directory with more GGUF files, say llama.cpp's models/")


def run(args: argparse.Namespace) -> int:
    """Compare `--n` texts with each vocabulary. The answer is 1 when something differs that is not by choice."""
    kinds = args.kinds.split(",")
    failed = 0
    with tempfile.TemporaryDirectory() as folder, libllama.Peer() as peer:
        makers: list[tuple[str, Callable[[], Path]]] = [
            *((name, lambda path=path: path) for name, path in vocabularies.at_hand(args.vocabularies)),
            *vocabularies.written(Path(folder), args.seed),
            *((f"random-{i}", lambda i=i: vocabularies.random_file(
                Path(folder) / "random.gguf", random.Random(f"{args.seed} {i}"))) for i in range(args.files))]  # fmt: skip
        for name, make in makers:
            if not re.search(args.only, name):
                continue
            try:
                comparison = _Comparison(name, make(), peer)
            except (libllama.PeerRefused, libllama.PeerCrashed) as e:
                lines = str(e).splitlines()
                why = next((line for line in lines if "error" in line), lines[0])
                print(f"{name}: libllama does not read it: {why}", flush=True)
                continue
            failed += not comparison.run(args.n, args.seed, kinds, args.every)
    return int(failed > 0)


class _Comparison:
    """One vocabulary."""

    def __init__(self, name: str, path: Path, peer: libllama.Peer) -> None:
        self.name, self.peer = name, peer
        self.loaded = peer.open(path)
        g = GGUF(path)
        self.v = Vocabulary(g)
        self.theirs: Vocabulary | None = None
        own = PRE_TOKENIZERS.get(self.v.pre) if self.v.model == "gpt2" else None
        if own is not None and own.expressions in THEIR_EXPRESSIONS:
            PRE_TOKENIZERS[self.v.pre] = own._replace(expressions=(THEIR_EXPRESSIONS[own.expressions],))
            self.theirs = Vocabulary(g)
            assert isinstance(self.theirs._bpe, BytePairEncoder)  # made now, of their expression
            PRE_TOKENIZERS[self.v.pre] = own
        self.count = _Count()

    def run(self, n: int, seed: int, kinds: list[str], every: bool) -> bool:
        wrong = self._vocabulary_differs()
        for line in wrong[:MAX_SHOWN]:
            print(f"  {self.name}: {line}", flush=True)
        rng = random.Random(f"{seed} {self.name}")
        special = [self.v.tokens[i] for i, t in enumerate(self.v.types) if t in (CONTROL, UNKNOWN, USER_DEFINED)][:500]
        codes = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000)] if every else []
        start = time.perf_counter()
        for at in range(0, len(codes) + n, BATCH):
            left = min(BATCH, len(codes) + n - at)
            texts = [strings.around(c) for c in codes[at : at + left]]
            texts += [strings.text(rng, self._kind(rng, kinds), special) for _ in range(left - len(texts))]
            self._batch(texts, rng.random() < 0.5, rng.random() < 0.5)
            self.count.texts += left
        c = self.count
        seconds = time.perf_counter() - start
        chosen = "".join(f", {k} by choice: {why}" for why, k in sorted(c.chosen.items()))
        print(f"{self.name}: {c.texts} texts, {c.differences} differ{chosen}; {c.texts / seconds:.0f} texts/s",
              flush=True)  # fmt: skip
        return not wrong and not c.differences

    @staticmethod
    def _kind(rng: random.Random, kinds: list[str]) -> str:
        kind = rng.choice(kinds)
        return kind if kind != "long" or len(kinds) == 1 or rng.random() < 0.02 else kinds[0]

    def _vocabulary_differs(self) -> list[str]:
        """What differs in the vocabulary itself: ids, end tokens, types, pieces."""
        v, there, out = self.v, self.loaded, []
        for what, here, expected in (
            ("bos", -1 if v.bos is None else v.bos, there.bos), ("eos", -1 if v.eos is None else v.eos, there.eos),
            ("add_bos", v.add_bos, there.add_bos), ("add_eos", v.add_eos, there.add_eos),
            ("end tokens", sorted(v.end_ids), sorted(there.end_ids)),
            ("suppressed", sorted(v.suppressed), sorted(set(there.suppressed))),
        ):  # fmt: skip
            if here != expected:
                out.append(f"{what}: {here}, there {expected}")
        for i, (token, bits) in enumerate(zip(v.tokens, there.attributes, strict=True)):
            kind = next((k for bit, k in _ATTRIBUTES if bits & bit), 0)
            if v.types[i] != kind and not (kind == 0 and v.types[i] not in range(1, 7)):
                out.append(f"type of {i} {token!r}: {v.types[i]}, there {kind}")
            pieces = (v.piece(i), v.piece(i, special=True)), (there.pieces[0][i], there.pieces[1][i])
            if pieces[0] != pieces[1]:
                if v.model == "gpt2" and not _STAND_INS.issuperset(token):
                    self._choose("tokens with characters that stand for no byte")
                else:
                    out.append(f"pieces of {i} {token!r}: {pieces[0]}, there {pieces[1]}")
        return out

    # -- texts ---------------------------------------------------------------------------------------------------------

    def _sent(self, text: bytes) -> bytes:
        """What libllama is given: bytes that are no UTF-8 as they are, where it replaces them as ggmq does."""
        if self.v.model == "gpt2" and not _LAX.search(text):
            return text
        return _read(text).encode()

    def _batch(self, texts: list[bytes], add: bool, parse: bool) -> None:
        sent = [self._sent(t) for t in texts]
        try:
            theirs = self.peer.tokenize(sent, add, parse)
        except libllama.PeerCrashed as e:
            if len(texts) == 1:
                print(f"  {self.name}: libllama ended on {texts[0][:200]!r}: {e}", flush=True)
                self._choose("libllama ends its process")
                return
            half = len(texts) // 2
            self._batch(texts[:half], add, parse)
            self._batch(texts[half:], add, parse)
            return
        for text, expected in zip(texts, theirs, strict=True):
            if self._encode(self.v, text, add, parse) != expected:
                self._differs(text, expected, add, parse)

    @staticmethod
    def _encode(v: Vocabulary, text: bytes, add: bool, parse: bool) -> list[int]:
        return v.encode(text.decode("utf-8", "surrogateescape"), add, parse)

    def _choose(self, why: str) -> None:
        self.count.chosen[why] = self.count.chosen.get(why, 0) + 1

    def _agree(self, v: Vocabulary, text: bytes, add: bool, parse: bool) -> bool:
        try:
            return self._encode(v, text, add, parse) == self.peer.tokenize([self._sent(text)], add, parse)[0]
        except libllama.PeerCrashed:
            return True

    def _differs(self, text: bytes, expected: list[int], add: bool, parse: bool) -> None:
        older = _NEW.sub("", _read(text)).encode()
        if _NEW.search(_read(text)) and self._agree(self.v, older, add, parse):
            self._choose("characters of Unicode 16")
            return
        if self.theirs is not None and self._agree(self.theirs, older, add, parse):
            self._choose("the model's own expression")
            return
        self.count.differences += 1
        if self.count.differences > MAX_SHOWN:
            return
        v = self.theirs or self.v
        small = _smallest(text, lambda t: not self._agree(v, t, add, parse))
        print(f"  {self.name}: {small!r} (add_special {add}, parse_special {parse})\n"
              f"    here  {self._encode(v, small, add, parse)}\n"
              f"    there {self.peer.tokenize([self._sent(small)], add, parse)[0]}", flush=True)  # fmt: skip


def _read(text: bytes) -> str:
    return well_formed(text.decode("utf-8", "surrogateescape"))


def _smallest(text: bytes, differs: Callable[[bytes], bool]) -> bytes:
    """A text that still differs and of which no character can be left out."""
    characters: list[str] = list(text.decode("utf-8", "surrogateescape"))
    size = len(characters)
    while size:
        at = 0
        while at < len(characters):
            fewer = characters[:at] + characters[at + size :]
            if differs("".join(fewer).encode("utf-8", "surrogateescape")):
                characters = fewer
            else:
                at += size
        size //= 2
    return "".join(characters).encode("utf-8", "surrogateescape")
