"""Mamba-2 (Dao and Gu 2024): no attention and no positions; each layer keeps a state of fixed size."""

from __future__ import annotations

from ggmq.archs.base import Arch
from ggmq.archs.builder import T
from ggmq.archs.hparams import read_ssm
from ggmq.archs.memory import Keeps, States
from ggmq.archs.stage import StageGraph
from ggmq.gguf import GGUF


class Mamba2(Arch):
    biases = frozenset()

    def __init__(self, g: GGUF) -> None:
        super().__init__(g)
        self.ssm = read_ssm(self.keys)

    def memory(self, il: int) -> Keeps:
        m = self.ssm
        return States({"conv": (m.d_conv - 1) * m.n_channels, "ssm": m.d_state * m.d_inner})

    def layer(self, s: StageGraph, x: T, il: int) -> T:
        return s.b.add(self.mix(s, self.norm(s, f"blk.{il}.attn_norm", x), il), x)

    def mix(self, s: StageGraph, x: T, il: int) -> T:
        """What a token adds, by itself and by the state that those before it left. Shapes: [n_embd, n_tokens]."""
        m, b, p = self.ssm, s.b, f"blk.{il}."
        n_tokens = b.ne(x)[1]
        n_seqs = s.batch.n_seqs
        n = n_tokens // n_seqs
        width = m.d_inner + m.n_channels + m.n_head
        projected = s.linear(p + "ssm_in", x, width)
        row = 4 * width
        gate = b.view(projected, (m.d_inner, n_tokens), (row,), 0)
        channels = b.view(projected, (m.n_channels, n, n_seqs), (row, row * n), 4 * m.d_inner)
        dt = b.view(projected, (m.n_head, n_tokens), (row,), row - 4 * m.n_head)
        mixed = self._convolve(s, channels, il)
        dt = b.add(b.cont(dt), s.w(p + "ssm_dt.bias", m.n_head))
        y = self._scan(s, mixed, b.reshape(dt, m.n_head, n, n_seqs), il)
        y = b.glu("SWIGLU", b.cont(gate), y)
        y = b.rms_norm(b.reshape(y, m.d_inner // m.n_group, m.n_group, n_tokens), self.hp.norm_rms_eps)
        y = b.mul(y, s.w(p + "ssm_norm.weight", m.d_inner // m.n_group, m.n_group))
        return s.linear(p + "ssm_out", b.reshape(y, m.d_inner, n_tokens), self.hp.n_embd)

    def _convolve(self, s: StageGraph, channels: T, il: int) -> T:
        """Each channel filtered over the last d_conv tokens. Shapes: [n_channels, n, n_seqs], the result contiguous."""
        m, b, p = self.ssm, s.b, f"blk.{il}.ssm_conv1d."
        _, n, n_seqs, _ = b.ne(channels)
        before = b.reshape(s.read_state(il, "conv"), m.d_conv - 1, m.n_channels, n_seqs)
        tokens = b.concat(before, b.permute(channels, 1, 0, 2, 3), 0)
        column = 4 * b.ne(tokens)[0]
        last = b.view(tokens, (m.d_conv - 1, m.n_channels, n_seqs), (column, column * m.n_channels), 4 * n)
        s.write_state(il, "conv", b.reshape(b.cont(last), (m.d_conv - 1) * m.n_channels, n_seqs))
        y = b.ssm_conv(tokens, s.w(p + "weight", m.d_conv, m.n_channels))
        return b.unary("SILU", b.add(y, s.w(p + "bias", m.n_channels)))

    def _scan(self, s: StageGraph, mixed: T, dt: T, il: int) -> T:
        """The recurrence over the state, and each token's own share. Shapes: [n_channels, n, n_seqs] and [n_head, n, n_seqs]
        to [d_inner, n_tokens]."""
        m, b, p = self.ssm, s.b, f"blk.{il}."
        _, n, n_seqs, _ = b.ne(mixed)
        row = 4 * m.n_channels

        def of_groups(at: int) -> T:
            return b.view(mixed, (m.d_state, m.n_group, n, n_seqs), (4 * m.d_state, row, row * n), 4 * at)

        x = b.cont(b.view(mixed, (m.d_inner, n * n_seqs), (row,), 0))
        x = b.reshape(x, m.d_head, m.n_head, n, n_seqs)
        to_state, from_state = of_groups(m.d_inner), of_groups(m.d_inner + m.n_group * m.d_state)
        states, slots = s.states(il, "ssm")
        states = b.reshape(states, m.d_state, m.d_head, m.n_head, b.ne(states)[1])
        scanned = b.ssm_scan(states, x, dt, s.w(p + "ssm_a", 1, m.n_head), to_state, from_state, slots)
        size, n_y = m.d_state * m.d_inner, m.d_inner * n * n_seqs
        s.write_state(il, "ssm", b.view(scanned, (size, n_seqs), (4 * size,), 4 * n_y))
        y = b.view(scanned, (m.d_head, m.n_head, n, n_seqs), (4 * m.d_head, 4 * m.d_inner, 4 * m.d_inner * n), 0)
        own = b.mul(x, s.w(p + "ssm_d", 1, m.n_head))
        return b.reshape(b.add(y, own), m.d_inner, n * n_seqs)
