"""The bundled model with a chat template of its own."""

from __future__ import annotations

from pathlib import Path

from tests.support.fixtures import BUNDLED
from tests.support.gguf_factory import STRING, key, text

ALIGNMENT = 32


def with_template(path: Path, template: str) -> Path:
    """A copy of the bundled model, written to `path`, that has the template. A comment in it fills up an alignment, so that
    the tensors move and nothing else."""
    raw = BUNDLED.read_bytes()
    n_keys = int.from_bytes(raw[16:24], "little")
    n_over = len(key("tokenizer.chat_template", STRING, text(template + "{##}"))) % ALIGNMENT
    template += "{#" + " " * (-n_over % ALIGNMENT) + "#}"
    added = key("tokenizer.chat_template", STRING, text(template))
    path.write_bytes(raw[:16] + (n_keys + 1).to_bytes(8, "little") + added + raw[24:])
    return path
