"""Kernels of elements, rows and copies, and what they are called with."""

from __future__ import annotations
