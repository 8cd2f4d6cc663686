"""Random texts of the kinds that tokenizers take apart differently."""

from __future__ import annotations

import random
from collections.abc import Sequence

_ASCII = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_WHITESPACE = " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2000\u2003\u2009\u200b\u2028\u2029\u202f\u205f\u3000\ufeff"
_SCRIPTS: Sequence[str] = (
    _ASCII, "àéîõüßÆŒœčŠžǅǲʰⅷªº", "абвгдежзиЙКЛМНОПРСТУФХЦ", "αβγδεζΑΒΓΔΕΖάέΆ",
    "一二三中文字符漢字國語〇〆々", "あいうえおアイウエオーっッ", "한국어의문장각나다ㄱㅏ",
    "العربيةأبتثجحخمَّ", "עבריתאבגדה",
    "हिन्दीनमस्तेका", "ไทยสวัสดีครับ", "বাংলাভাষা",
    "𐐀𐐨𐝀𝒜𝔘𝟘𝟙𠀀𪚥", "😀🎉👩\u200d💻🇩🇪👍🏽❤\ufe0f☃", "e\u0301a\u0300o\u0302\u0323",
    "½¼²³①Ⅻ٣४๓", "€£¥©®™°±×÷→∑∞", "。、，！？「」『』…“”‘’—",
)
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'T", "'RE", "'Ll", "'D", "’s", "'ſ", "' s", "''s", "'x")
_WORDS = ("the", "Hello", "world", "iPhone", "XMLHttp", "don", "it", "we", "l", "naïve", "Straße", "Привет", "ПРИвет", "x")
_DIGITS = "0123456789"

KINDS = ("sweep", "scripts", "whitespace", "digits", "contractions", "special", "invalid", "long")


def _runs(rng: random.Random, alphabets: Sequence[str], n: int, most: int) -> str:
    return "".join("".join(rng.choices(rng.choice(alphabets), k=rng.randint(1, most))) for _ in range(n))


def ordinary(rng: random.Random) -> str:
    """A text as any of the first kinds has it."""
    kind = rng.randrange(4)
    if kind == 0:
        return _runs(rng, (*_SCRIPTS, " ", " ", _PUNCTUATION, _DIGITS), rng.randint(1, 6), 5)
    if kind == 1:
        return _runs(rng, (_WHITESPACE, " ", "\n", "\r\n", _ASCII, _PUNCTUATION), rng.randint(1, 6), 4)
    if kind == 2:
        return _runs(rng, (_DIGITS, _DIGITS, "½²٣४𝟘①", " ", ".,:-/", _ASCII), rng.randint(1, 6), 5)
    parts = (rng.choice(_WORDS) + rng.choice(_CONTRACTIONS) + rng.choice(("", "", " ", "1", "!")) for _ in range(3))
    return rng.choice(("", " ", "\n")) + "".join(parts)


def _sweep(rng: random.Random) -> str:
    out = []
    for _ in range(rng.randint(1, 8)):
        c = rng.randrange(0x110000 if rng.random() < 0.3 else 0x3400)
        out.append(chr(c) if not 0xD800 <= c < 0xE000 else "\ud7ff")
        out.append(rng.choice(("", "", "a", " ", "1", "A", "'", "\n", " b")))
    return "".join(out)


def _special(rng: random.Random, texts: Sequence[str]) -> str:
    out = []
    for _ in range(rng.randint(1, 5)):
        text = rng.choice(texts) if texts else "<s>"
        if rng.random() < 0.25:
            a, b = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
            text = text[a:b]
        out.append(text + rng.choice(("", "", " ", "\n", " \t\r\n\v\f x", "\xa0", "ab", "\u2581")))
    return "".join(out)


def _invalid(rng: random.Random) -> bytes:
    raw = bytearray(ordinary(rng).encode())
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(raw) + 1)
        what = rng.randrange(3)
        if what == 0:
            raw[at:at] = bytes(rng.choices(range(128, 256), k=rng.randint(1, 4)))
        elif what == 1:
            del raw[at : at + 1]
        else:
            raw[at : at + 1] = bytes([rng.randrange(256)])
    return bytes(raw)


def around(code: int) -> bytes:
    """A text in which a code point stands beside letters, digits, blanks, marks and itself."""
    c = chr(code)
    return f"a{c}b1{c}2 {c}.{c}{c}\n{c}\u0301 {c}".encode()


def text(rng: random.Random, kind: str, special: Sequence[str]) -> bytes:
    """One text of a kind. `special`: texts of the vocabulary's special tokens."""
    if kind == "sweep":
        return _sweep(rng).encode()
    if kind == "scripts":
        return _runs(rng, (*_SCRIPTS, " ", _PUNCTUATION), rng.randint(1, 7), 6).encode()
    if kind == "whitespace":
        return _runs(rng, (_WHITESPACE, " ", "\n", "\t", _ASCII, _PUNCTUATION), rng.randint(1, 7), 6).encode()
    if kind == "digits":
        return _runs(rng, (_DIGITS, _DIGITS, "½²٣४𝟘①Ⅻ", " ", ".,:-/", _ASCII), rng.randint(1, 7), 6).encode()
    if kind == "contractions":
        parts = (rng.choice(_WORDS) + rng.choice(_CONTRACTIONS) + rng.choice(("", " ", "\n", "9")) for _ in range(4))
        return "".join(parts).encode()
    if kind == "special":
        return _special(rng, special).encode("utf-8", "surrogateescape")
    if kind == "invalid":
        return _invalid(rng)
    return (ordinary(rng) * rng.randint(20, 200))[:3000].encode()
