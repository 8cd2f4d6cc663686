"""CUDA devices: which there are, and how one is opened. CuPy is imported only where a device is asked for."""

from __future__ import annotations
