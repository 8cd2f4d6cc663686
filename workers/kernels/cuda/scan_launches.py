"""Kernels of states, and what they are called with."""

from __future__ import annotations

from workers.kernels.cuda.launches import Four, Launch, launch
from workers.kernels.records import Address, Bytes, Count, Flag, NodeIndex

MAX_CONV = 16
"""Tokens that a filter sees."""
LANES = 8
"""That share the state of a row."""
MAX_STATE = 512
"""Numbers of a row's state."""


@launch("scans.ssm_conv", "SSM_CONV")
class SsmConv(Launch, frozen=True, kw_only=True):
    """Filters of d_conv: x [d_conv - 1 + n_tokens, n_channels, n_seqs] to y [n_channels, n_tokens, n_seqs]; then plus the
    bias of each channel, unless that is 0, and where `silu` SILU of it. A block has 32 channels and 32 tokens of a sequence.
    """

    x: Address
    x_nb: Four
    w: Address
    w_nb: Four
    y: Address
    y_nb: Four
    d_conv: Count
    n_channels: Count
    n_tokens: Count
    bias: Address
    bias_step: Bytes
    silu: Flag


@launch("scans.ssm_scan", "SSM_SCAN")
class SsmScan(Launch, frozen=True, kw_only=True):
    """The states [d_state, d_head, n_head, n_slots] that `ids` names go on by n_tokens each. A block has 32 rows of a head
    of a sequence. At y lie the outputs [d_head, n_head, n_tokens, n_seqs], then n_states states, the latest first."""

    state: Address
    n_slots: Count
    x: Address
    x_nb: Four
    dt: Address
    a: Address
    n_a: Count
    b: Address
    b_nb: Four
    c: Address
    c_nb: Four
    ids: Address
    y: Address
    d_state: Count
    d_head: Count
    n_head: Count
    each: Count
    n_tokens: Count
    n_seqs: Count
    n_states: Count
    status: Address
    node: NodeIndex
