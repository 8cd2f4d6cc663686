"""Bindings of scans."""

from __future__ import annotations

from workers.devices.bindings import Bindings

BINDINGS = Bindings()
