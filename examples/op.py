"""Compute a layer of a network on a device, op by op, and hold it against NumPy: `python examples/op.py`."""

import numpy as np

import ggmq


def layer(g: ggmq.Graph, x: int, gate: int, up: int, down: int) -> dict[str, int]:
    normed = g.rms_norm(x, 1e-5)
    hidden = g.glu("SWIGLU", g.mul_mat(gate, normed), g.mul_mat(up, normed))
    return {"y": g.add(g.mul_mat(down, hidden), x), "hidden": hidden}


rng = np.random.default_rng(0)
x, gate, up, down = (rng.standard_normal(shape, np.float32) for shape in ((5, 64), (96, 64), (96, 64), (64, 96)))

with ggmq.local_cluster(workers=1) as cluster:
    device = cluster.device("CPU")
    got = device.run(layer, x=x, gate=gate, up=up, down=down)

normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
a, b = normed @ gate.T, normed @ up.T
expected = (a / (1 + np.exp(-a)) * b) @ down.T + x
error = ((got["y"] - expected) ** 2).sum() / (expected**2).sum()
print(f"y {got['y'].shape} and hidden {got['hidden'].shape} on {device.name}, "
      f"{'as NumPy has them' if error < 1e-3 else f'and NumPy differs: {error}'}")  # fmt: skip
