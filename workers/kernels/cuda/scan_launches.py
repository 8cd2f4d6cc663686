"""Kernels of states, and what they are called with."""

from __future__ import annotations
