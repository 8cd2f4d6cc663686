"""Bindings of what layers with a state are made of: convolutions and recurrences over tokens."""

from __future__ import annotations

from workers.devices.bindings import Bindings
from workers.devices.cpu.binding import F32, Binder
from workers.devices.lower import Node
from workers.kernels import steps

BINDINGS = Bindings()


@BINDINGS.of("CONCAT")
def concat(b: Binder, n: Node) -> bool:
    """Rows of float32, of any strides, one behind the other."""
    x, z = n.req(0), n.req(1)
    if n.params["dim"] != 0 or n.tensor.type != F32 or not n.tensor.contiguous or n.tensor.ne[3] != 1:
        return False
    b.add(n, steps.Concat(x=b.address(n.tensor.src[0]), x_step=x.nb[0], x_row=x.nb[1], x_plane=x.nb[2], n_x=x.ne[0],
                          z=b.address(n.tensor.src[1]), z_step=z.nb[0], z_row=z.nb[1], z_plane=z.nb[2], n_z=z.ne[0],
                          y=b.address(n.index), n_rows=x.ne[1], n_planes=x.ne[2]))  # fmt: skip
    return True


@BINDINGS.of("SSM_CONV")
def ssm_conv(b: Binder, n: Node) -> bool:
    x, w = n.req(0), n.req(1)
    if x.nb[0] != 4 or w.nb[0] != 4 or not n.tensor.contiguous:
        return False
    n_channels, n_tokens, n_seqs, _ = n.tensor.ne
    b.add(n, steps.SsmConv(x=b.address(n.tensor.src[0]), x_row=x.nb[1], x_seq=x.nb[2], w=b.address(n.tensor.src[1]),
                           w_row=w.nb[1], y=b.address(n.index), d_conv=w.ne[0], n_channels=n_channels,
                           n_tokens=n_tokens, n_seqs=n_seqs))  # fmt: skip
    return True


@BINDINGS.of("SSM_SCAN")
def ssm_scan(b: Binder, n: Node) -> bool:
    """Layouts that ggml takes."""
    state, x, dt, a, to_state, from_state, ids = (n.req(i) for i in range(7))
    whole = all(t.contiguous for t in (state, dt, a, ids, n.tensor))
    if not whole or x.nb[0] != 4 or to_state.nb[0] != 4 or to_state.nb != from_state.nb:
        return False
    d_state, d_head, n_head, n_slots = state.ne
    at = [b.address(j) for j in n.tensor.src]
    b.add(n, steps.SsmScan(state=at[0], n_slots=n_slots, x=at[1], x_head=x.nb[1], x_token=x.nb[2], x_seq=x.nb[3], dt=at[2],
                           a=at[3], n_a=a.ne[0], b=at[4], c=at[5], group=to_state.nb[1], token=to_state.nb[2],
                           seq=to_state.nb[3], ids=at[6], y=b.address(n.index), d_state=d_state, d_head=d_head,
                           n_head=n_head, n_group=to_state.ne[1], n_tokens=x.ne[2], n_seqs=x.ne[3],
                           n_states=max(1, n.params["n_states"]), node=n.index))  # fmt: skip
    return True
