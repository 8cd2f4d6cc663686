"""Byte-level BPE: how a text is cut into words before merging, by the name that stands in `tokenizer.ggml.pre`.

Source: the tokenizer.json files of the models; llama.cpp's llama-vocab.cpp for the names, and for the expressions of those
without such a file. Categories are those of Unicode 16.0, as the tokenizers library has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_LLAMA3 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?(?:{_UPPER}*{_LOWER}+|{_UPPER}+{_LOWER}*)|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PUNCTUATED = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NO_MARKS = r" ?[^(\s|.,!?…。，、।۔،)]+"


class PreTokenizer(NamedTuple):
    """What a name stands for.

    expressions: each cuts further what those before it left.
    ignore_merges: a word that is a token is one, whatever the merges make of it.
    add_bos: BOS comes first unless the file says otherwise.
    """

    expressions: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_WORDS = PreTokenizer((_GPT2,))
_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_BY_THREES = PreTokenizer((_LLAMA3,))
_BY_THREES_WHOLE = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_BY_ONES = PreTokenizer((_QWEN2,))
_BY_CASE = PreTokenizer((_O200K,))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}$+<=>\^~|]+", _GPT2, r"\p{N}+", "[0-9]{3}")),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "granite-docling", "mellum",
                     "gigachat", "a.x-4.0"), _WORDS),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), _DIGITS),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _BY_THREES),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
                    _BY_THREES_WHOLE),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez", "kormo", "f2llmv2", "grok-2"), _BY_ONES),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _BY_CASE),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "qwen35": PreTokenizer((_QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r"\s\p{L}", r"\s\p{L}\p{M}"),)),
    "falcon": PreTokenizer((r"[\p{P}$+<=>\^~|`]+", _GPT2, "[0-9]{3}")),
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}+")), ignore_merges=True),
    "seed-coder": PreTokenizer((_QWEN2.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+"),)),
    "ufakzeka": PreTokenizer((_QWEN2.removeprefix(_SUFFIX + "|"),)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"),
                    PreTokenizer((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _PUNCTUATED))),
    **dict.fromkeys(("poro-chat", "bloom", "gpt3-finnish"), PreTokenizer((_NO_MARKS,))),
    "viking": PreTokenizer((_NO_MARKS, r"\p{N}")),
}  # fmt: skip


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes. Source: Radford et al., encoder.py's table, here by its rule."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


class BytePairEncoder:
    """Byte-level BPE over a vocabulary, complete or not.

    What a merge makes need not be a token, and a byte's stand-in need not be one: such a piece takes part in merging all
    the same, and is written in the end as those of its ASCII characters that are tokens.
    """

    def __init__(self, ids: Mapping[str, int], merges: Sequence[tuple[str, str]], pre: PreTokenizer) -> None:
        known = dict(ids)
        first_free = max(known.values(), default=-1) + 1
        self._written: dict[int, list[int]] = {}

        def number(piece: str) -> None:
            if piece not in known:
                known[piece] = first_free + len(self._written)
                self._written[known[piece]] = [ids[c] for c in piece if c.isascii() and c in ids]

        for piece in byte_alphabet():
            number(piece)
        for left, right in merges:
            number(left)
            number(right)
            number(left + right)
        # a word that is written in pieces is no token, whatever the library would take it for
        self._whole = ids if pre.ignore_merges and self._written else None
        whole = pre.ignore_merges and self._whole is None
        # of equal merges the first counts
        self._tokenizer = Tokenizer(models.BPE(known, list(dict.fromkeys(merges)), ignore_merges=whole))
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            *(pre_tokenizers.Split(Regex(e), "isolated") for e in pre.expressions),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])

    def encode(self, text: str) -> list[int]:
        """Ids of a text of whole characters."""
        ids: list[int]
        if self._whole is None:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        else:
            ids = []
            for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text):
                ids += [self._whole[word]] if word in self._whole else [t.id for t in self._tokenizer.model.tokenize(word)]
        if not self._written:
            return ids
        return [t for i in ids for t in self._written.get(i, (i,))]
