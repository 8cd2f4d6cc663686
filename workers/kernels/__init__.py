"""Kernels: `reference` defines every op in NumPy, `cpu_*` are its fast equals in Numba, `quants` the block formats."""
