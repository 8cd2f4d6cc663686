"""Architectures by the name in `general.architecture`. To add one: a file beside these and a line here."""

from __future__ import annotations

from ggmq.archs.base import Arch
from ggmq.archs.gemma2 import Gemma2
from ggmq.archs.gemma3 import Gemma3
from ggmq.archs.gpt2 import GPT2
from ggmq.archs.gpt_oss import GptOss
from ggmq.archs.granite import Granite
from ggmq.archs.llama import Llama
from ggmq.archs.mamba2 import Mamba2
from ggmq.archs.mistral3 import Mistral3
from ggmq.archs.olmo2 import Olmo2
from ggmq.archs.phi3 import Phi3
from ggmq.archs.qwen2 import Qwen2
from ggmq.archs.qwen3 import Qwen3
from ggmq.archs.qwen3moe import Qwen3MoE
from ggmq.archs.smollm3 import SmolLM3
from ggmq.gguf import GGUF
from protocol.errors import FormatError

ARCHS: dict[str, type[Arch]] = {
    "llama": Llama, "mistral3": Mistral3, "qwen2": Qwen2, "qwen3": Qwen3, "qwen3moe": Qwen3MoE, "gemma2": Gemma2,
    "gemma3": Gemma3, "phi3": Phi3, "smollm3": SmolLM3, "olmo2": Olmo2, "granite": Granite, "gpt2": GPT2,
    "gpt-oss": GptOss, "mamba2": Mamba2,
}  # fmt: skip


def open_arch(g: GGUF) -> Arch:
    """The architecture of a file. Errors: FormatError lists the known ones, or says what keeps this model from running."""
    name = g.text("general.architecture")
    if name not in ARCHS:
        raise FormatError(f"{g.path.name}: architecture {name!r} is unknown; expected one of {', '.join(sorted(ARCHS))}")
    arch = ARCHS[name](g)
    arch.check()
    return arch
