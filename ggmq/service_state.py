"""What a service does now, as it is shown to people and programs."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct, field


class SlotState(Struct):
    """What a slot does. Units: tokens, seconds."""

    id: int
    state: Literal["idle", "prompt", "decode"] = "idle"
    n_prompt: int = 0
    n_read: int = 0
    n_made: int = 0
    n_ctx: int = 0
    seconds: float = 0.0
    n_drafted: int = 0
    n_accepted: int = 0


class ServiceState(Struct):
    """Attributes:
    prompt_tokens_per_s, decode_tokens_per_s: over the last LATELY_S seconds.
    n_pages, n_free_pages: of all windows.
    error: why nothing can be answered now; empty while it can.
    """

    name: str
    slots: list[SlotState] = field(default_factory=list)
    n_waiting: int = 0
    n_queue: int = 0
    n_done: int = 0
    n_failed: int = 0
    n_left: int = 0
    n_prompt_tokens: int = 0
    n_cached_tokens: int = 0
    n_made_tokens: int = 0
    n_drafted_tokens: int = 0
    n_accepted_tokens: int = 0
    prompt_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    n_pages: int = 0
    n_free_pages: int = 0
    error: str = ""
