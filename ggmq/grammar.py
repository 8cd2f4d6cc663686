"""Answers of a given form: a JSON schema, a regular expression or a grammar says at each token which others may come.

The llguidance library parses and keeps the state; masks are made here, on the main host.
Source: Willard, Louf: Efficient guided generation; https://github.com/guidance-ai/llguidance for its dialect of Lark.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import Any

import llguidance
import numpy as np
import numpy.typing as npt
from llguidance.gbnf_to_lark import any_to_lark

from ggmq.special import CONTROL
from ggmq.tokenizer import Vocabulary
from protocol.errors import FormatError

MAX_CHARS = 1 << 20
MAX_DEPTH = 128
MAX_KEPT = 64
"""Grammars that stay compiled, the latest used."""
WHITESPACE = r"[ \n\t]{0,20}"
"""Between the parts of JSON: bounded, so that no model falls into endless blanks."""


class Constraint:
    """What one sequence may go on with. A token of a text that has ended is refused.

    Threads: use from one.
    """

    def __init__(self, matcher: Any, n_vocab: int, end_ids: frozenset[int]) -> None:
        self._matcher, self._end_ids = matcher, end_ids
        self._n_vocab = n_vocab
        self._bits = np.zeros(-(-n_vocab // 32), np.uint32)
        self._mask: npt.NDArray[np.bool_] | None = None

    @property
    def ended(self) -> bool:
        """Nothing may follow."""
        return bool(self._matcher.is_stopped())

    @property
    def may_end(self) -> bool:
        return bool(self._matcher.is_accepting())

    def mask(self) -> npt.NDArray[np.bool_]:
        """Which tokens may come: bool [n_vocab]. Those that end an answer may where it is whole; others are none when the
        grammar, or the library's bounds, allow nothing more."""
        if self._mask is None:
            if self.ended:
                allowed = np.zeros(self._n_vocab, np.bool_)
            else:
                self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
                allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little", count=self._n_vocab).view(np.bool_)
            allowed[list(self._end_ids)] = self.may_end
            self._mask = allowed
        return self._mask

    def take(self, token: int) -> None:
        """A token has come."""
        self._mask = None
        if token not in self._end_ids:
            self._matcher.consume_token(token)

    def copy(self) -> Constraint:
        """One in the same state, that goes its own way."""
        return Constraint(self._matcher.deep_copy(), self._n_vocab, self._end_ids)


class Grammar:
    """A compiled form; `start` begins a text of it. Threads: any."""

    def __init__(self, matcher: Any, n_vocab: int, end_ids: frozenset[int]) -> None:
        self._matcher, self._n_vocab, self._end_ids = matcher, n_vocab, end_ids

    def start(self) -> Constraint:
        return Constraint(self._matcher.deep_copy(), self._n_vocab, self._end_ids)


class Grammars:
    """Compiles forms for one vocabulary. What cannot be compiled is a FormatError that says why.

    Threads: any; one compiles at a time.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokenizer: Any = None
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def json_schema(self, schema: Any, where: str = "schema") -> Grammar:
        """JSON that a schema describes (true: any). `where`: what an error names."""
        text = _json(schema, where)
        return self._compiled(where, lambda: llguidance.LLMatcher.grammar_from_json_schema(
            text, defaults={"whitespace_pattern": WHITESPACE}))  # fmt: skip

    def json_object(self, where: str = "json_object") -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"}, where)

    def regex(self, pattern: str, where: str = "regex") -> Grammar:
        """Texts that a regular expression matches from end to end."""
        return self._compiled(where, lambda: llguidance.LLMatcher.grammar_from_regex(_bounded(pattern, where)))

    def lark(self, text: str, where: str = "grammar") -> Grammar:
        """Texts of a Lark grammar, in llguidance's dialect."""
        return self._compiled(where, lambda: llguidance.LLMatcher.grammar_from_lark(_bounded(text, where)))

    def any(self, text: str, where: str = "grammar") -> Grammar:
        """Texts of a grammar in llama.cpp's GBNF or in Lark, whichever it is."""
        return self._compiled(where, lambda: llguidance.LLMatcher.grammar_from_lark(any_to_lark(_bounded(text, where))))

    def _compiled(self, where: str, make: Any) -> Grammar:
        with self._lock:
            try:
                source = str(make())
            except FormatError:
                raise
            except Exception as e:  # the library's readers raise whatever they meet
                raise FormatError(f"{where}: {str(e)[:1000]}") from None
            known = self._kept.get(source)
            if known is not None:
                self._kept.move_to_end(source)
                return known
            matcher = llguidance.LLMatcher(self._tokens(), source, log_level=0)
            if matcher.is_error():
                raise FormatError(f"{where}: {_said(matcher.get_error())}")
            grammar = self._kept[source] = Grammar(matcher, len(self._vocabulary.tokens), self._vocabulary.end_ids)
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
            return grammar

    def _tokens(self) -> Any:
        if self._tokenizer is None:
            tokens = _Tokens(self._vocabulary)
            self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokens), n_vocab=len(tokens.tokens))
        return self._tokenizer


class _Tokens:
    """A vocabulary as llguidance takes it. Control tokens are special; all others are written as text."""

    def __init__(self, v: Vocabulary) -> None:
        self.eos_token_id = v.eos if v.eos is not None else min(v.end_ids, default=0)
        self.bos_token_id = v.bos
        self.special_token_ids = np.flatnonzero(v.types == CONTROL).tolist()
        special = set(self.special_token_ids)
        self.tokens = [v.piece(i, special=i in special) for i in range(len(v.tokens))]
        self._encode = v.encode_middle

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


def _bounded(text: str, where: str) -> str:
    if len(text) > MAX_CHARS:
        raise FormatError(f"{where}: expected at most {MAX_CHARS} characters, got {len(text)}")
    return text


def _json(schema: Any, where: str) -> str:
    """A schema as text, once it is seen that it is no deeper than the library's own reader bears."""
    if not isinstance(schema, (dict, bool)):
        raise FormatError(f"{where}: expected a JSON schema, which is an object, got {type(schema).__name__}")
    level, depth = [schema], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise FormatError(f"{where}: expected at most {MAX_DEPTH} levels, got more")
        level = [x for v in level for x in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())]
    return _bounded(json.dumps(schema), where)


def _said(error: str) -> str:
    """What the library says of a grammar, without the grammar itself."""
    return error.strip().partition("\n\n")[0][:1000]
