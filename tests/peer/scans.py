"""SSM_SCAN of random sizes against ggml's own, in graphs as llama.cpp makes them of Mamba-1 and Mamba-2 layers."""

from __future__ import annotations

import argparse
import ctypes
import random
import tempfile
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from ggmq.cluster import LocalBus
from ggmq.replay import replay
from protocol.dtypes import contiguous_nb
from tests.peer.libllama import library_path

F32, I32 = 0, 26
_POINTER, _INT, _LONG, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_new_tensor_4d": (_POINTER, [_POINTER, _INT, *[_LONG] * 4]),
    "ggml_view_4d": (_POINTER, [_POINTER, _POINTER, *[_LONG] * 4, *[_SIZE] * 4]),
    "ggml_get_data": (_POINTER, [_POINTER]),
    "ggml_ssm_scan": (_POINTER, [*[_POINTER] * 8, _LONG]),
    "ggml_new_graph": (_POINTER, [_POINTER]),
    "ggml_build_forward_expand": (None, [_POINTER, _POINTER]),
    "ggml_graph_compute_with_ctx": (_INT, [_POINTER, _POINTER, _INT]),
    "ggml_free": (None, [_POINTER]),
}


class _Init(ctypes.Structure):
    _fields_ = [("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--record", type=Path, metavar="FILE.msgpack", help="write cases that tests hold against")


def run(args: argparse.Namespace) -> int:
    """Compare with the reference device; 0 when nothing differs."""
    path = library_path()
    if path is None:
        raise FileNotFoundError("no libllama: expected GGMQ_LIBLLAMA or xllamacpp; pip install 'ggmq[peers]'")
    library = ctypes.CDLL(str(path))
    library.ggml_init.restype, library.ggml_init.argtypes = _POINTER, [_Init]
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    cases = [made(library, random.Random(f"{args.seed} {i}")) for i in range(args.n)]
    packed = msgpack.packb(cases)
    if args.record:
        args.record.write_bytes(packed)
        print(f"{args.record}: {len(cases)} cases")
        return 0
    started = LocalBus()
    with tempfile.NamedTemporaryFile() as f:
        f.write(packed)
        f.flush()
        try:
            started.spawn("reference", 1)
            results = list(replay(started.start(), Path(f.name)))
        finally:
            started.close()
    bad = [r for r in results if not r.ok]
    for r in bad:
        print(f"DIFFERENT: {r.case}: nmse {r.nmse} {r.note}")
    print(f"seed {args.seed}: {len(results) - len(bad)} same, {len(bad)} different")
    return int(bool(bad))


def made(library: Any, rng: random.Random) -> dict[str, Any]:
    """A random case with ggml's result, in the form that `ggmq.replay` reads."""
    mamba2 = rng.random() < 0.75
    n_head = rng.choice([2, 4, 6]) if mamba2 else rng.choice([8, 24])
    d_head = rng.choice([4, 8, 16]) if mamba2 else 1
    n_group = rng.choice([g for g in (1, 2) if n_head % g == 0]) if mamba2 else 1
    d_state, n_tokens, n_seqs = rng.choice([4, 16]), rng.choice([1, 2, 7]), rng.choice([1, 1, 3])
    n_slots, n_states = n_seqs + rng.randint(0, 2), rng.choice([1, 1, 2]) if mamba2 and n_tokens > 1 else 1
    numbers = np.random.default_rng(rng.getrandbits(32))
    d_inner, width = n_head * d_head, n_head * d_head + 2 * n_group * d_state
    tensors: list[dict[str, Any]] = []
    made_there = []
    context = library.ggml_init(_Init(1 << 24, None, False))

    def leaf(kind: int, ne: tuple[int, int, int, int], values: Any) -> int:
        data = np.asarray(values, np.float32 if kind == F32 else np.int32).tobytes()
        t = library.ggml_new_tensor_4d(context, kind, *ne)
        ctypes.memmove(library.ggml_get_data(t), data, len(data))
        made_there.append(t)
        tensors.append({"type": kind, "op": "NONE", "ne": ne, "nb": contiguous_nb(kind, ne), "params": [0] * 16, "src": [],
                        "view_src": -1, "view_offs": 0, "data": data})  # fmt: skip
        return len(tensors) - 1

    def view(root: int, ne: tuple[int, int, int, int], row: int, offset: int) -> int:
        nb = (4, 4 * row, 4 * width, 4 * width * n_tokens)
        made_there.append(library.ggml_view_4d(context, made_there[root], *ne, *nb[1:], 4 * offset))
        tensors.append({"type": F32, "op": "VIEW", "ne": ne, "nb": nb, "params": [0] * 16, "src": [root], "view_src": root,
                        "view_offs": 4 * offset})  # fmt: skip
        return len(tensors) - 1

    def normal(*ne: int) -> Any:
        return numbers.standard_normal(ne)

    per_state = d_state if not mamba2 else 1
    state = leaf(F32, (d_state, d_head, n_head, n_slots), normal(d_state * d_inner * n_slots))
    projected = leaf(F32, (width, n_tokens, n_seqs, 1), normal(width * n_tokens * n_seqs))
    x = view(projected, (d_head, n_head, n_tokens, n_seqs), d_head, 0)
    dt = leaf(F32, (n_head, n_tokens, n_seqs, 1), 3 * normal(n_head * n_tokens * n_seqs))
    a = leaf(F32, (per_state, n_head, 1, 1), -np.exp(normal(per_state * n_head)))
    b = view(projected, (d_state, n_group, n_tokens, n_seqs), d_state, d_inner)
    c = view(projected, (d_state, n_group, n_tokens, n_seqs), d_state, d_inner + n_group * d_state)
    ids = leaf(I32, (n_seqs, 1, 1, 1), numbers.permutation(n_slots)[:n_seqs])
    src = [state, x, dt, a, b, c, ids]
    n = d_inner * n_tokens * n_seqs + n_states * d_state * d_inner * n_seqs
    out = library.ggml_ssm_scan(context, *(made_there[i] for i in src), n_states)
    graph = library.ggml_new_graph(context)
    library.ggml_build_forward_expand(graph, out)
    if library.ggml_graph_compute_with_ctx(context, graph, 1):
        raise RuntimeError("ggml_graph_compute_with_ctx failed")
    expected = ctypes.string_at(library.ggml_get_data(out), 4 * n)
    library.ggml_free(context)
    tensors.append({"type": F32, "op": "SSM_SCAN", "ne": (n, 1, 1, 1), "nb": contiguous_nb(F32, (n, 1, 1, 1)),
                    "params": [n_states] + [0] * 15, "src": src, "view_src": -1, "view_offs": 0})  # fmt: skip
    words = (f"d_state={d_state},d_head={d_head},n_head={n_head},n_group={n_group},n_tokens={n_tokens},n_seqs={n_seqs},"
             f"n_slots={n_slots},n_states={n_states},mamba={1 + mamba2}")  # fmt: skip
    return {"case": words, "max_nmse": 1e-7, "out": len(tensors) - 1, "expected": expected, "tensors": tensors}
