"""Bindings of what layers with a state are made of: convolutions and recurrences over tokens."""

from __future__ import annotations

from workers.devices.bindings import Bindings
from workers.devices.cuda.binding import F32, Binder, ceil_div
from workers.devices.cuda.strided import four, operands, separate
from workers.devices.lower import Node
from workers.kernels.cuda.scan_launches import LANES, MAX_CONV, MAX_STATE, SsmConv, SsmScan

BINDINGS = Bindings()
TILE = 32
"""Channels and tokens of a block."""
MAX_BLOCKS_Y = 65535


def _conv(b: Binder, n: Node, result: Node, bias: int, silu: bool) -> bool:
    """`bias`: tensor of one number a channel, or -1."""
    i, j = n.tensor.src
    n_channels, n_tokens, n_seqs, _ = n.tensor.ne
    d_conv, found = n.req(1).ne[0], operands(b, i, j, result.index, *([bias] if bias >= 0 else []))
    if found is None or d_conv > MAX_CONV or n_seqs > MAX_BLOCKS_Y:
        return False
    if not separate(b, result.index, i, j, bias, inplace=False):
        return False
    x, w, y = found[:3]
    at, step = (found[3].address, found[3].nb[0]) if bias >= 0 else (0, 0)
    b.add(n, SsmConv(x=x.address, x_nb=four(x.nb, 0), w=w.address, w_nb=four(w.nb, 0), y=y.address, y_nb=four(y.nb, 0),
                     d_conv=d_conv, n_channels=n_channels, n_tokens=n_tokens, bias=at, bias_step=step, silu=silu),
          ceil_div(n_channels, TILE) * ceil_div(n_tokens, TILE), n_seqs)  # fmt: skip
    return True


@BINDINGS.of("SSM_CONV")
def ssm_conv(b: Binder, n: Node) -> bool:
    return _conv(b, n, n, -1, False)


@BINDINGS.of_neighbours("SSM_CONV", "SILU")
def ssm_conv_silu(b: Binder, n: Node, silu: Node) -> bool:
    return _conv(b, n, silu, -1, True)


@BINDINGS.of_neighbours("SSM_CONV", "ADD", "SILU")
def ssm_conv_bias_silu(b: Binder, n: Node, add: Node, silu: Node) -> bool:
    bias = add.req(1)
    fits = bias.type == F32 and bias.ne in ((n.tensor.ne[0], 1, 1, 1), (1, 1, 1, 1)) and add.tensor.type == F32
    return fits and _conv(b, n, silu, add.tensor.src[1], True)


@BINDINGS.of("SSM_SCAN")
def ssm_scan(b: Binder, n: Node) -> bool:
    """Layouts that ggml takes."""
    state, x, dt, a, to_state, _from_state, ids = (n.req(i) for i in range(7))
    found = operands(b, *n.tensor.src, n.index)
    if found is None or not all(t.contiguous for t in (state, dt, a, ids, n.tensor)) or state.type != F32:
        return False
    d_state, d_head, n_head, n_slots = state.ne
    if d_state > MAX_STATE or not separate(b, n.index, *n.tensor.src, inplace=False):
        return False
    each = 1 << (ceil_div(d_state, LANES) - 1).bit_length()
    at = [o.address for o in found]
    b.add(n, SsmScan(state=at[0], n_slots=n_slots, x=at[1], x_nb=four(found[1].nb, 0), dt=at[2], a=at[3], n_a=a.ne[0],
                     b=at[4],
                     b_nb=four(found[4].nb, 0), c=at[5], c_nb=four(found[5].nb, 0), ids=at[6], y=at[7], d_state=d_state,
                     d_head=d_head,
                     n_head=n_head, each=n_head // to_state.ne[1], n_tokens=x.ne[2], n_seqs=x.ne[3],
                     n_states=max(1, n.params["n_states"]), status=b.status, node=n.index),
          x.ne[3] * n_head * ceil_div(d_head, 256 // LANES), EACH=each)  # fmt: skip
    return True
