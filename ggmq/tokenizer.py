"""Tokenizers from GGUF metadata: byte-level BPE (`gpt2`) through the tokenizers library, SentencePiece BPE (`llama`).

Special tokens are split out of the text first; the rest is encoded as llama.cpp encodes it.
Source: llama-vocab.cpp for the pre-tokenizers' expressions and for the order of merges.
"""

from __future__ import annotations

import codecs
import heapq
import re
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from ggmq.gguf import GGUF
from protocol.errors import FormatError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPACE = "\u2581"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
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
_GPT2_WHOLE = _GPT2 + r"|\s+"
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2_WHOLE,), "default": (_GPT2_WHOLE,), "phi-2": (_GPT2_WHOLE,), "jina-en": (_GPT2_WHOLE,),
    "mpt": (_GPT2_WHOLE,), "olmo": (_GPT2_WHOLE,), "jais": (_GPT2_WHOLE,), "exaone": (_GPT2_WHOLE,),
    "llama3": (_LLAMA3,), "llama-v3": (_LLAMA3,), "llama-bpe": (_LLAMA3,), "dbrx": (_LLAMA3,), "smaug-bpe": (_LLAMA3,),
    "falcon3": (_LLAMA3,), "pixtral": (_TEKKEN,),
    "qwen2": (_QWEN2,), "stablelm2": (_QWEN2,), "deepseek-r1-qwen": (_QWEN2,), "hunyuan": (_QWEN2,),
    "smollm": (r"\p{N}", _GPT2_WHOLE), "starcoder": (r"\p{N}", _GPT2_WHOLE), "refact": (r"\p{N}", _GPT2_WHOLE),
    "command-r": (r"\p{N}", _GPT2_WHOLE), "codeshell": (r"\p{N}", _GPT2_WHOLE), "minerva-7b": (r"\p{N}", _GPT2_WHOLE),
    "tekken": (_TEKKEN,), "gpt-4o": (_O200K,), "llama4": (_O200K,),
}  # fmt: skip
IGNORE_MERGES = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"})
ADD_BOS = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"})

END_OF_GENERATION = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>",
    "<EOT>", "<|end_of_text|>", "</s>", "<eos>",
})  # fmt: skip


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes. Source: Radford et al., encoder.py's table, here by its rule."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTES = _byte_alphabet()
_SURROGATE = re.compile("[\ud800-\udfff]")


def well_formed(text: str) -> str:
    """Text as any encoder takes it: what was no UTF-8 when it came from outside is the replacement character."""
    return _SURROGATE.sub("\ufffd", text)


class Vocabulary:
    """Text to token ids and back.

    Attributes:
        tokens: text of each id, as stored; bytes that are no UTF-8 stand there as Python's surrogateescape has them.
        types: kind of each id (NORMAL, CONTROL, ...).
        bos, eos: ids or None. end_ids: ids after which generation stops.
    Errors: FormatError when the metadata does not describe a vocabulary.
    """

    def __init__(self, g: GGUF) -> None:
        self.model = g.text("tokenizer.ggml.model")
        if self.model not in ("gpt2", "llama"):
            raise FormatError(f"{g.path.name}: tokenizer.ggml.model {self.model!r}: expected gpt2 or llama; "
                              "feed token ids with `ggmq logits`")  # fmt: skip
        self.name = g.path.name
        self.pre = g.text("tokenizer.ggml.pre", "default")
        self.tokens = g.texts("tokenizer.ggml.tokens")
        n = len(self.tokens)
        if not n:
            raise FormatError(f"{self.name}: tokenizer.ggml.tokens is empty")
        types = g.numbers("tokenizer.ggml.token_type", None)
        self.types = np.full(n, NORMAL) if types is None else types.astype(np.int64)
        scores = g.numbers("tokenizer.ggml.scores", None, floats=True)
        self.scores = np.zeros(n, np.float32) if scores is None else scores
        for key, values in (("token_type", self.types), ("scores", self.scores)):
            if len(values) != n:
                raise FormatError(f"{self.name}: tokenizer.ggml.{key}: expected {n} entries, got {len(values)}")
        self.bos, self.eos, self.unknown, eot = (
            self._id(g, key) for key in ("bos_token_id", "eos_token_id", "unknown_token_id", "eot_token_id"))
        if self.model == "llama":
            self.bos = 1 if self.bos is None and n > 1 else self.bos
            self.eos = 2 if self.eos is None and n > 2 else self.eos
            self.unknown = 0 if self.unknown is None else self.unknown
        spm = self.model == "llama"
        self.add_bos = g.boolean("tokenizer.ggml.add_bos_token", spm or self.pre in ADD_BOS) and self.bos is not None
        self.add_eos = g.boolean("tokenizer.ggml.add_eos_token", False) and self.eos is not None
        self.add_space_prefix = g.boolean("tokenizer.ggml.add_space_prefix", True)
        self.chat_template = g.text("tokenizer.chat_template", "")
        self.ids = {t: i for i, t in enumerate(self.tokens)}
        special = np.flatnonzero(np.isin(self.types, (CONTROL, USER_DEFINED)))
        self.end_ids = frozenset({i for i in (self.eos, eot) if i is not None} | {
            int(i) for i in special if self.tokens[i] in END_OF_GENERATION})
        self._special = {True: self._splitter(special), False: self._splitter(
            np.flatnonzero(self.types == USER_DEFINED))}
        self._merges = g.texts("tokenizer.ggml.merges") if not spm else []
        if spm:
            self._byte_ids = self._byte_tokens()

    def _id(self, g: GGUF, key: str) -> int | None:
        i = g.integer(f"tokenizer.ggml.{key}", -1)
        if i in (-1, 0xFFFFFFFF):
            return None
        if not 0 <= i < len(self.tokens):
            v = g.metadata[f"tokenizer.ggml.{key}"]
            raise FormatError(f"{self.name}: byte {v.offset}: tokenizer.ggml.{key}: expected an id below "
                              f"{len(self.tokens)}, got {i}")  # fmt: skip
        return i

    def _splitter(self, ids: Iterable[int]) -> re.Pattern[str] | None:
        texts = sorted((self.tokens[i] for i in ids if self.tokens[i]), key=len, reverse=True)
        return re.compile("|".join(re.escape(t) for t in texts)) if texts else None

    def _byte_tokens(self) -> dict[int, int]:
        """Id of each byte's token. Errors: FormatError for one that is not written `<0x00>` to `<0xFF>`."""
        out: dict[int, int] = {}
        for i in np.flatnonzero(self.types == BYTE):
            match = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", self.tokens[i])
            if match is None:
                raise FormatError(f"{self.name}: token {i}: expected a byte token <0x00> to <0xFF>, "
                                  f"got {self.tokens[i]!r}")  # fmt: skip
            out[int(match[1], 16)] = int(i)
        return out

    # -- encoding ------------------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Ids of a text. `add_special` puts BOS and EOS where the model wants them."""
        out = [self.bos] if add_special and self.add_bos and self.bos is not None else []
        at, after_special = 0, True
        splitter = self._special[parse_special]
        for match in splitter.finditer(text) if splitter is not None else ():
            out += self._encode_plain(text[at : match.start()], after_special)
            out.append(self.ids[match[0]])
            at, after_special = match.end(), True
        out += self._encode_plain(text[at:], after_special)
        if add_special and self.add_eos and self.eos is not None:
            out.append(self.eos)
        return out

    def _encode_plain(self, text: str, after_special: bool) -> list[int]:
        if not text:
            return []
        text = well_formed(text)
        if self.model == "llama":
            return self._encode_spm((" " if self.add_space_prefix and after_special else "") + text)
        return [int(i) for i in self._bpe.encode(text, add_special_tokens=False).ids]

    @cached_property
    def _bpe(self) -> Tokenizer:
        if self.pre not in PRE_TOKENIZERS:
            raise FormatError(f"{self.name}: tokenizer.ggml.pre {self.pre!r} is unknown; expected one of "
                              f"{', '.join(sorted(PRE_TOKENIZERS))}")  # fmt: skip
        # a token that is no UTF-8 has an id and bytes, but no text leads to it, and the library takes none such
        ids = {t: i for t, i in self.ids.items() if t.isascii() or not _SURROGATE.search(t)}
        merges = []
        for i, line in enumerate(self._merges):
            left, space, right = line[:1] + line[1:].partition(" ")[0], *line[1:].partition(" ")[1:]
            if not space or not right or not left:
                raise FormatError(f"{self.name}: merge {i}: expected two pieces, got {line!r}")
            if left in ids and right in ids and left + right in ids:
                merges.append((left, right))
        tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=self.pre in IGNORE_MERGES))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            *(pre_tokenizers.Split(Regex(e), "isolated") for e in PRE_TOKENIZERS[self.pre]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])
        return tokenizer

    def _encode_spm(self, text: str) -> list[int]:
        """Merge neighbours, the best-scored pair first, until none is left; what is no token becomes bytes.

        Source: Kudo and Richardson, SentencePiece, in llama.cpp's order: ties go to the leftmost pair.
        """
        symbols = list(text.replace(" ", SPACE))
        n = len(symbols)
        before, after = list(range(-1, n - 1)), [*range(1, n), -1]
        queue: list[tuple[float, int, int, int]] = []

        def offer(left: int, right: int) -> None:
            if left < 0 or right < 0:
                return
            piece = symbols[left] + symbols[right]
            i = self.ids.get(piece)
            if i is not None:
                heapq.heappush(queue, (-float(self.scores[i]), left, right, len(piece)))

        for i in range(n - 1):
            offer(i, i + 1)
        while queue:
            _, left, right, size = heapq.heappop(queue)
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != size:
                continue
            symbols[left] += symbols[right]
            symbols[right] = ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        out: list[int] = []
        for piece in symbols:
            if not piece:
                continue
            whole = self.ids.get(piece)
            if whole is not None:
                out.append(whole)
            else:
                raw = piece.encode("utf-8", "surrogateescape")
                known = [self._byte_ids.get(b, self.unknown) for b in raw]
                out += [k for k in known if k is not None]
        return out

    # -- decoding ------------------------------------------------------------------------------------------------------

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes that a token stands for; control tokens give none unless `special`."""
        if not 0 <= token < len(self.tokens):
            return b""
        kind, text = int(self.types[token]), self.tokens[token]
        if kind in (CONTROL, UNKNOWN):
            return text.encode("utf-8", "surrogateescape") if special else b""
        if kind == USER_DEFINED:
            return text.encode("utf-8", "surrogateescape")
        if self.model == "llama":
            if kind == BYTE:
                return bytes([int(text[3:5], 16)])
            return text.replace(SPACE, " ").encode("utf-8", "surrogateescape")
        return b"".join(bytes([_BYTES[c]]) if c in _BYTES else c.encode("utf-8", "surrogateescape") for c in text)

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        """Text of tokens; bytes that are no UTF-8 become the replacement character."""
        return b"".join(self.piece(t, special) for t in tokens).decode("utf-8", "replace")


class StreamDecoder:
    """Turns tokens into text as they come and never gives half a character."""

    def __init__(self, vocabulary: Vocabulary, special: bool = False) -> None:
        self._vocabulary, self._special = vocabulary, special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        return self._decoder.decode(self._vocabulary.piece(token, self._special))

    def finish(self) -> str:
        """What was left of an unfinished character."""
        return self._decoder.decode(b"", True)
