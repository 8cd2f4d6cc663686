"""Files that hold a vocabulary and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf


def write(
    path: Path, model: str, tokens: Sequence[str | bytes], *, types: Sequence[int] | None = None,
    scores: Sequence[float] | None = None, merges: Sequence[str] | None = None, pre: str | None = None,
    name: str | None = None, **keys: Any,
) -> Path:  # fmt: skip
    """A file with a vocabulary and nothing else. `keys`: of `tokenizer.ggml.`, integers as u32, lists as i32."""
    w = gguf.GGUFWriter(path, "llama")
    if name is not None:
        w.add_name(name)
    w.add_tokenizer_model(model)
    if pre is not None:
        w.add_tokenizer_pre(pre)
    w.add_token_list(tokens)
    for key, value in (("token_type", types), ("scores", scores), ("merges", merges)):
        if value is not None:
            w.add_array(f"tokenizer.ggml.{key}", value)
    for key, value in keys.items():
        add = w.add_bool if isinstance(value, bool) else w.add_uint32 if isinstance(value, int) else w.add_array
        add(f"tokenizer.ggml.{key}", value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()
    return path
