"""Tokenizers from GGUF metadata: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`).

Special tokens are split out of the text first; the rest is encoded as llama.cpp encodes it, whose llama-vocab.cpp is the
source for defaults and for which tokens are special.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ggmq.gguf import GGUF
from ggmq.pretokenizers import PRE_TOKENIZERS, BytePairEncoder, byte_alphabet
from ggmq.sentencepiece import SPACE, SentencePieceEncoder
from ggmq.special import BYTE, CONTROL, NORMAL, ROLES, UNKNOWN, USER_DEFINED, Splitter, find_special
from protocol.errors import FormatError

_BYTES = byte_alphabet()
_BPE_DEFAULT_ID = 11
_SURROGATE = re.compile("[\ud800-\udfff]")


def well_formed(text: str) -> str:
    """Text as any encoder takes it: what was no UTF-8 when it came from outside is the replacement character."""
    return _SURROGATE.sub("\ufffd", text)


class Vocabulary:
    """Text to token ids and back.

    Attributes:
        tokens: text of each id; bytes that are no UTF-8 stand there as Python's surrogateescape has them.
        types: kind of each id (NORMAL, CONTROL, ...), where a text that says more than the file's type counts.
        chat_template, tool_template: Jinja, empty for none; the second, where there is one, for conversations with tools.
        bos, eos: ids or None. end_ids: ids after which generation stops. suppressed: ids that are never sampled.
    Errors: FormatError when the metadata does not describe a vocabulary.
    """

    def __init__(self, g: GGUF) -> None:
        self.model = g.text("tokenizer.ggml.model")
        if self.model not in ("gpt2", "llama"):
            raise FormatError(f"{g.path.name}: tokenizer.ggml.model {self.model!r}: expected gpt2 or llama; "
                              "feed token ids with `ggmq logits`")  # fmt: skip
        self.name = g.path.name
        spm = self.model == "llama"
        self.pre = g.text("tokenizer.ggml.pre", "") or "default"
        # as C strings, and none empty
        stored = (t.partition("\0")[0] if "\0" in t else t for t in g.texts("tokenizer.ggml.tokens"))
        self.tokens = [t or f"[EMPTY_{i}]" for i, t in enumerate(stored)]
        n = len(self.tokens)
        if not n:
            raise FormatError(f"{self.name}: tokenizer.ggml.tokens is empty")
        self.ids = {t: i for i, t in enumerate(self.tokens)}
        types = self._each(g, "token_type", NORMAL).astype(np.int64)
        bos, eos, unknown = (1, 2, 0) if spm else (_BPE_DEFAULT_ID, _BPE_DEFAULT_ID, None)
        self.bos, self.eos, self.unknown = (self._id(g, key, default) for key, default in (
            ("bos_token_id", bos), ("eos_token_id", eos), ("unknown_token_id", unknown)))  # fmt: skip
        named = {role: i for role, (keys, _) in ROLES.items() for key in reversed(keys)
                 if (i := self._id(g, key)) is not None}  # fmt: skip
        self.types, self.end_ids = find_special(self.ids, types, named, self.eos)
        self._check_bytes()
        pre = PRE_TOKENIZERS.get(self.pre)
        adds = spm or (pre is not None and pre.add_bos)
        self.add_bos = g.boolean("tokenizer.ggml.add_bos_token", adds) and self.bos is not None
        self.add_eos = g.boolean("tokenizer.ggml.add_eos_token", False) and self.eos is not None
        self.add_space_prefix = g.boolean("tokenizer.ggml.add_space_prefix", True)
        self.tool_template = g.text("tokenizer.chat_template.tool_use", "")
        self.chat_template = g.text("tokenizer.chat_template", "") or self.tool_template
        suppressed = g.numbers("tokenizer.ggml.suppress_tokens", np.empty(0, np.int64))
        self.suppressed = frozenset(int(i) for i in suppressed if 0 <= i < n)
        self._splitters = {parse: self._splitter(g, parse) for parse in (True, False)}
        self._merges = g.texts("tokenizer.ggml.merges") if not spm else []
        self._scores = self._each(g, "scores", 0).tolist() if spm else []

    def _each(self, g: GGUF, key: str, default: int) -> npt.NDArray[np.generic]:
        """An array key's values, one for each token; more are passed over."""
        key, n = f"tokenizer.ggml.{key}", len(self.tokens)
        stored = g.metadata.get(key)
        if stored is None:
            return np.full(n, default)
        values = g.numbers(key, floats=stored.is_array and stored.type in (6, 12) and key.endswith("scores"))
        if len(values) < n:
            raise FormatError(f"{self.name}: {key}: expected {n} entries, got {len(values)}")
        return values[:n]

    def _id(self, g: GGUF, key: str, default: int | None = None) -> int | None:
        """The id that a key names, or the default where there is such a token."""
        i = g.integer(f"tokenizer.ggml.{key}", -1)
        if i in (-1, 0xFFFFFFFF):
            return default if default is not None and default < len(self.tokens) else None
        if not 0 <= i < len(self.tokens):
            v = g.metadata[f"tokenizer.ggml.{key}"]
            raise FormatError(f"{self.name}: byte {v.offset}: tokenizer.ggml.{key}: expected an id below "
                              f"{len(self.tokens)}, got {i}")  # fmt: skip
        return i

    def _splitter(self, g: GGUF, parse_special: bool) -> Splitter:
        kinds = (UNKNOWN, CONTROL, USER_DEFINED) if parse_special else (USER_DEFINED,)
        tokens = [(self.tokens[i], int(i)) for i in np.flatnonzero(np.isin(self.types, kinds))]
        stripped: frozenset[int] = frozenset()
        model = g.text("general.name", "").lower()
        if "phi-3" in model or "phi3" in model:
            stripped = frozenset(i for t, i in tokens if t not in ("<unk>", "<s>", "<|endoftext|>"))
        return Splitter(tokens, stripped)

    def _check_bytes(self) -> None:
        for i in np.flatnonzero(self.types == BYTE):
            if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", self.tokens[i]) is None:
                raise FormatError(f"{self.name}: token {i}: expected a byte token <0x00> to <0xFF>, "
                                  f"got {self.tokens[i]!r}")  # fmt: skip

    def check_rows(self, n_vocab: int) -> None:
        """Errors: FormatError when the model that it is for has another number of tokens."""
        if len(self.tokens) != n_vocab:
            raise FormatError(f"{self.name}: {len(self.tokens)} tokens in the vocabulary, "
                              f"{n_vocab} rows in token_embd.weight")  # fmt: skip

    # -- encoding ------------------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Ids of a text. `add_special` puts BOS and EOS where the model wants them."""
        out = [self.bos] if add_special and self.add_bos and self.bos is not None else []
        after_special = True
        for piece in self._splitters[parse_special].split(text):
            if isinstance(piece, int):
                out.append(piece)
            else:
                out += self._encode_plain(well_formed(piece), after_special)
            after_special = isinstance(piece, int)
        if add_special and self.add_eos and self.eos is not None:
            out.append(self.eos)
        return out

    def encode_middle(self, text: str) -> list[int]:
        """Ids of a plain text that goes on after another: nothing is put in front, and no control token is found in it."""
        out: list[int] = []
        for piece in self._splitters[False].split(text):
            out += [piece] if isinstance(piece, int) else self._encode_plain(well_formed(piece), False)
        return out

    def _encode_plain(self, text: str, after_special: bool) -> list[int]:
        if self.model == "llama":
            return self._sentencepiece.encode((" " if self.add_space_prefix and after_special else "") + text)
        return self._bpe.encode(text)

    @cached_property
    def _sentencepiece(self) -> SentencePieceEncoder:
        return SentencePieceEncoder(self.ids, self._scores, self.unknown)

    @cached_property
    def _bpe(self) -> BytePairEncoder:
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
            if line.isascii() or not _SURROGATE.search(line):
                merges.append((left, right))
        return BytePairEncoder(ids, merges, PRE_TOKENIZERS[self.pre])

    # -- decoding ------------------------------------------------------------------------------------------------------

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes that a token stands for; control tokens give none unless `special`, unused ones none at all."""
        if not 0 <= token < len(self.tokens):
            return b""
        kind, text = int(self.types[token]), self.tokens[token]
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            return text.encode("utf-8", "surrogateescape") if special or kind == USER_DEFINED else b""
        if kind == BYTE:
            return bytes([int(text[3:5], 16)])
        if kind != NORMAL:
            return b""
        if self.model == "llama":
            return text.replace(SPACE, " ").encode("utf-8", "surrogateescape")
        return b"".join(bytes([_BYTES[c]]) if c in _BYTES else c.encode("utf-8", "surrogateescape") for c in text)

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        """Text of tokens; bytes that are no UTF-8 become the replacement character."""
        return b"".join(self.piece(t, special) for t in tokens).decode("utf-8", "replace")


class StreamDecoder:
    """Turns tokens into text as they come and never gives half a character. `shown`: control tokens that are shown."""

    def __init__(self, vocabulary: Vocabulary, special: bool = False, shown: Collection[int] = ()) -> None:
        self._vocabulary, self._special, self._shown = vocabulary, special, shown
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        return self._decoder.decode(self._vocabulary.piece(token, self._special or token in self._shown))

    def finish(self) -> str:
        """What was left of an unfinished character."""
        return self._decoder.decode(b"", True)
