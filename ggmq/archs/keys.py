"""Which keys of a file each architecture reads: one table, through which every key is read.

A key that stands here for another architecture only is not applied, whatever a file says; `ggmq info` lists those.
Source: llama.cpp's loaders of the same architectures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ggmq.gguf import GGUF
from protocol.errors import FormatError

REQUIRED = ...
"""A file without the key cannot be run."""

EVERY: dict[str, Any] = {
    "context_length": REQUIRED, "embedding_length": REQUIRED, "block_count": REQUIRED, "vocab_size": None,
    "feed_forward_length": None, "expert_count": 0, "expert_used_count": 0, "rope.scaling.type": "linear",
    # read to be refused: what they ask for is not done here
    "attention.causal": True, "nextn_predict_layers": 0, "expert_group_count": 0,
    # of embeddings
    "pooling_type": 0,
}  # fmt: skip
"""Read for every architecture, with what their absence means; None where it follows from other keys."""
ATTENDING: dict[str, Any] = EVERY | {
    "attention.head_count": REQUIRED, "attention.head_count_kv": None, "attention.key_length": None,
    "attention.value_length": None,
}  # fmt: skip
"""Read for those that attend."""
TURNED: dict[str, Any] = {
    "attention.layer_norm_rms_epsilon": REQUIRED, "rope.dimension_count": None, "rope.freq_base": 10000.0,
    "rope.scaling.factor": None, "rope.scale_linear": 0.0, "rope.scaling.attn_factor": 1.0,
    "rope.scaling.original_context_length": None,
}  # fmt: skip
"""Those with rotary positions and RMS norms."""
WINDOWED: dict[str, Any] = {
    "attention.sliding_window": 0, "attention.sliding_window_pattern": None, "attention.key_length_swa": None,
    "attention.value_length_swa": None, "rope.dimension_count_swa": None,
}  # fmt: skip
"""Those in which some layers see a window only."""

READ: dict[str, dict[str, Any]] = {
    "llama": ATTENDING | TURNED,
    "mistral3": ATTENDING | TURNED | {
        "attention.temperature_scale": 0.0, "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0,
        "rope.scaling.yarn_log_multiplier": 0.0,
    },
    "qwen2": ATTENDING | TURNED,
    "qwen3": ATTENDING | TURNED,
    "qwen3moe": ATTENDING | TURNED | {"expert_feed_forward_length": None},
    "gemma2": ATTENDING | TURNED | WINDOWED | {
        "attention.sliding_window": 4096, "rope.freq_base_swa": None, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": ATTENDING | TURNED | WINDOWED | {"rope.freq_base_swa": 10000.0, "final_logit_softcapping": 0.0},
    "phi3": ATTENDING | TURNED,
    "smollm3": ATTENDING | TURNED,
    "olmo2": ATTENDING | TURNED | WINDOWED,
    "granite": ATTENDING | TURNED | {
        "logit_scale": REQUIRED, "residual_scale": 0.0, "embedding_scale": 0.0, "attention.scale": 0.0,
        "rope.scaling.finetuned": True, "expert_shared_feed_forward_length": 0,
    },
    "gpt2": ATTENDING | {"attention.layer_norm_epsilon": REQUIRED},
    "gpt-oss": ATTENDING | TURNED | WINDOWED | {
        "attention.sliding_window": REQUIRED, "rope.freq_base_swa": None, "expert_feed_forward_length": REQUIRED,
    },
    "mamba2": EVERY | {
        "attention.layer_norm_rms_epsilon": REQUIRED, "ssm.conv_kernel": REQUIRED, "ssm.inner_size": REQUIRED,
        "ssm.state_size": REQUIRED, "ssm.time_step_rank": REQUIRED, "ssm.group_count": REQUIRED,
    },
}  # fmt: skip

DESCRIBING = ("general.", "tokenizer.", "split.", "quantize.")
"""Keys that describe the file, its vocabulary, or how it came about: none of them belongs to an architecture."""


class Keys:
    """The keys of a file that its architecture reads.

    A key of another architecture has the value that `default` gives; without a default, asking for one is a bug.
    Errors: FormatError names the key, what was expected and what came.
    """

    def __init__(self, g: GGUF, arch: str) -> None:
        self.gguf, self.arch, self._read = g, arch, READ[arch]

    def name(self, key: str) -> str:
        """As the file spells it."""
        return f"{self.arch}.{key}"

    def reads(self, key: str) -> bool:
        """Whether the architecture reads such a key, be it in the file or not."""
        return key in self._read

    def __contains__(self, key: str) -> bool:
        return key in self._read and self.name(key) in self.gguf.metadata

    def _default(self, key: str, default: Any) -> Any:
        known = self._read[key] if default is REQUIRED else self._read.get(key, default)
        return default if known is None and default is not REQUIRED else known

    def is_array(self, key: str) -> bool:
        return key in self and self.gguf.metadata[self.name(key)].is_array

    def integer(self, key: str, low: int, high: int, default: Any = REQUIRED) -> int:
        value = self._default(key, default)
        if key in self or value is REQUIRED:
            value = self.gguf.integer(self.name(key))
        if not low <= value <= high:
            raise self.wrong(key, f"{low} to {high}", value if key in self else "nothing")
        return int(value)

    def number(self, key: str, default: Any = REQUIRED, low: float = -math.inf) -> float:
        """A finite number."""
        value = self._default(key, default)
        if key in self or value is REQUIRED:
            value = self.gguf.number(self.name(key))
            if not (math.isfinite(value) and value >= low):
                raise self.wrong(key, "a finite number" + (f" of at least {low:g}" if low > -math.inf else ""), value)
        return float(value)

    def text(self, key: str, default: Any = REQUIRED) -> str:
        value = self._default(key, default)
        return self.gguf.text(self.name(key)) if key in self or value is REQUIRED else str(value)

    def boolean(self, key: str, default: Any = REQUIRED) -> bool:
        value = self._default(key, default)
        return self.gguf.boolean(self.name(key)) if key in self or value is REQUIRED else bool(value)

    def per_layer(self, key: str, n_layer: int, low: int, high: int, default: Any = REQUIRED) -> tuple[int, ...]:
        """One integer for all layers, or an array with one each."""
        if not self.is_array(key):
            return (self.integer(key, low, high, default),) * n_layer
        values = tuple(int(x) for x in self.gguf.numbers(self.name(key)))
        if len(values) != n_layer:
            raise self.wrong(key, f"one value a layer ({n_layer})", len(values))
        for value in values:
            if not low <= value <= high:
                raise self.wrong(key, f"{low} to {high}", value)
        return values

    def wrong(self, key: str, expected: str, got: object) -> FormatError:
        v = self.gguf.metadata.get(self.name(key))
        where = f"byte {v.offset}" if v is not None else "metadata"
        return FormatError(f"{self.gguf.path.name}: {where}: key {self.name(key)}: expected {expected}, got {got}")


def unread(g: GGUF, arch: str) -> Iterator[str]:
    """The keys of a file that are neither read for an architecture nor descriptions, in the file's order."""
    read = {f"{arch}.{key}" for key in READ[arch]}
    return (key for key in g.metadata if key not in read and not key.startswith(DESCRIBING))
