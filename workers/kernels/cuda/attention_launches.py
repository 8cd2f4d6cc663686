"""Kernels of positions and attention, and what they are called with."""

from __future__ import annotations
