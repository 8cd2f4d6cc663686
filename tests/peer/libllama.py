"""libllama through ctypes, in a child process: whatever it does, the one who asks goes on.

The library is `$GGMQ_LIBLLAMA`, or else the one inside xllamacpp (`pip install ggmq[peers]`), which exports the whole C
interface. The first fields of its two structs of parameters are declared here as include/llama.h has them, held against
their defaults when the library is opened, and followed by room for whatever a version adds.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

F16, FLASH_OFF = 1, 0
UNKNOWN, UNUSED, NORMAL, CONTROL, USER_DEFINED, BYTE, LSTRIP, RSTRIP = 1, 2, 4, 8, 16, 32, 128, 256
"""Bits of a token's attributes."""


class PeerRefused(Exception):
    """libllama would not load a file; the message is what it said."""


class PeerCrashed(Exception):
    """libllama ended its process (it aborts on what it does not expect); the message is the end of what it said."""


def library_path() -> Path | None:
    """Where libllama is, or None. Errors: FileNotFoundError when `$GGMQ_LIBLLAMA` names no file."""
    named = os.environ.get("GGMQ_LIBLLAMA")
    if named:
        if not Path(named).exists():
            raise FileNotFoundError(f"GGMQ_LIBLLAMA={named}: no such file; give the path of libllama.so")
        return Path(named)
    spec = find_spec("xllamacpp")
    places = spec.submodule_search_locations if spec is not None else None
    return next((p for place in places or () for p in sorted(Path(place).glob("xllamacpp*.so"))), None)


# -- the C interface ---------------------------------------------------------------------------------------------------


class _ModelParams(ctypes.Structure):
    _fields_ = [
        ("devices", ctypes.c_void_p), ("tensor_buft_overrides", ctypes.c_void_p), ("n_gpu_layers", ctypes.c_int32),
        ("split_mode", ctypes.c_int32), ("load_mode", ctypes.c_int32), ("lazy_mode", ctypes.c_int32),
        ("main_gpu", ctypes.c_int32), ("tensor_split", ctypes.c_void_p), ("progress_callback", ctypes.c_void_p),
        ("progress_callback_user_data", ctypes.c_void_p), ("kv_overrides", ctypes.c_void_p),
        ("vocab_only", ctypes.c_bool), ("check_tensors", ctypes.c_bool), ("use_extra_bufts", ctypes.c_bool),
        ("rest", ctypes.c_ubyte * 256),
    ]  # fmt: skip


class _ContextParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max",
                                               "n_outputs_max_per_seq")),
        *((name, ctypes.c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type",
                                              "pooling_type", "attention_type", "flash_attn_type")),
        *((name, ctypes.c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor",
                                              "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", ctypes.c_uint32), ("defrag_thold", ctypes.c_float), ("cb_eval", ctypes.c_void_p),
        ("cb_eval_user_data", ctypes.c_void_p), ("type_k", ctypes.c_int32), ("type_v", ctypes.c_int32),
        ("rest", ctypes.c_ubyte * 256),
    ]  # fmt: skip


class _Batch(ctypes.Structure):
    _fields_ = [("n_tokens", ctypes.c_int32), ("token", ctypes.c_void_p), ("embd", ctypes.c_void_p),
                ("pos", ctypes.c_void_p), ("n_seq_id", ctypes.c_void_p), ("seq_id", ctypes.c_void_p),
                ("logits", ctypes.c_void_p)]  # fmt: skip


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_INT, _POINTER, _BOOL, _STRING = ctypes.c_int32, ctypes.c_void_p, ctypes.c_bool, ctypes.c_char_p
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_Log, _POINTER]),
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_load_from_file": (_POINTER, [_STRING, _ModelParams]),
    "llama_model_free": (None, [_POINTER]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_init_from_model": (_POINTER, [_POINTER, _ContextParams]),
    "llama_free": (None, [_POINTER]),
    "llama_decode": (_INT, [_POINTER, _Batch]),
    "llama_get_logits_ith": (_POINTER, [_POINTER, _INT]),
    "llama_set_embeddings": (None, [_POINTER, _BOOL]),
    "llama_get_embeddings_ith": (_POINTER, [_POINTER, _INT]),
    "llama_get_embeddings_seq": (_POINTER, [_POINTER, _INT]),
    "llama_model_n_embd": (_INT, [_POINTER]),
    "llama_get_memory": (_POINTER, [_POINTER]),
    "llama_memory_clear": (None, [_POINTER, _BOOL]),
    "llama_vocab_type": (_INT, [_POINTER]),
    "llama_vocab_n_tokens": (_INT, [_POINTER]),
    "llama_vocab_get_text": (_STRING, [_POINTER, _INT]),
    "llama_vocab_get_score": (ctypes.c_float, [_POINTER, _INT]),
    "llama_vocab_get_attr": (_INT, [_POINTER, _INT]),
    "llama_vocab_is_eog": (_BOOL, [_POINTER, _INT]),
    "llama_vocab_get_suppress_tokens": (_POINTER, [_POINTER, ctypes.POINTER(_INT)]),
    **{f"llama_vocab_{name}": (_INT, [_POINTER]) for name in ("bos", "eos", "eot", "nl")},
    **{f"llama_vocab_get_{name}": (_BOOL, [_POINTER]) for name in ("add_bos", "add_eos")},
    "llama_tokenize": (_INT, [_POINTER, _STRING, _INT, _POINTER, _INT, _BOOL, _BOOL]),
    "llama_token_to_piece": (_INT, [_POINTER, _INT, _POINTER, _INT, _INT, _BOOL]),
}


@dataclass(frozen=True)
class Loaded:
    """What libllama made of a file's vocabulary.

    Shapes: `attributes`, `texts`, `pieces` (without and with `special`) have one entry a token.
    """

    type: int
    bos: int
    eos: int
    eot: int
    add_bos: bool
    add_eos: bool
    end_ids: frozenset[int]
    suppressed: tuple[int, ...]
    attributes: npt.NDArray[np.int32]
    texts: list[bytes]
    pieces: tuple[list[bytes], list[bytes]]


class _Library:
    """libllama in this process, with at most one file open."""

    def __init__(self, path: Path) -> None:
        self._lib = ctypes.CDLL(str(path))
        self._said: list[str] = []
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._lib, name)
            function.restype, function.argtypes = result, arguments
        self._log = _Log(self._hear)
        self._lib.llama_log_set(self._log, None)
        self._lib.llama_backend_init()
        self._model = self._vocab = None
        self.n_vocab = 0
        model, context = self._lib.llama_model_default_params(), self._lib.llama_context_default_params()
        found = (model.n_gpu_layers, model.split_mode, model.vocab_only, model.check_tensors, model.use_extra_bufts,
                 context.n_ctx, context.n_batch, context.n_ubatch, context.n_seq_max, context.rope_scaling_type,
                 context.flash_attn_type, context.type_k, context.type_v)  # fmt: skip
        expected = (-1, 1, False, False, True, 512, 2048, 512, 1, -1, -1, F16, F16)
        if found != expected:
            raise RuntimeError(f"{path}: the defaults of its parameters are {found}, expected {expected}; compare "
                               "tests/peer/libllama.py with its include/llama.h")  # fmt: skip

    def _hear(self, level: int, text: bytes | None, _: object) -> None:
        if level >= 3 and text:
            self._said = [*self._said[-30:], text.decode("utf-8", "replace")]

    def open(self, path: str, vocab_only: bool) -> Loaded:
        lib = self._lib
        if self._model:
            lib.llama_model_free(self._model)
            self._model = self._vocab = None
        self._said.clear()
        p = lib.llama_model_default_params()
        p.n_gpu_layers, p.vocab_only, p.use_extra_bufts = 0, vocab_only, False
        self._model = lib.llama_model_load_from_file(os.fsencode(path), p)
        if not self._model:
            raise PeerRefused("".join(self._said).strip())
        v = self._vocab = lib.llama_model_get_vocab(self._model)
        n = self.n_vocab = lib.llama_vocab_n_tokens(v)
        kind = lib.llama_vocab_type(v)
        count = _INT()
        suppressed = lib.llama_vocab_get_suppress_tokens(v, count)
        ids = range(n if kind else 0)
        return Loaded(
            kind, lib.llama_vocab_bos(v), lib.llama_vocab_eos(v), lib.llama_vocab_eot(v), lib.llama_vocab_get_add_bos(v),
            lib.llama_vocab_get_add_eos(v), frozenset(i for i in ids if lib.llama_vocab_is_eog(v, i)),
            tuple((_INT * count.value).from_address(suppressed)) if count.value else (),
            np.array([lib.llama_vocab_get_attr(v, i) for i in ids], np.int32),
            [lib.llama_vocab_get_text(v, i) for i in ids],
            ([self._piece(i, False) for i in ids], [self._piece(i, True) for i in ids]))  # fmt: skip

    def _piece(self, token: int, special: bool) -> bytes:
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def tokenize(self, texts: Sequence[bytes], add_special: bool, parse_special: bool) -> list[list[int]]:
        room = 64 + 6 * max(map(len, texts), default=0)  # a blank is three bytes, and may come after each token
        ids = (_INT * room)()
        out = []
        for text in texts:
            n = self._lib.llama_tokenize(self._vocab, text, len(text), ids, room, add_special, parse_special)
            if n < 0:
                raise RuntimeError(f"a text of {len(text)} bytes has {-n} tokens, expected at most {room}")
            out.append(ids[:n])
        return out

    def _decode(self, context: int, tokens: npt.NDArray[np.int32], at: int, all_logits: bool) -> None:
        n = len(tokens)
        pos, counts = np.arange(at, at + n, dtype=np.int32), np.ones(n, np.int32)
        sequence = np.zeros(1, np.int32)
        sequences = np.full(n, sequence.ctypes.data, np.uintp)
        wanted = np.zeros(n, np.int8)
        wanted[0 if all_logits else -1 :] = 1
        batch = _Batch(n, tokens.ctypes.data, None, pos.ctypes.data, counts.ctypes.data, sequences.ctypes.data,
                       wanted.ctypes.data)  # fmt: skip
        failed = self._lib.llama_decode(context, batch)
        if failed:
            raise RuntimeError(f"llama_decode of {n} tokens at {at} answered {failed}: {''.join(self._said).strip()}")

    def _context(self, n_ctx: int, n_threads: int, pooling: int = -1) -> int:
        p = self._lib.llama_context_default_params()
        p.pooling_type = pooling
        p.n_ctx = p.n_batch = p.n_ubatch = n_ctx
        p.n_threads = p.n_threads_batch = n_threads
        p.flash_attn_type, p.type_k, p.type_v = FLASH_OFF, F16, F16
        self._said.clear()
        context = self._lib.llama_init_from_model(self._model, p)
        if not context:
            raise PeerRefused("".join(self._said).strip())
        return int(context)

    def _row(self, context: int, i: int) -> npt.NDArray[np.float32]:
        return np.ctypeslib.as_array((ctypes.c_float * self.n_vocab).from_address(
            self._lib.llama_get_logits_ith(context, i)))  # fmt: skip

    def logits(self, tokens: list[int], n_ctx: int, n_threads: int) -> npt.NDArray[np.float32]:
        context = self._context(n_ctx, n_threads)
        try:
            self._decode(context, np.array(tokens, np.int32), 0, True)
            return np.stack([self._row(context, i) for i in range(len(tokens))])
        finally:
            self._lib.llama_free(context)

    def embeddings(self, tokens: list[int], n_ctx: int, n_threads: int, pooling: int) -> npt.NDArray[np.float32]:
        lib = self._lib
        context, n_embd = self._context(n_ctx, n_threads, pooling), lib.llama_model_n_embd(self._model)
        try:
            lib.llama_set_embeddings(context, True)
            self._decode(context, np.array(tokens, np.int32), 0, True)
            at = [lib.llama_get_embeddings_seq(context, 0)] if pooling else \
                 [lib.llama_get_embeddings_ith(context, i) for i in range(len(tokens))]  # fmt: skip
            return np.stack([np.ctypeslib.as_array((ctypes.c_float * n_embd).from_address(x)) for x in at])
        finally:
            lib.llama_free(context)

    def greedy(self, tokens: list[int], n: int, n_ctx: int, n_threads: int, banned: list[int]) -> list[int]:
        context = self._context(n_ctx, n_threads)
        try:
            out: list[int] = []
            fed = np.array(tokens, np.int32)
            at = 0
            while len(out) < n:
                self._decode(context, fed, at, False)
                at += len(fed)
                row = self._row(context, -1).copy()
                row[banned] = -np.inf
                out.append(int(row.argmax()))
                fed = np.array(out[-1:], np.int32)
            return out
        finally:
            self._lib.llama_free(context)


# -- the child and who asks it -----------------------------------------------------------------------------------------


def _serve(pipe: Connection, library: str, stderr: str) -> None:
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_APPEND), 2)
    os.environ["GGML_NO_BACKTRACE"] = "1"  # it would start a debugger on this process
    peer = _Library(Path(library))
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, getattr(peer, name)(*arguments)))
        except Exception as e:
            pipe.send((False, e))


class Peer:
    """libllama in a child process that is started when first asked, and again after a crash.

    Errors: PeerRefused for a file that libllama will not load; PeerCrashed when it ended its process: ask again, and a
    new one opens the same file.
    Threads: one.
    """

    def __init__(self, library: Path | None = None) -> None:
        found = library or library_path()
        if found is None:
            raise FileNotFoundError("no libllama: expected GGMQ_LIBLLAMA or xllamacpp; pip install 'ggmq[peers]'")
        self.library = found
        handle, name = tempfile.mkstemp(prefix="peer-", suffix=".log")
        os.close(handle)
        self._stderr = Path(name)
        weakref.finalize(self, os.unlink, name)
        self._child: multiprocessing.process.BaseProcess | None = None
        self._open: tuple[str, bool] | None = None

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._stderr.write_bytes(b"")
        self._pipe, theirs = spawn.Pipe()
        self._child = spawn.Process(target=_serve, args=(theirs, str(self.library), str(self._stderr)), daemon=True)
        self._child.start()
        theirs.close()

    def _ask(self, name: str, *arguments: object) -> Any:
        if self._child is None:
            self._start()
            if self._open is not None and name != "open":
                self._ask("open", *self._open)
        try:
            self._pipe.send((name, arguments))
            fine, answer = self._pipe.recv()
        except (EOFError, OSError):
            said = self._stderr.read_text(errors="replace").strip().splitlines()
            child = self._child
            assert child is not None  # started above
            self.close()
            raise PeerCrashed(f"{name}: exit status {child.exitcode}: " + "\n".join(said[:6])) from None
        if not fine:
            raise answer
        return answer

    def open(self, path: Path | str, vocab_only: bool = True) -> Loaded:
        """Load a file, its vocabulary alone or whole, in the place of the last one."""
        self._open = (str(path), vocab_only)
        loaded: Loaded = self._ask("open", *self._open)
        return loaded

    def tokenize(self, texts: Sequence[bytes], add_special: bool = True, parse_special: bool = True) -> list[list[int]]:
        """Ids of each text."""
        ids: list[list[int]] = self._ask("tokenize", list(texts), add_special, parse_special)
        return ids

    def logits(self, tokens: Sequence[int], n_ctx: int = 512, n_threads: int = 1) -> npt.NDArray[np.float32]:
        """Logits at every position, on the CPU, f16 KV, without flash attention. Shapes: (tokens, vocabulary)."""
        rows: npt.NDArray[np.float32] = self._ask("logits", [int(t) for t in tokens], n_ctx, n_threads)
        return rows

    def embeddings(
        self, tokens: Sequence[int], pooling: int, n_ctx: int = 512, n_threads: int = 1
    ) -> npt.NDArray[np.float32]:
        """One vector by its number of a pooling, or for 0 those of all tokens. Shapes: (1 or tokens, width)."""
        rows: npt.NDArray[np.float32] = self._ask("embeddings", [int(t) for t in tokens], n_ctx, n_threads, pooling)
        return rows

    def greedy(
        self, tokens: Sequence[int], n: int, n_ctx: int = 512, n_threads: int = 1, banned: Sequence[int] = ()
    ) -> list[int]:
        """The n tokens that follow, each the likeliest that is not banned; it does not stop at an end token."""
        ids: list[int] = self._ask("greedy", [int(t) for t in tokens], n, n_ctx, n_threads, [int(b) for b in banned])
        return ids

    def close(self) -> None:
        if self._child is not None:
            self._pipe.close()
            self._child.join(10)
            if self._child.is_alive():
                self._child.kill()
                self._child.join()
            self._child = None

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
