"""CUDA kernels: their sources (`*.cu` over `primitives.cuh` and `common.cuh`), what they are called with, and how a source
is put together. Nothing here needs a GPU or CuPy.
"""
